//! Maps of images that are large and mostly empty: larger than what the daemon remembers of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use outport_tests::{Daemon, eventually, qemu_img, requires, run};
use serde_json::{Value, json};

/// Sizes that no extent map can hold, with the cluster sizes that virtualisation platforms use.
const LARGE: [(&str, u64, &str); 6] = [
    ("16T", 16 << 40, "cluster_size=2M"),
    ("5T", 5 << 40, "cluster_size=1M"),
    ("20G", 20 << 30, "cluster_size=128k,extended_l2=on"),
    ("1T", 1 << 40, "cluster_size=128k,extended_l2=on"),
    ("63T", 63 << 40, "cluster_size=64k"),
    ("64G", 64 << 30, "cluster_size=512"),
];

/// Where data is, by a map of qemu-img or nbdinfo; neighbours joined.
fn data(map: &Value, offset: &str, is_data: impl Fn(&Value) -> bool) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in map.as_array().unwrap().iter().filter(|it| is_data(it)) {
        let start = extent[offset].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}

#[test]
fn a_giant_that_is_mostly_empty_has_a_map() {
    if !["qemu-img", "qemu-io", "nbdinfo"]
        .iter()
        .all(|tool| requires(tool))
    {
        return;
    }
    for (size, bytes, options) in LARGE {
        let mut daemon = Daemon::start();
        let path = |name: &str| daemon.path(name).to_str().unwrap().to_owned();
        let (base, top) = (path("base.qcow2"), path("top.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &base, size]);
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top,
        ]);
        let empty = json!({"driver": "qcow2", "node-name": "empty", "read-only": true,
            "file": {"driver": "file", "filename": base}});
        daemon.qmp.ok("blockdev-add", empty);
        daemon.add_export("empty", false);
        let map = run("nbdinfo", &["--map", "--json", &daemon.uri("empty")]);
        let map: Value = serde_json::from_str(&map).unwrap();
        assert_eq!(
            data(&map, "offset", |it| it["type"] == 0),
            [],
            "{size} {options}"
        );
        // The daemon may not have seen yet that nbdinfo is gone.
        eventually("the export is free", || {
            let id = json!({"id": "empty"});
            daemon.qmp.execute("block-export-del", id).ok()
        });
        daemon.qmp.ok("blockdev-del", json!({"node-name": "empty"}));

        let writes: Vec<String> = (0..5)
            .map(|part| format!("write {} 64k", (bytes / 5 * part) >> 21 << 21))
            .collect();
        let mut args = vec!["-f", "qcow2"];
        args.extend(writes.iter().flat_map(|write| ["-c", write.as_str()]));
        args.push(&base);
        run("qemu-io", &args);
        for (image, backing) in [(&base, Value::Null), (&top, json!("below"))] {
            let node = json!({"driver": "qcow2", "node-name": if backing.is_null() { "below" }
                else { "disk" }, "read-only": true, "backing": backing,
                "file": {"driver": "file", "filename": image}});
            daemon.qmp.ok("blockdev-add", node);
        }
        daemon.add_export("disk", false);
        let uri = daemon.uri("disk");
        let oracle = qemu_img(&["map", "-U", "-f", "qcow2", "--output=json", &top]);
        let oracle: Value = serde_json::from_str(&oracle).unwrap();
        let want = data(&oracle, "start", |it| it["data"] == true);
        assert_eq!(want.len(), 5);
        let map = run("nbdinfo", &["--map", "--json", &uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        assert_eq!(
            data(&map, "offset", |it| it["type"] == 0),
            want,
            "{size} {options}"
        );
        let map = qemu_img(&["map", "-f", "raw", "--output=json", &uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        assert_eq!(
            data(&map, "start", |it| it["data"] == true),
            want,
            "{size} {options}"
        );
        daemon.stop();
    }
}
