//! The SDK's model and its crash checker, with `qemu-img check` as oracle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;

use outport_plugin_qcow2::Qcow2;
use outport_sdk::testing::model::{Workload, random_ops};
use outport_sdk::testing::{MemoryHost, TestNode, crash, model};
use outport_sdk::{Codec, CreatableFormat, Error};

/// Creation options, cluster size, codec.
const IMAGES: [(&str, u64, Option<Codec>); 7] = [
    (
        r#"{"size": 1048576, "cluster-size": 4096}"#,
        4096,
        Some(Codec::Deflate),
    ),
    (
        r#"{"size": 1048064, "cluster-size": 65536}"#,
        65536,
        Some(Codec::Deflate),
    ),
    (
        r#"{"size": 300032, "cluster-size": 512}"#,
        512,
        Some(Codec::Deflate),
    ),
    (
        r#"{"size": 1048576, "cluster-size": 16384, "extended-l2": true,
            "compression-type": "zstd"}"#,
        16384,
        Some(Codec::Zstd),
    ),
    (
        r#"{"size": 300032, "cluster-size": 512, "refcount-bits": 64}"#,
        512,
        None,
    ),
    (
        r#"{"size": 1048576, "cluster-size": 1024, "refcount-bits": 1}"#,
        1024,
        Some(Codec::Deflate),
    ),
    (
        r#"{"size": 1048576, "cluster-size": 4096, "version": "v2"}"#,
        4096,
        None,
    ),
];

fn create(options: &str) -> MemoryHost {
    let mut host = MemoryHost::new(Vec::new());
    let made = Qcow2::create(&mut host, options);
    host.finish(made).unwrap();
    host.barrier();
    host
}

/// The end of an error: its beginning lists every byte of the operation.
fn words(error: &Error) -> String {
    error
        .message
        .chars()
        .rev()
        .take(400)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect()
}

fn workload(
    seed: u64,
    ops: usize,
    options: &str,
    cluster_size: u64,
    codec: Option<Codec>,
) -> Workload {
    let options: serde_json::Value = serde_json::from_str(options).unwrap();
    let size = options["size"].as_u64().unwrap();
    Workload {
        seed,
        ops,
        size,
        cluster_size,
        codec,
        resize_max: None,
    }
}

#[test]
fn random_operations_follow_the_model() {
    for (options, cluster_size, codec) in IMAGES {
        for seed in 0..6 {
            let host = create(options).with_punch();
            let mut node = TestNode::<Qcow2>::open(host, "{}").unwrap();
            let ops = random_ops(&workload(seed, 300, options, cluster_size, codec));
            model::run(&mut node, &ops)
                .unwrap_or_else(|e| panic!("{options}, seed {seed}: {}", words(&e)));
        }
    }
}

#[test]
fn no_crash_loses_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for (options, cluster_size, codec) in IMAGES {
        let mut oracle = |host: &MemoryHost| {
            let bytes = host.disk(0).unwrap().to_vec();
            // A dirty image is mended when it is opened, not before.
            let dirty = bytes[7] == 3 && bytes[79] & 1 != 0;
            fs::write(&path, bytes).unwrap();
            let mut check = Command::new("qemu-img");
            check.arg("check");
            if dirty {
                check.args(["-r", "all"]);
            }
            let check = check.arg(&path).output().unwrap();
            match check.status.code() {
                Some(0 | 3) => Ok(()),
                code => Err(format!(
                    "{code:?} {}",
                    String::from_utf8_lossy(&check.stdout)
                )),
            }
        };
        let config = crash::Config {
            oracle_every: 16,
            samples: 4,
            ..crash::Config::default()
        };
        let ops = random_ops(&workload(3, 80, options, cluster_size, codec));
        crash::check::<Qcow2>(create(options), "{}", &ops, &config, Some(&mut oracle))
            .unwrap_or_else(|e| panic!("{options}: {}", words(&e)));
    }
}
