//! `throttle`, `compress` and `copy-on-read`: sentences compared with QSD's, content with
//! qemu-img's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::*;

fn with(mut options: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    options.as_object_mut().unwrap().extend(more);
    options
}

fn null() -> (&'static str, Value) {
    let options = json!({"driver": "null-co", "node-name": "f", "size": 1 << 20});
    ("blockdev-add", options)
}

fn filter(driver: &str, name: &str, more: Value) -> (&'static str, Value) {
    (
        "blockdev-add",
        with(json!({"driver": driver, "node-name": name}), more),
    )
}

#[test]
fn errors_are_those_of_qsd() {
    let mut requests = vec![null()];
    let limits = [
        json!({"iops-total": 100, "iops-read": 5}),
        json!({"iops-total": -1}),
        json!({"iops-total": 2_000_000_000_000_000_u64}),
        json!({"iops-total-max": 100}),
        json!({"iops-total": 100, "iops-total-max": 50}),
        json!({"iops-total": 100, "iops-total-max-length": 5}),
        json!({"iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 0}),
        json!({"iops-total": 100, "iops-total-max": 200,
            "iops-total-max-length": 10_000_000_000_u64}),
        json!({"iops-size": 4096}),
        json!({"iops-total": 100, "iops-size": 4096, "bps-read": 1000, "bps-write": 10}),
        json!({"bps-total-max-length": 0}),
        json!({"bps-total": 1000, "bps-total-max": 900_000_000_000_000_u64,
            "bps-total-max-length": 50}),
        json!({"bps-total": 1000, "bps-read-max": 2000}),
        json!({"iops-zz": 50}),
        json!(5),
        json!({"iops-total": "x"}),
        json!({"iops-size": -4}),
    ];
    let mut groups: Vec<_> = limits.into_iter().map(|it| json!({"limits": it})).collect();
    groups.extend([
        json!({}),
        json!({"x-iops-total": 100}),
        json!({"x-iops-total": -1}),
        json!({"x-iops-total": 100, "limits": {"iops-total": 50}}),
        json!({"x-iops-total-max-length": 10_000_000_000_u64}),
        json!({"x-iops-total-max-length": 0}),
        json!({"x-iops-total": 100, "x-iops-read": 3}),
    ]);
    for (number, group) in groups.into_iter().enumerate() {
        let object = json!({"qom-type": "throttle-group", "id": format!("g{number}")});
        requests.push(("object-add", with(object, group)));
    }
    let object = json!({"qom-type": "throttle-group", "id": "tg"});
    requests.extend([
        ("object-add", object.clone()),
        ("object-add", object),
        filter("throttle", "n1", json!({"file": "f"})),
        filter(
            "throttle",
            "n1",
            json!({"file": "f", "throttle-group": "nosuch"}),
        ),
        filter(
            "throttle",
            "n1",
            json!({"file": "f", "throttle-group": "tg"}),
        ),
        filter(
            "throttle",
            "n2",
            json!({"file": "f", "throttle-group": "tg"}),
        ),
        filter(
            "throttle",
            "n3",
            json!({"file": "zz", "throttle-group": "tg"}),
        ),
        filter(
            "throttle",
            "n4",
            json!({"file": "zz", "throttle-group": "nosuch"}),
        ),
        ("object-del", json!({"id": "tg"})),
        ("blockdev-del", json!({"node-name": "n1"})),
        ("object-del", json!({"id": "tg"})),
        ("blockdev-del", json!({"node-name": "n2"})),
        ("object-del", json!({"id": "tg"})),
        filter("compress", "c1", json!({"file": "f"})),
        filter("compress", "c2", json!({})),
        filter("copy-on-read", "r1", json!({"file": "f"})),
        filter(
            "copy-on-read",
            "r2",
            json!({"file": "f", "bottom": "nosuch"}),
        ),
        filter("copy-on-read", "r3", json!({"file": "f", "bottom": "f"})),
        filter("copy-on-read", "r4", json!({"file": "f", "bottom": "r1"})),
        filter(
            "copy-on-read",
            "r5",
            json!({"file": "f", "read-only": true}),
        ),
        ("blockdev-del", json!({"node-name": "f"})),
    ]);
    same(&requests);
}

fn qemu_io(socket: &Path, requests: &[&str]) -> String {
    let commands = requests.iter().flat_map(|request| ["-c", request]);
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "-t", "none"])
        .arg(format!("nbd+unix:///e?socket={}", socket.display()))
        .args(commands)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exports a node as `e`.
fn export(daemon: &Daemon, qmp: &mut Qmp, node: &str) -> std::path::PathBuf {
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": true}),
    );
    daemon.path("nbd")
}

/// Ends the export and deletes the node: the image is closed.
fn close(qmp: &mut Qmp, node: &str) {
    qmp.ok("nbd-server-stop", json!({}));
    qmp.ok("blockdev-del", json!({"node-name": node}));
}

#[track_caller]
fn contents_are(image: &str, raw: &str) {
    qemu_img(&["check", "-q", image]);
    qemu_img(&["compare", "-q", "-F", "raw", image, raw]);
}

#[test]
fn a_throttled_request_waits_and_its_export_ends_all_the_same() {
    if !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    // One request fills the bucket for hours.
    let limits = json!({"iops-write": 1, "iops-size": 1});
    let group = json!({"qom-type": "throttle-group", "id": "tg", "limits": limits});
    qmp.ok("object-add", group);
    qmp.ok(null().0, null().1);
    let (command, options) = filter(
        "throttle",
        "t",
        json!({"file": "f", "throttle-group": "tg"}),
    );
    qmp.ok(command, options);
    let raw = json!({"driver": "raw", "node-name": "r", "file": "t"});
    qmp.ok("blockdev-add", raw);
    let socket = export(&daemon, &mut qmp, "r");
    qemu_io(&socket, &["write 0 64k", "read 0 64k"]);
    let mut waiting = Command::new("qemu-io")
        .args(["-f", "raw", "-t", "none"])
        .arg(format!("nbd+unix:///e?socket={}", socket.display()))
        .args(["-c", "write 0 4k"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Reads have no limit and others go on.
    for _ in 0..10 {
        qemu_io(&socket, &["read 0 64k", "flush"]);
        qmp.ok("query-named-block-nodes", json!({}));
    }
    assert!(waiting.try_wait().unwrap().is_none(), "the write waits");
    close(&mut qmp, "r");
    waiting.wait().unwrap();
    qmp.ok("blockdev-del", json!({"node-name": "t"}));
    qmp.ok("object-del", json!({"id": "tg"}));
}

#[test]
fn what_is_written_through_compress_is_stored_compressed() {
    if !has("qemu-io") || !has("qemu-img") {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let daemon = Daemon::start(&[]);
        let mut qmp = daemon.qmp();
        let (image, raw) = (daemon.text("image"), daemon.text("raw"));
        let options = format!("compression_type={kind}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &image, "4M"]);
        file(Path::new(&raw), 4 << 20);
        let file = json!({"driver": "file", "filename": image});
        let qcow2 = json!({"driver": "qcow2", "file": file, "discard": "unmap"});
        let (command, options) = filter("compress", "c", json!({"file": qcow2}));
        qmp.ok(command, options);
        let socket = export(&daemon, &mut qmp, "c");
        // Whole clusters, parts of them, the same one twice, zeroes.
        let writes = [
            "write -P 1 0 1M",
            "write -P 2 1000k 100k",
            "write -P 3 100 5000",
            "write -P 4 1536k 4k",
            "write -P 5 1540k 4k",
            "write -z 512k 128k",
            "write -P 6 4190208 4096",
        ];
        qemu_io(&socket, &writes);
        let commands = writes.iter().flat_map(|write| ["-c", write]);
        let done = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(commands)
            .arg(&raw)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        close(&mut qmp, "c");
        contents_are(&image, &raw);
        let map = Command::new("qemu-img")
            .args(["map", "--output=json", &image])
            .output()
            .unwrap();
        let map: Value = serde_json::from_slice(&map.stdout).unwrap();
        let first = &map[0];
        assert_eq!(first["compressed"], json!(true), "{kind}: {map}");
    }
}

/// A chain of three, with its own data in each; what a client reads of it.
fn chain(daemon: &Daemon) -> String {
    let path = |name: &str| daemon.text(name);
    let (base, mid, top, raw) = (path("base"), path("mid"), path("top"), path("raw"));
    qemu_img(&["create", "-q", "-f", "qcow2", &base, "4M"]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &mid,
    ]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &mid, "-F", "qcow2", &top,
    ]);
    for (image, write) in [
        (&base, "write -P 1 0 2M"),
        (&mid, "write -P 2 1M 256k"),
        (&top, "write -P 3 128k 64k"),
    ] {
        let done = Command::new("qemu-io")
            .args(["-c", write, image])
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }
    qemu_img(&["convert", "-O", "raw", &top, &raw]);
    top
}

/// The layer (0: the top) that each 64 KiB of an image lies in.
fn depths(image: &str) -> Vec<Option<u64>> {
    let map = Command::new("qemu-img")
        .args(["map", "--output=json", image])
        .output()
        .unwrap();
    let map: Value = serde_json::from_slice(&map.stdout).unwrap();
    let mut depths = vec![None; 64];
    for run in map.as_array().unwrap() {
        let number = |name: &str| run[name].as_u64().unwrap();
        let units = number("start") >> 16..(number("start") + number("length")) >> 16;
        for unit in units {
            let data = run["data"] == json!(true);
            depths[unit as usize] = data.then(|| number("depth"));
        }
    }
    depths
}

#[test]
fn what_was_read_stays_in_the_image() {
    if !has("qemu-io") || !has("qemu-img") {
        return;
    }
    for bottom in [None, Some("mid")] {
        let daemon = Daemon::start(&["--allow-paths", "{}"]);
        let mut qmp = daemon.qmp();
        let top = chain(&daemon);
        let before = depths(&top);
        let file = |name: &str| json!({"driver": "file", "filename": daemon.text(name)});
        let qcow2 = |name: &str, backing: Value| {
            let image = json!({"driver": "qcow2", "node-name": name});
            with(image, json!({"file": file(name), "backing": backing}))
        };
        let nodes = qcow2("top", qcow2("mid", qcow2("base", Value::Null)));
        let mut options = json!({"file": nodes});
        if let Some(bottom) = bottom {
            options["bottom"] = bottom.into();
        }
        let (command, options) = filter("copy-on-read", "c", options);
        qmp.ok(command, options);
        let socket = export(&daemon, &mut qmp, "c");
        let reads = [
            "read -P 1 10k 4k",
            "read -P 2 1M 100k",
            "read -P 1 1344k 4k",
            "read 3M 64k",
        ];
        qemu_io(&socket, &reads);
        // Again, from the image now; and beside a write.
        qemu_io(
            &socket,
            &["read -P 1 10k 4k", "write -P 1 64k 4k", "read -P 1 64k 64k"],
        );
        close(&mut qmp, "c");
        contents_are(&top, &daemon.text("raw"));
        let mut want = before;
        let copied = match bottom {
            None => vec![0, 1, 16, 17, 21],
            Some(_) => vec![1, 16, 17],
        };
        for unit in copied {
            want[unit] = Some(0);
        }
        assert_eq!(depths(&top), want, "{bottom:?}");
    }
}
