//! Nodes: what can be added, what conflicts, and QSD's sentences compared live.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::*;

#[test]
fn errors_are_those_of_qsd() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    file(&folder.path().join("raw"), 4 << 20);
    qemu_img(&["create", "-q", "-f", "qcow2", &path("qcow2"), "64M"]);
    let add = |name: &str, more: Value| {
        (
            "blockdev-add",
            with(
                json!({"node-name": name, "file": "f", "driver": "raw"}),
                &more,
            ),
        )
    };
    let file = |name: &str, path: String, read_only: bool| {
        let options = json!({"driver": "file", "node-name": name, "filename": path,
            "read-only": read_only});
        ("blockdev-add", options)
    };
    let export = |id: &str, node: &str, more: Value| {
        (
            "block-export-add",
            with(
                json!({"type": "nbd", "id": id, "node-name": node, "writable": true}),
                &more,
            ),
        )
    };
    let resize = |name: &str, size: i64| ("block_resize", json!({"node-name": name, "size": size}));
    let delete = |name: &str| ("blockdev-del", json!({"node-name": name}));
    let socket = json!({"addr": {"type": "unix", "data": {"path": path("nbd")}}});

    // Names, children, windows.
    same(&[
        ("blockdev-add", json!({"driver": "null-co"})),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "1x"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "a".repeat(32)}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "a"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "a"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "nosuch", "node-name": "b"}),
        ),
        add("b", json!({"file": "zz"})),
        file("f", "/nonexistent/f".into(), false),
        file("f", path("raw"), false),
        add("a1", json!({"offset": 1})),
        add("a2", json!({"size": 1})),
        add("a3", json!({"size": 8 << 20})),
        add("a4", json!({"offset": 8 << 20})),
        add("a5", json!({"offset": (4 << 20) - 512, "size": 1024})),
        add("a6", json!({"offset": -512})),
        resize("a1", -1),
        resize("zz", 1),
        delete("f"),
        delete("zz"),
        add("q", json!({"driver": "qcow2"})),
        add(
            "i",
            json!({"file": {"driver": "null-co", "node-name": "inner"}}),
        ),
        delete("inner"),
        delete("i"),
        delete("inner"),
    ]);
    // Permissions below qcow2.
    same(&[
        ("nbd-server-start", socket.clone()),
        file("f", path("qcow2"), false),
        add("q", json!({"driver": "qcow2"})),
        export("e", "f", json!({})),
        export("e1", "q", json!({})),
        export("e1", "q", json!({"name": "x"})),
        export("e2", "q", json!({})),
        resize("q", 128 << 20),
        add("q2", json!({"driver": "qcow2"})),
        add("r2", json!({})),
        add("r3", json!({"offset": 512})),
        export("e3", "r2", json!({})),
        delete("q"),
    ]);
    // Exports.
    same(&[
        file("f", path("raw"), false),
        file("ro", path("raw"), true),
        export("1", "f", json!({})),
        export("e", "f", json!({})),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "/nonexistent/s"}}}),
        ),
        (
            "nbd-server-start",
            json!({"addr": socket["addr"], "tls-creds": "t"}),
        ),
        ("nbd-server-start", socket.clone()),
        ("nbd-server-start", socket),
        export("e", "zz", json!({})),
        export("e", "ro", json!({})),
        export("e", "f", json!({"iothread": "zz"})),
        export("e", "f", json!({"name": "x".repeat(4097)})),
        export("e", "f", json!({"bitmaps": ["b"]})),
        export("e", "f", json!({"bitmaps": [{"node": "zz", "name": "b"}]})),
        ("block-export-del", json!({"id": "zz"})),
        ("nbd-server-remove", json!({"name": "zz"})),
        ("nbd-server-add", json!({"device": "zz"})),
    ]);
    // Jobs and objects.
    same(&[
        (
            "blockdev-create",
            json!({"job-id": "1", "options": {"driver": "file",
            "filename": "/nonexistent/f", "size": 1}}),
        ),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "raw"}}),
        ),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "file",
            "filename": "/nonexistent/f", "size": 1}}),
        ),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "null-co"}}),
        ),
        ("job-dismiss", json!({"id": "zz"})),
        ("object-add", json!({"qom-type": "iothread", "id": "io"})),
        ("object-add", json!({"qom-type": "iothread", "id": "io"})),
        ("object-add", json!({"qom-type": "iothread", "id": "1"})),
        (
            "object-add",
            json!({"qom-type": "iothread", "id": "i", "poll-grow": -1}),
        ),
        ("object-del", json!({"id": "zz"})),
        ("qom-list", json!({"path": "/nosuch"})),
    ]);
}

#[test]
fn the_length_of_a_null_node_is_not_negative() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let arguments = json!({"driver": "null-co", "node-name": "n", "size": -1});
    assert_eq!(
        qmp.err("blockdev-add", arguments),
        "Value '-1' is out of range for parameter 'size'"
    );
}

#[test]
fn implicit_children_live_and_die_with_their_parent() {
    let daemon = Daemon::start(&[]);
    file(&daemon.path("raw"), 1 << 20);
    let mut qmp = daemon.qmp();
    let inner = json!({"driver": "file", "filename": daemon.text("raw")});
    qmp.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": inner}),
    );
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes[0]["node-name"], "r");
    let child = nodes[1]["node-name"].as_str().unwrap().to_owned();
    assert!(child.starts_with("#block"), "{child}");
    assert_eq!(
        nodes[0]["children"],
        json!([{"child": "file", "node-name": child}])
    );
    assert_eq!(nodes[0]["file"], daemon.text("raw"));
    let error = qmp.err("blockdev-del", json!({"node-name": child}));
    assert_eq!(error, format!("Node {child} is not owned by the monitor"));
    qmp.ok("blockdev-del", json!({"node-name": "r"}));
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), json!([]));
    // A failed addition leaves nothing behind either.
    let inner = json!({"driver": "file", "filename": daemon.text("raw")});
    let arguments = json!({"driver": "raw", "node-name": "r", "file": inner, "offset": 2 << 20});
    qmp.err("blockdev-add", arguments);
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), json!([]));
}

#[test]
fn an_image_is_made_by_a_job_and_written_back_at_exit() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let mut daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"]);
    let mut qmp = daemon.qmp();
    let path = daemon.text("disk.qcow2");
    let status = |qmp: &mut Qmp, job: &str| {
        let data = qmp.event("JOB_STATUS_CHANGE");
        assert_eq!(data["id"], job);
        data["status"].as_str().unwrap().to_owned()
    };
    let options = json!({"driver": "file", "filename": path, "size": 0});
    qmp.ok(
        "blockdev-create",
        json!({"job-id": "a", "options": options}),
    );
    let seen: Vec<_> = (0..5).map(|_| status(&mut qmp, "a")).collect();
    assert_eq!(
        seen,
        ["created", "running", "waiting", "pending", "concluded"]
    );
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": path}),
    );
    let options = json!({"driver": "qcow2", "file": "f", "size": 64 << 20});
    qmp.ok(
        "blockdev-create",
        json!({"job-id": "b", "options": options}),
    );
    let seen: Vec<_> = (0..5).map(|_| status(&mut qmp, "b")).collect();
    assert_eq!(
        seen,
        ["created", "running", "waiting", "pending", "concluded"]
    );
    let jobs = qmp.ok("query-jobs", json!({}));
    assert_eq!((&jobs[0]["id"], jobs[0].get("error")), (&json!("b"), None));
    qmp.ok("job-dismiss", json!({"id": "b"}));
    assert_eq!(status(&mut qmp, "b"), "null");

    qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "file": "f"}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "q", "writable": true});
    qmp.ok("block-export-add", export);
    let uri = format!("nbd+unix:///q?socket={}", daemon.text("nbd"));
    let write = Command::new("qemu-io")
        .args([
            "-f",
            "raw",
            &uri,
            "-c",
            "write -P 7 1M 3M",
            "-c",
            "read -P 7 1M 3M",
        ])
        .output()
        .unwrap();
    assert!(write.status.success(), "{write:?}");
    let node = &qmp.ok("query-named-block-nodes", json!({"flat": true}))[0];
    assert_eq!(node["image"]["format-specific"]["type"], "qcow2");
    assert_eq!(node["image"]["virtual-size"], 64 << 20);
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());
    qemu_img(&["check", "-q", &path]);
    let read = Command::new("qemu-io")
        .args(["-c", "read -P 7 1M 3M", &path])
        .output()
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&read.stdout).contains("failed"),
        "{read:?}"
    );
}

#[test]
fn bundled_plugins_are_listed() {
    let daemon = Daemon::start(&[]);
    let plugins = daemon.qmp().ok("query-plugins", json!({}));
    let qcow2 = plugins
        .as_array()
        .unwrap()
        .iter()
        .find(|it| it["name"] == "qcow2")
        .unwrap();
    assert_eq!(
        (&qcow2["bundled"], &qcow2["kind"]),
        (&json!(true), &json!("format"))
    );
    assert_eq!(qcow2["drivers"], json!(["qcow2"]));
    let listed = plugins.as_array().unwrap().iter();
    let listed: Vec<_> = listed
        .map(|it| (it["name"].as_str(), &it["kind"]))
        .collect();
    let (context, policy) = (json!("metadata-context"), json!("authz"));
    for (name, kind) in [
        ("allocation-depth", &context),
        ("authz-list", &policy),
        ("dirty-bitmap", &context),
    ] {
        assert!(listed.contains(&(Some(name), kind)), "{name}: {listed:?}");
    }
}

#[test]
fn an_image_in_use_is_locked_against_other_processes() {
    if !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"]);
    file(&daemon.path("raw"), 1 << 20);
    let path = daemon.text("raw");
    let mut qmp = daemon.qmp();
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": path}),
    );
    let write = || {
        let arguments = ["-f", "raw", "-c", "write 0 512", &path];
        let output = Command::new("qemu-io").args(arguments).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(write(), "", "a node without users holds no lock");
    let format = json!({"driver": "qcow2", "node-name": "q", "file": "f"});
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "1M"]);
    qmp.ok("blockdev-del", json!({"node-name": "f"}));
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": path}),
    );
    qmp.ok("blockdev-add", format);
    assert!(
        write().contains("Failed to get \"write\" lock"),
        "{}",
        write()
    );
    qmp.ok("blockdev-del", json!({"node-name": "q"}));
    assert_eq!(write(), "");
}

#[test]
fn discards_reach_the_file_only_if_asked_for() {
    if !has("qemu-io") {
        return;
    }
    for (discard, frees) in [("ignore", false), ("unmap", true)] {
        let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"]);
        std::fs::write(daemon.path("raw"), vec![7; 1 << 20]).unwrap();
        let mut qmp = daemon.qmp();
        let inner = json!({"driver": "file", "filename": daemon.text("raw")});
        let options = json!({"driver": "raw", "node-name": "r", "file": inner, "discard": discard});
        qmp.ok("blockdev-add", options);
        let export = json!({"type": "nbd", "id": "e", "node-name": "r", "writable": true});
        qmp.ok("block-export-add", export);
        let uri = format!("nbd+unix:///r?socket={}", daemon.text("nbd"));
        let output = Command::new("qemu-io")
            .args([
                "-d",
                "unmap",
                "-f",
                "raw",
                &uri,
                "-c",
                "discard 0 1M",
                "-c",
                "flush",
            ])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let bytes = std::fs::read(daemon.path("raw")).unwrap();
        assert_eq!(
            bytes.iter().all(|byte| *byte == 0),
            frees,
            "discard={discard}"
        );
    }
}

#[test]
fn a_pinned_plugin_replaces_a_bundled_one_while_it_is_there() {
    if !has("qemu-img") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let image = daemon.text("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
    let mut qmp = daemon.qmp();
    let mut object = plugin_object(&daemon, "mine");
    let unpinned = qmp.err("object-add", object.clone());
    assert!(
        unpinned.contains("parameter 'sha256' is missing"),
        "{unpinned}"
    );
    object["sha256"] = json!("0".repeat(64));
    assert!(
        qmp.err("object-add", object.clone())
            .contains("was asked for")
    );
    pin(&mut object, &unpinned);
    qmp.ok("object-add", object);
    let options = json!({"driver": "qcow2", "node-name": "q",
        "file": {"driver": "file", "filename": image}});
    qmp.ok("blockdev-add", options);
    let in_use = "object 'mine' is in use, can not be deleted";
    assert_eq!(qmp.err("object-del", json!({"id": "mine"})), in_use);
    qmp.ok("blockdev-del", json!({"node-name": "q"}));
    qmp.ok("object-del", json!({"id": "mine"}));
    let objects = qmp.ok("qom-list", json!({"path": "/objects"}));
    assert!(!objects.to_string().contains("\"mine\""), "{objects}");
}

#[test]
fn a_write_past_the_threshold_is_told_once() {
    if !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    file(&daemon.path("disk"), 1 << 20);
    let disk = json!({"driver": "file", "node-name": "f", "filename": daemon.text("disk")});
    qmp.ok("blockdev-add", disk);
    let raw = json!({"driver": "raw", "node-name": "r", "file": "f"});
    qmp.ok("blockdev-add", raw);
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "r", "writable": true});
    qmp.ok("block-export-add", export);
    let io = |command: &str| {
        let done = std::process::Command::new("qemu-io")
            .args(["-f", "raw", "-c", command])
            .arg(format!("nbd+unix:///r?socket={}", daemon.text("nbd")))
            .output();
        assert!(done.unwrap().status.success());
    };
    let set = |qmp: &mut Qmp, node: &str| {
        let asked = json!({"node-name": node, "write-threshold": 8192});
        qmp.ok("block-set-write-threshold", asked);
    };
    set(&mut qmp, "r");
    set(&mut qmp, "f");
    // Up to it, and discards beyond, say nothing: as in QSD.
    io("write 0 8k");
    io("discard 64k 4k");
    let thresholds = |qmp: &mut Qmp| {
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap().iter();
        nodes
            .map(|node| node["write_threshold"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(thresholds(&mut qmp), [json!(8192), json!(8192)]);
    io("write 8k 100");
    for node in ["r", "f"] {
        let event = qmp.event("BLOCK_WRITE_THRESHOLD");
        assert_eq!(
            event,
            json!({"node-name": node, "amount-exceeded": 100, "write-threshold": 8192})
        );
    }
    assert_eq!(thresholds(&mut qmp), [json!(0), json!(0)]);
    set(&mut qmp, "f");
    io("write -z 64k 4k");
    let event = qmp.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(event["amount-exceeded"], json!(61440));
}
