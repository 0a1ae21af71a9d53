//! Created images against `qemu-img create`, and `measure` against
//! `qemu-img measure`.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod disk;

use std::path::Path;

use disk::{Host, ok, qemu_check, qemu_io, requires, run};
use outport_plugin_qcow2::Qcow2;
use outport_sdk::CreatableFormat;
use serde_json::{Value, json};

/// QMP options as `qemu-img create -o` has them.
fn qemu_img_options(options: &Value) -> String {
    let mut list = Vec::new();
    for (name, value) in options.as_object().unwrap() {
        let value = match value {
            Value::String(s) => s.clone(),
            Value::Bool(true) => "on".into(),
            Value::Bool(false) => "off".into(),
            other => other.to_string(),
        };
        match name.as_str() {
            "size" => {}
            "version" if value == "v2" => list.push("compat=0.10".to_owned()),
            "version" => list.push("compat=1.1".to_owned()),
            name => list.push(format!("{}={value}", name.replace('-', "_"))),
        }
    }
    list.join(",")
}

fn create_ours(dir: &Path, options: &Value) {
    let data_file = options.get("data-file").and_then(Value::as_str);
    let image = dir.join("image");
    let mut paths = vec![image.as_path()];
    let data_path = dir.join(data_file.unwrap_or_default());
    if data_file.is_some() {
        paths.push(&data_path);
    }
    let mut host = Host::open(&paths);
    host.call(|txn| Qcow2::create(txn, &options.to_string()))
        .unwrap();
}

/// `qemu-img info` without what differs between two files of equal content.
fn info(dir: &Path) -> Value {
    let out = ok(
        dir,
        "qemu-img",
        &["info", "-f", "qcow2", "--output=json", "image"],
    );
    let mut info: Value = serde_json::from_str(&out).unwrap();
    let info = info.as_object_mut().unwrap();
    for name in ["actual-size", "children", "full-backing-filename"] {
        info.remove(name);
    }
    Value::Object(std::mem::take(info))
}

/// Both images, in folders of their own, are the same to QEMU.
fn compare(options: Value) {
    println!("{options}");
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    create_ours(ours.path(), &options);
    let size = options["size"].to_string();
    let list = qemu_img_options(&options);
    let mut args = vec!["create", "-q", "-u", "-f", "qcow2"];
    if !list.is_empty() {
        args.extend(["-o", &list]);
    }
    args.extend(["image", &size]);
    ok(theirs.path(), "qemu-img", &args);

    if options.get("backing-file").is_none() {
        let (mut a, mut b) = (
            qemu_check(ours.path(), "image").unwrap(),
            qemu_check(theirs.path(), "image").unwrap(),
        );
        if matches!(options["preallocation"].as_str(), Some("falloc" | "full")) {
            // Here QEMU moves its refcount table, and leaves a gap.
            a.1["image-end-offset"].take();
            b.1["image-end-offset"].take();
        }
        assert_eq!(a, b, "{options}");
    }
    assert_eq!(info(ours.path()), info(theirs.path()), "{options}");
    let data_len = |dir: &Path| dir.join("d.raw").metadata().map(|m| m.len()).ok();
    assert_eq!(data_len(ours.path()), data_len(theirs.path()), "{options}");
}

#[test]
fn images_equal_those_of_qemu_img() {
    if !requires(&["qemu-img"]) {
        return;
    }
    for size in [0_u64, 512, 1 << 20, 1_024_000, 10 << 20, 77 << 30] {
        compare(json!({"size": size}));
        compare(json!({"size": size, "version": "v2"}));
        compare(json!({"size": size, "cluster-size": 2 << 20}));
        compare(json!({"size": size, "lazy-refcounts": true, "compression-type": "zstd"}));
        compare(json!({"size": size, "extended-l2": true}));
        compare(json!({"size": size, "data-file": "d.raw"}));
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        compare(json!({"size": 10 << 20, "refcount-bits": bits}));
        compare(json!({"size": 4 << 20, "refcount-bits": bits, "preallocation": "metadata"}));
    }
    for cluster_size in [512, 1024, 4096, 16384, 65536, 1 << 20, 2 << 20] {
        compare(json!({"size": 1 << 20, "cluster-size": cluster_size}));
        compare(json!({"size": 1_000_448, "cluster-size": cluster_size,
            "preallocation": "metadata"}));
    }
    compare(json!({"size": 64_u64 << 40}));
    compare(json!({"size": 1 << 20, "backing-file": "nowhere", "backing-fmt": "raw"}));
    compare(
        json!({"size": 1 << 20, "backing-file": "nowhere", "backing-fmt": "raw",
        "cluster-size": 512}),
    );
    compare(
        json!({"size": 1 << 20, "backing-file": "n", "backing-fmt": "raw",
        "version": "v2"}),
    );
}

#[test]
fn preallocated_images_equal_those_of_qemu_img() {
    if !requires(&["qemu-img"]) {
        return;
    }
    for mode in ["metadata", "falloc", "full"] {
        for size in [0_u64, 512, 1_024_000, 10 << 20] {
            compare(json!({"size": size, "preallocation": mode}));
            compare(json!({"size": size, "preallocation": mode, "version": "v2"}));
            compare(json!({"size": size, "preallocation": mode, "extended-l2": true}));
            compare(json!({"size": size, "preallocation": mode, "data-file": "d.raw"}));
            compare(
                json!({"size": size, "preallocation": mode, "data-file": "d.raw",
                "data-file-raw": true}),
            );
            compare(
                json!({"size": size, "preallocation": mode, "data-file": "d.raw",
                "extended-l2": true}),
            );
        }
    }
    compare(json!({"size": 1_u64 << 30, "preallocation": "metadata"}));
    compare(json!({"size": 40_u64 << 30, "preallocation": "metadata"}));
    compare(json!({"size": 1 << 20, "data-file": "d.raw", "data-file-raw": true}));
}

#[test]
fn qemu_io_writes_and_reads_created_images() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for mut options in [
        json!({}),
        json!({"version": "v2", "preallocation": "metadata"}),
        json!({"extended-l2": true, "preallocation": "metadata"}),
        json!({"cluster-size": 512, "refcount-bits": 1, "preallocation": "metadata"}),
        json!({"cluster-size": 4096, "refcount-bits": 64, "lazy-refcounts": true}),
        json!({"data-file": "d.raw", "data-file-raw": true}),
        json!({"compression-type": "zstd", "preallocation": "full"}),
    ] {
        options["size"] = json!(3 << 20);
        let dir = tempfile::tempdir().unwrap();
        create_ours(dir.path(), &options);
        let commands = [
            "read -P 0 0 3M",
            "write -P 5 12345 1000000",
            "write -P 6 3145000 728",
            "read -P 0 0 12345",
            "read -P 5 12345 1000000",
            "read -P 6 3145000 728",
            "write -z 65536 65536",
            "read -P 0 65536 65536",
        ];
        qemu_io(dir.path(), "image", &commands.map(String::from));
        let (code, report) = qemu_check(dir.path(), "image").unwrap();
        assert_eq!(code, 0, "{options}: {report}");
    }
}

#[test]
fn creation_that_is_cut_short_leaves_no_image() {
    for mode in ["off", "metadata"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = json!({"size": 10 << 20, "preallocation": mode}).to_string();
        Host::open(&[&path]).cut_before_mapping(|txn| Qcow2::create(txn, &options));
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[..65536].iter().all(|b| *b == 0));
        assert!(bytes.len() > 65536);
    }
}

#[test]
fn old_bytes_of_a_device_do_not_show() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for options in [
        json!({"size": 1 << 20}),
        json!({"size": 1 << 20, "preallocation": "metadata"}),
        json!({"size": 1 << 20, "cluster-size": 512, "preallocation": "metadata"}),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), vec![0xee; 3 << 20]).unwrap();
        create_ours(dir.path(), &options);
        let (code, report) = qemu_check(dir.path(), "image").unwrap();
        assert_eq!(code, 0, "{options}: {report}");
        qemu_io(dir.path(), "image", &["read -P 0 0 1M".to_owned()]);
    }
}

#[test]
fn huge_images_stay_small_transactions_or_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut host = Host::open(&[&path]);
    let mut create = |options: Value| {
        host.call(|txn| Qcow2::create(txn, &options.to_string()))
            .map_err(|e| e.message)
    };
    create(json!({"size": 64_u64 << 40})).unwrap();
    let refusal = create(json!({"size": 64_u64 << 40, "preallocation": "metadata"})).unwrap_err();
    assert!(
        refusal.contains("MiB of tables in one transaction"),
        "{refusal}"
    );
    let refusal = create(json!({"size": 1_u64 << 40, "cluster-size": 512})).unwrap_err();
    assert!(
        refusal.contains("too large for file format 'qcow2'"),
        "{refusal}"
    );
    let refusal = create(json!({"size": u64::MAX - 511})).unwrap_err();
    assert!(
        refusal.contains("too large for file format 'qcow2'"),
        "{refusal}"
    );
    assert!(host.queued_bytes_max < 1 << 20, "{}", host.queued_bytes_max);
}

#[test]
fn a_missing_data_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut host = Host::open(&[&path]);
    let options = json!({"size": 1 << 20, "data-file": "d.raw"}).to_string();
    host.call(|txn| Qcow2::create(txn, &options)).unwrap_err();
    assert_eq!(path.metadata().unwrap().len(), 0);
}

#[test]
fn refusals_are_those_of_qemu_img() {
    if !requires(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), vec![0; 1 << 20]).unwrap();
    for options in [
        json!({"cluster-size": 1000}),
        json!({"cluster-size": 256}),
        json!({"cluster-size": 4 << 20}),
        json!({"refcount-bits": 3}),
        json!({"refcount-bits": 128}),
        json!({"version": "v2", "lazy-refcounts": true}),
        json!({"version": "v2", "refcount-bits": 8}),
        json!({"version": "v2", "compression-type": "zstd"}),
        json!({"version": "v2", "extended-l2": true}),
        json!({"version": "v2", "data-file": "d.raw"}),
        json!({"extended-l2": true, "cluster-size": 8192}),
        json!({"data-file-raw": true}),
        json!({"backing-fmt": "raw"}),
        json!({"compression-type": "lzma"}),
        json!({"preallocation": "some"}),
        json!({"backing-file": "base", "backing-fmt": "raw", "preallocation": "full"}),
        json!({"backing-file": "base", "backing-fmt": "raw", "data-file": "d.raw",
            "data-file-raw": true}),
    ] {
        let list = qemu_img_options(&options);
        let args = ["create", "-q", "-f", "qcow2", "-o", &list, "image", "1M"];
        let (code, _, theirs) = run(dir.path(), "qemu-img", &args);
        assert_eq!(code, 1, "{options}");
        let mut options = options;
        options["size"] = json!(1 << 20);
        let mut host = Host::open(&[&dir.path().join("ours")]);
        let ours = host
            .call(|txn| Qcow2::create(txn, &options.to_string()))
            .unwrap_err()
            .message;
        assert_eq!(format!("qemu-img: image: {ours}\n"), theirs, "{options}");
    }
}

#[test]
fn measure_equals_qemu_img_measure() {
    if !requires(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let variants = [
        json!({}),
        json!({"version": "v2"}),
        json!({"cluster-size": 512}),
        json!({"cluster-size": 4096, "refcount-bits": 64}),
        json!({"cluster-size": 2 << 20}),
        json!({"refcount-bits": 1}),
        json!({"extended-l2": true}),
        json!({"cluster-size": 512, "refcount-bits": 64}),
        json!({"preallocation": "metadata"}),
        json!({"preallocation": "falloc"}),
        json!({"preallocation": "full"}),
        json!({"data-file": "d.raw"}),
        json!({"backing-file": "base"}),
    ];
    for options in variants {
        let list = qemu_img_options(&options);
        for size in [
            0_u64,
            1,
            512,
            1000,
            1 << 20,
            10 << 20,
            33_554_432,
            1 << 30,
            77 << 30,
            1 << 40,
            5 << 44,
            1 << 50,
            1 << 56,
            1 << 61,
        ] {
            let text = format!("{size}");
            let mut args = vec!["measure", "-O", "qcow2", "--output=json", "--size", &text];
            if !list.is_empty() {
                args.extend(["-o", &list]);
            }
            let (code, theirs, err) = run(dir.path(), "qemu-img", &args);
            let mut options = options.clone();
            options["size"] = json!(size);
            let ours = Qcow2::measure(&options.to_string());
            if code != 0 {
                assert!(err.contains("too large"), "{list}: {err}");
                assert!(ours.unwrap_err().message.contains("too large"), "{options}");
                continue;
            }
            let ours = ours.unwrap();
            let theirs: Value = serde_json::from_str(&theirs).unwrap();
            assert_eq!(
                json!({"required": ours.required, "fully-allocated": ours.fully_allocated}),
                theirs,
                "{options}"
            );
        }
    }
}
