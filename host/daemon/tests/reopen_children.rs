//! `blockdev-reopen` of what has children: filters, and images in another file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::*;

fn reopen(options: Value) -> (&'static str, Value) {
    ("blockdev-reopen", json!({"options": [options]}))
}

fn add(options: Value) -> (&'static str, Value) {
    ("blockdev-add", options)
}

fn throttle(file: &str, group: &str) -> Value {
    json!({"driver": "throttle", "node-name": "t", "file": file, "throttle-group": group})
}

fn group(id: &str, limits: Value) -> (&'static str, Value) {
    let group = json!({"qom-type": "throttle-group", "id": id, "limits": limits});
    ("object-add", group)
}

#[test]
fn filters_are_exchanged_as_in_qsd() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["a", "b"] {
        file(path(name).as_ref(), 1 << 20);
    }
    let node = |name: &str| {
        let filename = path(name);
        json!({"driver": "file", "node-name": name, "filename": filename})
    };
    let inline = json!({"driver": "file", "filename": path("a")});
    let copy = |file: &str| json!({"driver": "copy-on-read", "node-name": "c", "file": file});
    let shared = |share: Value| with(node("a"), &share);
    same(&[
        group("g", json!({})),
        group("g2", json!({})),
        add(node("a")),
        add(node("b")),
        add(throttle("a", "g")),
        reopen(throttle("b", "g")),
        ("blockdev-del", json!({"node-name": "b"})),
        reopen(throttle("a", "g2")),
        ("object-del", json!({"id": "g2"})),
        ("object-del", json!({"id": "g"})),
        reopen(throttle("a", "none")),
        reopen(throttle("t", "g2")),
        reopen(throttle("zz", "g2")),
        reopen(with(throttle("a", "g2"), &json!({"file": inline}))),
        reopen(with(throttle("a", "g2"), &json!({"read-only": true}))),
        reopen(throttle("a", "g2")),
        ("blockdev-del", json!({"node-name": "t"})),
        // An inline child goes with its last use.
        add(with(throttle("a", "g2"), &json!({"file": inline}))),
        reopen(throttle("b", "g2")),
        reopen(with(throttle("a", "g2"), &json!({"file": inline}))),
        ("blockdev-del", json!({"node-name": "t"})),
        // What QSD does not reopen.
        add(copy("a")),
        reopen(copy("b")),
        reopen(copy("a")),
        ("blockdev-del", json!({"node-name": "c"})),
        // Who locks is settled when a node is opened.
        reopen(shared(json!({"force-share": true}))),
        reopen(shared(json!({"force-share": true, "read-only": true}))),
        reopen(shared(json!({"read-only": true}))),
        ("blockdev-del", json!({"node-name": "a"})),
        add(shared(json!({"force-share": true, "read-only": true}))),
        reopen(shared(json!({"read-only": true}))),
        reopen(shared(json!({"force-share": false, "read-only": true}))),
        reopen(shared(json!({}))),
    ]);
}

#[test]
fn images_change_their_file_as_in_qsd() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("base"), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", &path("one"), "1M"]);
    std::fs::copy(path("one"), path("two")).unwrap();
    let backing = ["-b", &path("base"), "-F", "qcow2"];
    let create = ["create", "-q", "-f", "qcow2"];
    qemu_img(&[&create[..], &backing[..], &[&path("top")]].concat());
    let node = |name: &str| {
        let filename = path(name);
        json!({"driver": "file", "node-name": name, "filename": filename})
    };
    let image = |file: &str| json!({"driver": "qcow2", "node-name": "q", "file": file});
    let over = |backing: Value| with(image("top"), &json!({"backing": backing}));
    same(&[
        group("g", json!({})),
        add(node("one")),
        add(node("two")),
        add(image("one")),
        add(throttle("one", "g")),
        reopen(image("t")),
        ("blockdev-del", json!({"node-name": "t"})),
        reopen(image("one")),
        ("blockdev-del", json!({"node-name": "t"})),
        reopen(image("two")),
        ("blockdev-del", json!({"node-name": "one"})),
        ("blockdev-del", json!({"node-name": "two"})),
        reopen(image("q")),
        reopen(image("zz")),
        reopen(with(image("two"), &json!({"backing": null}))),
        ("blockdev-del", json!({"node-name": "q"})),
        // A backing node has to be told where the image names one.
        add(node("top")),
        add(json!({"driver": "qcow2", "node-name": "base", "file": node("two")})),
        ("blockdev-del", json!({"node-name": "two"})),
        add(json!({"driver": "qcow2", "node-name": "base", "file": "two"})),
        add(over(json!("base"))),
        reopen(image("top")),
        reopen(over(json!(""))),
        reopen(over(Value::Null)),
        reopen(image("top")),
        reopen(over(json!("base"))),
        ("blockdev-del", json!({"node-name": "base"})),
    ]);
}

/// A daemon with a writable export of a qcow2 image of 16 MiB, whose file is node `f`.
fn serving() -> (Daemon, Qmp) {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qemu_img(&["create", "-q", "-f", "qcow2", &daemon.text("disk"), "16M"]);
    let disk = json!({"driver": "file", "node-name": "f", "filename": daemon.text("disk")});
    qmp.ok("blockdev-add", disk);
    qmp.ok("blockdev-add", image("f"));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "q", "name": "e", "writable": true});
    qmp.ok("block-export-add", export);
    (daemon, qmp)
}

fn image(file: &str) -> Value {
    json!({"driver": "qcow2", "node-name": "q", "file": file})
}

/// Runs a program of QEMU's on the export; whether it succeeded.
fn on_export(daemon: &Daemon, program: &str, args: &[&str]) -> bool {
    let uri = format!("nbd+unix:///e?socket={}", daemon.text("nbd"));
    let mut command = Command::new(program);
    command.args(args).arg(uri).stdout(Stdio::null());
    command.status().unwrap().success()
}

#[test]
fn a_throttle_comes_and_goes_below_an_image_under_a_writing_client() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (mut daemon, mut qmp) = serving();
    qmp.ok("object-add", group("g", json!({"iops-write": 5_000})).1);
    let bench = [
        "bench",
        "-f",
        "raw",
        "-t",
        "none",
        "-d",
        "16",
        "-w",
        "--pattern=7",
        "-c",
        "16384",
        "-s",
        "4096",
    ];
    let changes = std::thread::scope(|scope| {
        let client = scope.spawn(|| on_export(&daemon, "qemu-img", &bench));
        let mut changes = 0;
        while !client.is_finished() {
            qmp.ok("blockdev-add", throttle("f", "g"));
            qmp.ok("blockdev-reopen", json!({"options": [image("t")]}));
            let error = qmp.err("blockdev-del", json!({"node-name": "t"}));
            assert_eq!(error, "Block device t is in use");
            qmp.ok("blockdev-reopen", json!({"options": [image("f")]}));
            qmp.ok("blockdev-del", json!({"node-name": "t"}));
            changes += 1;
        }
        assert!(client.join().unwrap(), "no request failed");
        changes
    });
    assert!(changes > 3, "{changes} changes");
    let read = ["-r", "-f", "raw", "-c", "read -P 7 0 16M"];
    assert!(on_export(&daemon, "qemu-io", &read));
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());
    qemu_img(&["check", "-q", &daemon.text("disk")]);
}

#[test]
fn another_node_comes_below_a_throttle_under_a_writing_client() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (mut daemon, mut qmp) = serving();
    qmp.ok("object-add", group("g", json!({"iops-write": 5_000})).1);
    qmp.ok("object-add", group("g2", json!({"iops-write": 9})).1);
    qmp.ok("blockdev-add", throttle("f", "g"));
    qmp.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "f"}),
    );
    qmp.ok("blockdev-reopen", json!({"options": [image("t")]}));
    let bench = [
        "bench",
        "-f",
        "raw",
        "-t",
        "none",
        "-d",
        "16",
        "-w",
        "--pattern=7",
        "-c",
        "8192",
        "-s",
        "4096",
    ];
    let changes = std::thread::scope(|scope| {
        let client = scope.spawn(|| on_export(&daemon, "qemu-img", &bench));
        let mut changes = 0;
        while !client.is_finished() {
            for (file, group) in [("r", "g"), ("r", "g2"), ("f", "g2"), ("f", "g")] {
                let options = throttle(file, group);
                qmp.ok("blockdev-reopen", json!({"options": [options]}));
            }
            changes += 1;
        }
        assert!(client.join().unwrap(), "no request failed");
        changes
    });
    assert!(changes > 3, "{changes} changes");
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());
    qemu_img(&["check", "-q", &daemon.text("disk")]);
}

#[test]
fn a_file_that_is_no_image_is_refused_and_the_image_stays() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (daemon, mut qmp) = serving();
    let write = ["-f", "raw", "-c", "write -P 5 0 64k"];
    assert!(on_export(&daemon, "qemu-io", &write));
    file(&daemon.path("raw"), 1 << 20);
    let raw = json!({"driver": "file", "node-name": "raw", "filename": daemon.text("raw")});
    qmp.ok("blockdev-add", raw);
    // QSD does not look at the new file, and writes the old one's metadata there.
    let error = qmp.err("blockdev-reopen", json!({"options": [image("raw")]}));
    assert_eq!(error, "Image is not in qcow2 format");
    qmp.ok("blockdev-del", json!({"node-name": "raw"}));
    let read = [
        "-f",
        "raw",
        "-c",
        "read -P 5 0 64k",
        "-c",
        "write -P 6 0 64k",
    ];
    assert!(on_export(&daemon, "qemu-io", &read));
}

#[test]
fn iothreads_do_not_move_under_exports_that_are_fixed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["a", "b"] {
        file(path(name).as_ref(), 1 << 20);
    }
    let node = |name: &str| {
        let filename = path(name);
        add(json!({"driver": "file", "node-name": name, "filename": filename}))
    };
    let raw = |file: &str| json!({"driver": "raw", "node-name": "r", "file": file});
    let export = |id: &str, node: &str, more: Value| {
        let export = json!({"type": "nbd", "id": id, "node-name": node, "name": id});
        ("block-export-add", with(export, &more))
    };
    let fixed = |iothread: &str| json!({"iothread": iothread, "fixed-iothread": true});
    let set = |arguments: Value| ("x-blockdev-set-iothread", arguments);
    let iothread = |id: &str| ("object-add", json!({"qom-type": "iothread", "id": id}));
    let address = json!({"type": "unix", "data": {"path": path("nbd")}});
    same(&[
        ("nbd-server-start", json!({"addr": address})),
        iothread("i0"),
        iothread("i1"),
        node("a"),
        node("b"),
        // Of nodes that nobody uses.
        set(json!({"node-name": "a", "iothread": "i0"})),
        set(json!({"node-name": "a", "iothread": null})),
        set(json!({"node-name": "a", "iothread": ""})),
        set(json!({"node-name": "a", "iothread": "zz"})),
        set(json!({"node-name": "zz", "iothread": "i0"})),
        set(json!({"node-name": "a"})),
        set(json!({"node-name": "a", "iothread": 7})),
        // Of one that an export uses, which may move.
        export("e0", "a", json!({"iothread": "i1"})),
        set(json!({"node-name": "a", "iothread": "i0"})),
        set(json!({"node-name": "a", "iothread": "zz", "force": false})),
        set(json!({"node-name": "a", "iothread": "i0", "force": true})),
        ("block-export-del", json!({"id": "e0"})),
        // Exports that may not.
        export("e1", "a", fixed("i0")),
        export("e2", "a", fixed("i1")),
        export("e3", "a", json!({"iothread": "i1"})),
        set(json!({"node-name": "a", "iothread": "i1", "force": true})),
        set(json!({"node-name": "a", "iothread": "i0", "force": true})),
        add(raw("b")),
        export("e4", "b", fixed("i1")),
        reopen(raw("a")),
        add(json!({"driver": "raw", "node-name": "s", "file": "a"})),
        export("e5", "s", fixed("i1")),
        export("e6", "s", fixed("i0")),
        reopen(raw("b")),
    ]);
}

#[test]
fn an_export_without_iothread_is_served_by_that_of_its_node() {
    let daemon = Daemon::start(&["--object", "iothread,id=i0"]);
    let mut qmp = daemon.qmp();
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n"}),
    );
    let to = |iothread: Value| json!({"node-name": "n", "iothread": iothread, "force": true});
    qmp.ok("x-blockdev-set-iothread", to(json!("i0")));
    qmp.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "n"}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "r"});
    qmp.ok("block-export-add", export);
    let in_use = qmp.err("object-del", json!({"id": "i0"}));
    assert_eq!(in_use, "object 'i0' is in use, can not be deleted");
    qmp.ok("block-export-del", json!({"id": "e"}));
    qmp.ok("x-blockdev-set-iothread", to(Value::Null));
    qmp.ok("object-del", json!({"id": "i0"}));
}
