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

/// A daemon with a qcow2 image over `base` as `q`, exported as `e`.
fn image_over_base(daemon: &Daemon, qmp: &mut Qmp, writable: bool) {
    for (name, pattern) in [("base", "5"), ("base2", "6")] {
        let image = daemon.text(name);
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "16M"]);
        let write = Command::new("qemu-io")
            .args(["-c", &format!("write -P {pattern} 0 16M"), &image])
            .stdout(Stdio::null())
            .status();
        assert!(write.unwrap().success());
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "qcow2", "node-name": name, "file": file, "read-only": true});
        qmp.ok("blockdev-add", node);
    }
    qemu_img(&["create", "-q", "-f", "qcow2", &daemon.text("top"), "16M"]);
    let file = json!({"driver": "file", "node-name": "qf", "filename": daemon.text("top")});
    let node = json!({"driver": "qcow2", "node-name": "q", "file": file, "backing": "base",
        "read-only": !writable});
    qmp.ok("blockdev-add", node);
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "q", "name": "e",
        "writable": writable});
    qmp.ok("block-export-add", export);
}

/// The definition of the image as it is to be.
fn image(daemon: &Daemon, backing: Value, read_only: bool) -> Value {
    let file = json!({"driver": "file", "node-name": "qf", "filename": daemon.text("top")});
    json!({"driver": "qcow2", "node-name": "q", "file": file, "backing": backing,
        "read-only": read_only})
}

/// What `qemu-io` says of these commands on the export.
fn io(daemon: &Daemon, commands: &[&str]) -> String {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]);
    if commands.iter().all(|one| one.starts_with("read")) {
        command.arg("-r");
    }
    for one in commands {
        command.args(["-c", one]);
    }
    command.arg(format!(
        "nbd+unix:///e?socket={}",
        daemon.path("nbd").display()
    ));
    let output = command.output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn a_backing_node_comes_and_goes_under_a_client() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    image_over_base(&daemon, &mut qmp, true);
    let bench = [
        "-w",
        "--pattern=9",
        "-c",
        "20000",
        "-s",
        "512",
        "-o",
        "2097152",
    ];
    let mut client = Client::start(&daemon.path("nbd"), &bench);
    let mut changes = 0;
    while client.is_running() {
        for (backing, pattern) in [(json!(null), 0), (json!("base2"), 6), (json!("base"), 5)] {
            let options = image(&daemon, backing, false);
            qmp.ok("blockdev-reopen", json!({"options": [options]}));
            let said = io(&daemon, &[&format!("read -P {pattern} 0 64k")]);
            assert!(said.starts_with("read 65536/65536"), "{said}");
            changes += 1;
        }
    }
    assert!(client.0.wait().unwrap().success(), "no request failed");
    assert!(changes > 3, "{changes} changes");
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    let options = image(&daemon, json!(null), false);
    qmp.ok("blockdev-reopen", json!({"options": [options]}));
    qmp.ok("blockdev-del", json!({"node-name": "base"}));
    qmp.ok("quit", json!({}));
    let mut daemon = daemon;
    assert!(daemon.wait().success());
    qemu_img(&["check", "-q", &daemon.text("top")]);
}

#[test]
fn an_image_is_read_only_and_written_again_under_a_reading_client() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    image_over_base(&daemon, &mut qmp, false);
    let mut client = Client::start(&daemon.path("nbd"), &["-c", "60000", "-s", "4096"]);
    let mut changes = 0_u32;
    while client.is_running() {
        let options = image(&daemon, json!("base"), false);
        qmp.ok("blockdev-reopen", json!({"options": [options]}));
        let export = json!({"type": "nbd", "id": "w", "node-name": "q", "name": "w",
            "writable": true});
        qmp.ok("block-export-add", export);
        let written = Command::new("qemu-io")
            .args([
                "-f",
                "raw",
                "-c",
                &format!("write -P 8 {}k 4k", changes * 4),
            ])
            .arg(format!("nbd+unix:///w?socket={}", daemon.text("nbd")))
            .output()
            .unwrap();
        assert!(
            written.stdout.starts_with(b"wrote 4096/4096"),
            "{written:?}"
        );
        let read_only = image(&daemon, json!("base"), true);
        assert_eq!(
            qmp.err("blockdev-reopen", json!({"options": [read_only]})),
            "Read-only block node 'q' cannot support read-write users"
        );
        qmp.ok("block-export-del", json!({"id": "w", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.ok("blockdev-reopen", json!({"options": [read_only]}));
        // Closed as at its end: another process may look at it.
        qemu_img(&["check", "-q", "-U", &daemon.text("top")]);
        changes += 1;
    }
    assert!(client.0.wait().unwrap().success(), "no request failed");
    assert!(changes > 1, "{changes} changes");
    let said = io(&daemon, &[&format!("read -P 8 0 {}k", changes * 4)]);
    assert!(
        said.starts_with("read ") && !said.contains("failed"),
        "{said}"
    );
}

#[test]
fn direct_io_comes_and_goes_under_a_client_that_verifies() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    file(&daemon.path("disk"), 8 << 20);
    let disk = |direct: bool| {
        json!({"driver": "file", "node-name": "f", "filename": daemon.text("disk"),
            "cache": {"direct": direct}})
    };
    qmp.ok("blockdev-add", disk(false));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "f", "name": "e",
        "writable": true});
    qmp.ok("block-export-add", export);
    // Not aligned to anything, so that direct I/O has edges.
    let bench = ["-w", "--pattern=7", "-c", "11000", "-s", "700", "-S", "700"];
    let mut client = Client::start(&daemon.path("nbd"), &bench);
    let flags = |daemon: &Daemon| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
        let disk = daemon.path("disk").canonicalize().unwrap();
        let of_disk = fds
            .map(|fd| fd.unwrap())
            .find(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link == disk));
        let number = of_disk.unwrap().file_name();
        let info = format!("/proc/{}/fdinfo/{}", daemon.pid(), number.to_str().unwrap());
        let info = std::fs::read_to_string(info).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        u32::from_str_radix(flags.unwrap().trim(), 8).unwrap()
    };
    let mut changes = 0;
    while client.is_running() {
        for direct in [true, false] {
            qmp.ok("blockdev-reopen", json!({"options": [disk(direct)]}));
            // O_DIRECT, as the system sees it.
            assert_eq!(flags(&daemon) & 0o40000 != 0, direct);
            changes += 1;
        }
    }
    assert!(client.0.wait().unwrap().success(), "no request failed");
    assert!(changes > 3, "{changes} changes");
    let disk = std::fs::read(daemon.path("disk")).unwrap();
    assert!(
        disk[..11_000 * 700].iter().all(|byte| *byte == 7),
        "every write is there"
    );
}

#[test]
fn a_file_that_was_opened_for_reading_is_written() {
    if !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    file(&daemon.path("disk"), 1 << 20);
    let disk = |read_only: bool| {
        json!({"driver": "file", "node-name": "f", "filename": daemon.text("disk"),
            "read-only": read_only})
    };
    qmp.ok("blockdev-add", disk(true));
    // Its name may be another file's by now.
    std::fs::rename(daemon.path("disk"), daemon.path("moved")).unwrap();
    file(&daemon.path("disk"), 1 << 20);
    qmp.ok("blockdev-reopen", json!({"options": [disk(false)]}));
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "f", "name": "e",
        "writable": true});
    qmp.ok("block-export-add", export);
    let said = io(&daemon, &["write -P 3 0 1M"]);
    assert!(said.starts_with("wrote 1048576"), "{said}");
    let moved = std::fs::read(daemon.path("moved")).unwrap();
    assert!(
        moved.iter().all(|byte| *byte == 3),
        "the file that was opened"
    );
    let other = std::fs::read(daemon.path("disk")).unwrap();
    assert!(
        other.iter().all(|byte| *byte == 0),
        "not the one of its name"
    );
}

#[test]
fn the_configuration_follows() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    image_over_base(&daemon, &mut qmp, false);
    // The file lives inside the image and is only named this time.
    let mut options = image(&daemon, json!("base2"), true);
    options["file"] = json!("qf");
    qmp.ok("blockdev-reopen", json!({"options": [options]}));
    let told = qmp.ok("x-outport-config", json!({}));
    // The monitor of this daemon is no business of the next one, which has its own.
    let nodes = told.as_array().unwrap().iter();
    let nodes: Vec<_> = nodes
        .filter(|command| command["execute"] == "blockdev-add")
        .collect();
    let config = json!(nodes).to_string();
    std::fs::write(daemon.path("config"), config).unwrap();
    qmp.ok("quit", json!({}));
    let mut daemon = daemon;
    assert!(daemon.wait().success());
    let again = Daemon::start(&["--config", &daemon.text("config")]);
    let nodes = again.qmp().ok("query-named-block-nodes", json!({}));
    let node = |name: &str| {
        let mut nodes = nodes.as_array().unwrap().iter();
        nodes.find(|node| node["node-name"] == name).unwrap()
    };
    assert_eq!(node("q")["backing_file"], json!(daemon.text("base2")));
    assert_eq!(node("qf")["ro"], json!(true));
}
