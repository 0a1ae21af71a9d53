//! The end of the daemon while commands are in progress: what was begun is not left half done.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::*;

/// A daemon with a second monitor.
fn daemon() -> (Daemon, Qmp, Qmp) {
    let other = "socket,id=n,path={}/qmp2,server=on,wait=off";
    let daemon = Daemon::start(&["--chardev", other, "--monitor", "n"]);
    let (one, two) = (daemon.qmp(), Qmp::negotiated(&daemon.path("qmp2")));
    (daemon, one, two)
}

/// Asks for something that takes its time.
fn begin(qmp: &mut Qmp, command: &str, arguments: &Value) {
    let line = json!({"execute": command, "arguments": arguments});
    qmp.send(format!("{line}\n").as_bytes());
}

/// Ends the daemon in one of the ways there are.
fn end(daemon: &Daemon, other: &mut Qmp, how: &str) {
    match how {
        "quit" => _ = other.ok("quit", json!({})),
        signal => daemon.signal(signal),
    }
}

/// What `qemu-img info` says of the bitmaps of an image, whoever uses it.
fn bitmaps(image: &str) -> Value {
    let output = Command::new("qemu-img")
        .args(["info", "-U", "--output=json", image])
        .output()
        .unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    info["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn an_image_that_is_being_closed_is_written_back() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for how in ["TERM", "quit"] {
        let (mut daemon, mut one, mut two) = daemon();
        let image = daemon.text("image");
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
        let group = json!({"qom-type": "throttle-group", "id": "tg"});
        one.ok("object-add", group);
        let file = json!({"driver": "file", "filename": image});
        let slow = json!({"driver": "throttle", "throttle-group": "tg", "file": file});
        let node = json!({"driver": "qcow2", "node-name": "q", "file": slow});
        one.ok("blockdev-add", node);
        let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
        one.ok("nbd-server-start", json!({"addr": address}));
        let export = json!({"type": "nbd", "id": "e", "name": "e", "node-name": "q",
            "writable": true});
        one.ok("block-export-add", export);
        // Written and acknowledged; the client is killed before it flushes.
        let socket = format!("nbd+unix:///e?socket={}", daemon.text("nbd"));
        let client = Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write -P 7 0 4M", "-c", "sigraise 9"])
            .arg(socket)
            .output()
            .unwrap();
        assert!(!client.status.success());
        let stats = one.ok("query-export-stats", json!({}))[0].clone();
        assert_eq!(stats["wr-bytes"], 4 << 20);
        assert_eq!(stats["flush-operations"], 0);
        one.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
        one.event("BLOCK_EXPORT_DELETED");
        let limits = json!({"path": "tg", "property": "limits", "value": {"iops-write": 4}});
        one.ok("qom-set", limits);
        begin(&mut one, "blockdev-del", &json!({"node-name": "q"}));
        eventually("it is being closed", || {
            let nodes = two.ok("query-named-block-nodes", json!({}));
            !nodes.to_string().contains(r#""node-name":"q""#)
        });
        end(&daemon, &mut two, how);
        assert_eq!(one.answer(), Some(json!({"return": {}})), "{how}");
        assert!(daemon.wait().success());
        let want = daemon.text("want");
        let mut bytes = vec![0; 64 << 20];
        bytes[..4 << 20].fill(7);
        std::fs::write(&want, bytes).unwrap();
        qemu_img(&["check", "-q", &image]);
        qemu_img(&["compare", "-q", &image, &want]);
    }
}

#[test]
fn an_image_that_is_being_opened_is_closed_again() {
    if !has("qemu-img") {
        return;
    }
    for how in ["TERM", "quit"] {
        let (mut daemon, mut one, mut two) = daemon();
        let image = daemon.text("image");
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
        qemu_img(&["bitmap", "--add", &image, "b"]);
        let file = json!({"driver": "file", "filename": image});
        let debug = json!({"driver": "blkdebug", "node-name": "d", "image": file});
        one.ok("blockdev-add", debug);
        // Its bitmaps are marked as in use first; that waits to be durable.
        let hold = json!({"node-name": "d", "event": "flush_to_disk", "tag": "held"});
        one.ok("x-blkdebug-break", hold);
        let node = json!({"driver": "qcow2", "node-name": "q", "file": "d"});
        begin(&mut one, "blockdev-add", &node);
        eventually("it is being opened", || {
            let debug = two.ok("x-query-blkdebug", json!({"node-name": "d"}));
            debug["suspended"] == json!(["held"])
        });
        assert_eq!(bitmaps(&image)[0]["flags"], json!(["in-use", "auto"]));
        end(&daemon, &mut two, how);
        assert_eq!(one.answer(), Some(json!({"return": {}})), "{how}");
        assert!(daemon.wait().success());
        assert_eq!(bitmaps(&image)[0]["flags"], json!(["auto"]), "{how}");
        qemu_img(&["check", "-q", &image]);
    }
}

#[test]
fn an_option_in_progress_is_ended_whole() {
    if !has("qemu-img") {
        return;
    }
    // The same for the command line: the node is there only when the slow file answers.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let image = path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    qemu_img(&["bitmap", "--add", &image, "b"]);
    let slow = format!(
        "qcow2,node-name=q,file.driver=throttle,file.throttle-group=tg,\
         file.file.driver=file,file.file.filename={image}"
    );
    let after = format!("socket,id=after,path={},server=on,wait=off", path("after"));
    let mut daemon = Daemon::start(&[
        "--object",
        "throttle-group,id=tg,limits.iops-total=4",
        "--blockdev",
        &slow,
        "--chardev",
        &after,
    ]);
    eventually("it is being opened", || {
        bitmaps(&image)[0]["flags"] == json!(["in-use", "auto"])
    });
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    assert_eq!(bitmaps(&image)[0]["flags"], json!(["auto"]));
    assert!(!folder.path().join("after").exists());
}

#[test]
fn what_may_never_come_does_not_hold_up_the_end() {
    for how in ["TERM", "quit"] {
        for what in ["server", "file", "client", "rules"] {
            let (mut daemon, mut one, mut two) = daemon();
            let pipe = daemon.text("pipe");
            make_pipe(&pipe);
            // It accepts, and says nothing.
            let mute = std::os::unix::net::UnixListener::bind(daemon.path("mute")).unwrap();
            let unix = |name: &str| json!({"type": "unix", "path": daemon.text(name)});
            let backend = json!({"type": "socket", "data": {"wait": true,
                "addr": {"type": "unix", "data": {"path": daemon.text("w")}}}});
            let (command, arguments) = match what {
                "server" => (
                    "blockdev-add",
                    json!({"driver": "nbd", "node-name": "n", "server": unix("mute")}),
                ),
                "file" => (
                    "blockdev-add",
                    json!({"driver": "file", "node-name": "n", "filename": pipe}),
                ),
                "rules" => (
                    "blockdev-add",
                    json!({"driver": "blkdebug", "node-name": "n", "config": pipe,
                        "image": {"driver": "null-co"}}),
                ),
                _ => ("chardev-add", json!({"id": "w", "backend": backend})),
            };
            begin(&mut one, command, &arguments);
            // Whoever is answered now is answered after it was begun.
            two.ok("query-block-exports", json!({}));
            end(&daemon, &mut two, how);
            assert!(daemon.wait().success(), "{what} {how}");
            drop(mute);
        }
    }
}

#[test]
fn a_second_signal_does_not_wait_for_what_hangs() {
    if !has("qemu-img") {
        return;
    }
    let (mut daemon, mut one, mut two) = daemon();
    let image = daemon.text("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    one.ok("nbd-server-start", json!({"addr": address}));
    let limits = json!({"iops-total": 1, "iops-total-max": 1});
    let group = json!({"qom-type": "throttle-group", "id": "tg", "limits": limits});
    one.ok("object-add", group);
    let file = json!({"driver": "file", "filename": image});
    let slow = json!({"driver": "throttle", "node-name": "t", "throttle-group": "tg",
        "file": file});
    let node = json!({"driver": "qcow2", "node-name": "q", "file": slow});
    begin(&mut one, "blockdev-add", &node);
    eventually("it is being opened", || {
        let nodes = two.ok("query-named-block-nodes", json!({}));
        nodes.to_string().contains(r#""node-name":"t""#)
    });
    daemon.signal("TERM");
    eventually("it ends", || !daemon.path("nbd").exists());
    assert!(!daemon.has_ended());
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(1));
}
