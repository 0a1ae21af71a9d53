//! `blockdev-reopen`: QSD's sentences, and changes under the feet of clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use support::*;

fn reopen(options: Value) -> (&'static str, Value) {
    ("blockdev-reopen", json!({"options": [options]}))
}

fn add(options: Value) -> (&'static str, Value) {
    ("blockdev-add", options)
}

#[test]
fn errors_are_those_of_qsd() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    file(Path::new(&path("raw")), 4 << 20);
    let f = |more: Value| {
        with(
            json!({"driver": "file", "node-name": "f", "filename": path("raw")}),
            &more,
        )
    };
    let r = |more: Value| {
        with(
            json!({"driver": "raw", "node-name": "r", "file": "f"}),
            &more,
        )
    };
    let null = |more: Value| with(json!({"driver": "null-co", "node-name": "n"}), &more);
    let debug = |more: Value| {
        with(
            json!({"driver": "blkdebug", "node-name": "b", "image": "n"}),
            &more,
        )
    };
    let address = json!({"type": "unix", "data": {"path": path("nbd")}});
    let throttle = json!({"driver": "throttle", "node-name": "t", "file": "f",
        "throttle-group": "tg"});
    same(&[
        add(f(json!({}))),
        add(r(json!({}))),
        reopen(json!({"driver": "raw", "file": "f"})),
        reopen(r(json!({"node-name": "zz"}))),
        reopen(json!({"driver": "raw", "node-name": "r"})),
        reopen(r(json!({"driver": "qcow2"}))),
        reopen(r(json!({"file": "zz"}))),
        reopen(r(json!({"read-only": true}))),
        reopen(r(json!({}))),
        reopen(f(json!({"read-only": true}))),
        reopen(f(json!({"filename": "other"}))),
        reopen(f(json!({"locking": "off"}))),
        reopen(f(json!({"aio": "io_uring"}))),
        reopen(f(json!({"discard": "unmap", "detect-zeroes": "unmap"}))),
        reopen(f(json!({"zz": 1}))),
        (
            "blockdev-reopen",
            json!({"options": [r(json!({"read-only": true})), r(json!({"node-name": "zz"}))]}),
        ),
        // A filter between.
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "tg"}),
        ),
        add(throttle),
        reopen(r(json!({"file": "t"}))),
        ("blockdev-del", json!({"node-name": "t"})),
        reopen(r(
            json!({"file": {"driver": "file", "filename": path("raw")}}),
        )),
        reopen(r(json!({"file": "r"}))),
        reopen(r(json!({}))),
        ("blockdev-del", json!({"node-name": "t"})),
        // Windows.
        reopen(r(json!({"offset": 512}))),
        reopen(r(json!({"offset": 5_120_000}))),
        reopen(r(json!({"size": 512}))),
        reopen(r(json!({}))),
        // What does not change.
        add(null(json!({"size": 1 << 20}))),
        reopen(null(json!({"size": 2 << 20}))),
        reopen(null(json!({"read-only": true}))),
        reopen(null(json!({"size": 1 << 20}))),
        add(debug(json!({}))),
        reopen(debug(json!({}))),
        reopen(debug(json!({"inject-error": [{"event": "none"}]}))),
        reopen(debug(json!({"image": "f"}))),
        // Users who write.
        ("nbd-server-start", json!({"addr": address})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "r", "writable": true}),
        ),
        reopen(r(json!({"read-only": true}))),
        reopen(f(json!({"read-only": true}))),
        reopen(r(json!({"offset": 512}))),
        reopen(r(json!({"file": "n"}))),
        reopen(r(json!({}))),
        ("blockdev-del", json!({"node-name": "f"})),
        ("blockdev-del", json!({"node-name": "b"})),
        ("blockdev-del", json!({"node-name": "n"})),
    ]);
    qemu_img(&["create", "-q", "-f", "qcow2", &path("base"), "4M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", &path("base2"), "4M"]);
    let backing = ["-b", &path("base"), "-F", "qcow2"];
    let create = ["create", "-q", "-f", "qcow2"];
    qemu_img(&[&create[..], &backing[..], &[&path("top")]].concat());
    let file = |name: &str, image: &str| {
        let filename = path(image);
        json!({"driver": "file", "node-name": name, "filename": filename})
    };
    let q = |backing: Value| {
        let mut options = json!({"driver": "qcow2", "node-name": "q", "file": "qf"});
        options["backing"] = backing;
        options
    };
    let qb = json!({"driver": "qcow2", "node-name": "qb", "file": file("qbf", "base")});
    let mut with_file = q(qb);
    with_file["file"] = file("qf", "top");
    same(&[
        add(with_file),
        add(json!({"driver": "qcow2", "node-name": "q2", "file": file("q2f", "base2")})),
        reopen(q(json!("q2"))),
        reopen(json!({"driver": "qcow2", "node-name": "q", "file": "qf"})),
        reopen(q(json!("qb"))),
        reopen(q(json!("q"))),
        reopen(q(json!("zz"))),
        reopen(q(json!("q2"))),
        ("blockdev-del", json!({"node-name": "q2"})),
        ("blockdev-del", json!({"node-name": "q"})),
        ("blockdev-del", json!({"node-name": "q2"})),
    ]);
}

#[test]
fn nothing_to_reopen_is_no_crash() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    assert_eq!(qmp.ok("blockdev-reopen", json!({"options": []})), json!({}));
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
}

#[test]
fn a_failure_leaves_everything_as_it_was() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let raw = |name: &str, file: &str| json!({"driver": "raw", "node-name": name, "file": file});
    for name in ["n1", "n2"] {
        let null = json!({"driver": "null-co", "node-name": name, "size": 1 << 20});
        qmp.ok("blockdev-add", null);
    }
    qmp.ok("blockdev-add", raw("r", "n1"));
    qmp.ok("blockdev-add", raw("s", "r"));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "s", "writable": true});
    qmp.ok("block-export-add", export);
    let before = qmp.ok("query-named-block-nodes", json!({}));
    let mut read_only = raw("s", "r");
    read_only["read-only"] = true.into();
    let error = qmp.err(
        "blockdev-reopen",
        json!({"options": [raw("r", "n2"), read_only]}),
    );
    assert_eq!(
        error,
        "Read-only block node 's' cannot support read-write users"
    );
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), before);
    assert_eq!(
        qmp.err("blockdev-del", json!({"node-name": "n1"})),
        "Block device n1 is in use"
    );
    qmp.ok("blockdev-del", json!({"node-name": "n2"}));
}

struct Client(Child);

impl Client {
    /// `qemu-img bench`, which fails if one request does.
    fn start(socket: &Path, more: &[&str]) -> Self {
        let child = Command::new("qemu-img")
            .args(["bench", "-f", "raw", "-t", "none", "-d", "16"])
            .args(more)
            .arg(format!("nbd+unix:///e?socket={}", socket.display()))
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

#[test]
fn a_filter_comes_and_goes_under_a_writing_client() {
    if !has("qemu-img") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    file(&daemon.path("disk"), 16 << 20);
    let limits = json!({"iops-write": 20_000});
    let group = json!({"qom-type": "throttle-group", "id": "tg", "limits": limits});
    qmp.ok("object-add", group);
    let disk = json!({"driver": "file", "node-name": "f", "filename": daemon.text("disk")});
    qmp.ok("blockdev-add", disk);
    let raw = |file: &str| json!({"driver": "raw", "node-name": "r", "file": file});
    qmp.ok("blockdev-add", raw("f"));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "r", "name": "e", "writable": true});
    qmp.ok("block-export-add", export);
    let bench = ["-w", "--pattern=7", "-c", "40000", "-s", "4096"];
    let mut client = Client::start(&daemon.path("nbd"), &bench);
    let mut changes = 0;
    while client.is_running() {
        let throttle = json!({"driver": "throttle", "node-name": "t", "file": "f",
            "throttle-group": "tg"});
        qmp.ok("blockdev-add", throttle);
        qmp.ok("blockdev-reopen", json!({"options": [raw("t")]}));
        let error = qmp.err("blockdev-del", json!({"node-name": "t"}));
        assert_eq!(error, "Block device t is in use");
        qmp.ok("blockdev-reopen", json!({"options": [raw("f")]}));
        qmp.ok("blockdev-del", json!({"node-name": "t"}));
        changes += 1;
    }
    assert!(client.0.wait().unwrap().success(), "no request failed");
    assert!(changes > 3, "{changes} changes");
    let disk = std::fs::read(daemon.path("disk")).unwrap();
    assert!(disk.iter().all(|byte| *byte == 7), "every write is there");
}

#[test]
fn a_backing_node_changes_under_a_reading_client() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    for name in ["base", "base2"] {
        let image = daemon.text(name);
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "16M"]);
        let write = Command::new("qemu-io")
            .args(["-c", "write -P 5 0 16M", &image])
            .stdout(Stdio::null())
            .status();
        assert!(write.unwrap().success());
    }
    let (base, top) = (daemon.text("base"), daemon.text("top"));
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top,
    ]);
    let node = |name: &str| {
        let file = json!({"driver": "file", "filename": daemon.text(name)});
        json!({"driver": "qcow2", "node-name": name, "file": file, "read-only": true})
    };
    qmp.ok("blockdev-add", node("base"));
    qmp.ok("blockdev-add", node("base2"));
    let file = json!({"driver": "file", "node-name": "tf", "filename": top});
    qmp.ok("blockdev-add", file);
    let image = |backing: &str| {
        let mut options = json!({"driver": "qcow2", "node-name": "q", "file": "tf"});
        options["backing"] = json!(backing);
        options
    };
    qmp.ok("blockdev-add", image("base"));
    let raw = |read_only: bool| {
        let mut options = json!({"driver": "raw", "node-name": "r", "file": "q"});
        options["read-only"] = json!(read_only);
        options
    };
    qmp.ok("blockdev-add", raw(false));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "r", "name": "e"});
    qmp.ok("block-export-add", export);
    let mut client = Client::start(&daemon.path("nbd"), &["-c", "60000", "-s", "4096"]);
    let mut changes = 0;
    while client.is_running() {
        qmp.ok(
            "blockdev-reopen",
            json!({"options": [image("base2"), raw(true)]}),
        );
        let error = qmp.err("blockdev-del", json!({"node-name": "base2"}));
        assert_eq!(
            error,
            "Node 'base2' is busy: node is used as backing hd of 'q'"
        );
        qmp.ok("blockdev-del", json!({"node-name": "base"}));
        qmp.ok("blockdev-add", node("base"));
        qmp.ok(
            "blockdev-reopen",
            json!({"options": [image("base"), raw(false)]}),
        );
        changes += 1;
    }
    assert!(client.0.wait().unwrap().success(), "no request failed");
    assert!(changes > 3, "{changes} changes");
    let read = Command::new("qemu-io")
        .args(["-f", "raw", "-r", "-c", "read -P 5 0 16M"])
        .arg(format!("nbd+unix:///e?socket={}", daemon.text("nbd")))
        .output()
        .unwrap();
    let text = String::from_utf8(read.stdout).unwrap();
    assert!(text.starts_with("read 16777216/16777216"), "{text}");
}
