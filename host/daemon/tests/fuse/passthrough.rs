//! Passthrough: what it needs, what it does, what it holds up.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::json;

use super::support::*;
use super::{Bench, mountable};

#[test]
fn passthrough_needs_a_read_only_export_of_a_whole_file() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 8192]);
    for node in [
        json!({"driver": "raw", "node-name": "part", "file": "f", "offset": 512}),
        json!({"driver": "blkdebug", "node-name": "filter", "image": "f"}),
        json!({"driver": "null-co", "node-name": "null"}),
    ] {
        bench.qmp.ok("blockdev-add", node);
    }
    for (node, why) in [
        ("part", "it shows only a part of its file"),
        (
            "filter",
            "it is not raw, so its bytes are not those of a file",
        ),
        (
            "null",
            "it is not raw, so its bytes are not those of a file",
        ),
    ] {
        let more = json!({"node-name": node, "passthrough": true});
        let refused = bench.arguments("e", "m", &more);
        let refused = bench.qmp.err("block-export-add", refused);
        assert_eq!(
            refused,
            format!("Node '{node}' cannot be passed through: {why}")
        );
    }
    let refused = bench.arguments("e", "m", &json!({"passthrough": true, "writable": true}));
    assert_eq!(
        bench.qmp.err("block-export-add", refused),
        "Parameter 'passthrough' needs a read-only export: writes would bypass the node"
    );
    assert_eq!(bench.mounts(), 0);
}

#[test]
fn passed_through_reads_do_not_reach_the_daemon() {
    if !mountable() {
        return;
    }
    let content: Vec<u8> = (0..100_000_u32).map(|at| (at / 7) as u8).collect();
    let mut bench = Bench::new(&content);
    bench.export(&json!({"passthrough": true}));
    assert_eq!(fs::read(bench.path()).unwrap(), content);
    let file = File::open(bench.path()).unwrap();
    let reads = |qmp: &mut Qmp| {
        let stats = qmp.ok("query-export-stats", json!({}));
        stats[0]["rd-operations"].as_u64().unwrap()
    };
    if bench.daemon.log().contains("no passthrough") {
        assert!(
            reads(&mut bench.qmp) > 0,
            "the kernel refuses: served as ever"
        );
        return;
    }
    assert_eq!(reads(&mut bench.qmp), 0);

    // While it is open the node stays what it is.
    let reopen = json!({"options": [{"driver": "raw", "node-name": "n", "file": "f",
        "offset": 512}]});
    let refused = bench.qmp.err("blockdev-reopen", reopen.clone());
    assert!(refused.contains("'passthrough' is open"), "{refused}");
    let refused = bench.qmp.err("block-export-del", json!({"id": "e"}));
    assert_eq!(refused, "export 'e' still in use");
    drop(file);
    eventually("it is closed", || {
        bench.qmp.ok("query-export-stats", json!({}))[0]["clients"] == 0
    });
    bench.qmp.ok("blockdev-reopen", reopen);
    bench.remove("safe");
}

#[test]
fn what_others_write_is_seen_through() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 8192]);
    bench.export(&json!({"passthrough": true}));
    let file = File::open(bench.path()).unwrap();
    let mut data = [0; 16];
    file.read_exact_at(&mut data, 4090).unwrap();
    assert_eq!(data, [3; 16]);
    let other = bench.daemon.text("other");
    fs::write(&other, "").unwrap();
    let writer = bench.arguments("w", "other", &json!({"writable": true}));
    bench.qmp.ok("block-export-add", writer);
    let writer = File::options().write(true).open(&other).unwrap();
    writer.write_all_at(&[4; 16], 4090).unwrap();
    file.read_exact_at(&mut data, 4090).unwrap();
    assert_eq!(data, [4; 16]);
}
