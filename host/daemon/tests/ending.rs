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
        serve(&daemon, &mut one, slow, 4);
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

/// A daemon that opens an image through a node which takes a request a second: its end takes long.
fn held_up() -> Option<(Daemon, Qmp)> {
    if !has("qemu-img") {
        return None;
    }
    let (daemon, mut one, mut two) = daemon();
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
    Some((daemon, one))
}

#[test]
fn only_a_late_sigquit_cuts_an_end_short() {
    let Some((mut daemon, _monitor)) = held_up() else {
        return;
    };
    daemon.signal("TERM");
    eventually("it ends", || !daemon.path("nbd").exists());
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        daemon.signal(signal);
    }
    eventually("SIGQUIT is taken for a copy of the first signal", || {
        daemon.log().contains("ending already; SIGQUIT after 1 s")
    });
    assert!(!daemon.has_ended());
    eventually("SIGQUIT cuts the end short", || {
        if !daemon.has_ended() {
            daemon.signal("QUIT");
        }
        daemon.has_ended()
    });
    assert_eq!(daemon.wait().code(), Some(4));
    let log = daemon.log();
    assert!(
        log.contains("SIGQUIT has cut the end short not_written_back=t"),
        "{log}"
    );
}

/// Serves a new image, and writes `7` to its first 32 MiB without a flush.
fn with_unflushed_writes() -> (Daemon, String) {
    let (daemon, mut one, _two) = daemon();
    let image = daemon.text("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    serve(
        &daemon,
        &mut one,
        json!({"driver": "file", "filename": image}),
        32,
    );
    (daemon, image)
}

/// Serves the image in this node, and writes `7` to its first MiB: acknowledged, and not flushed
/// when the client is killed.
fn serve(daemon: &Daemon, one: &mut Qmp, file: Value, mib: u64) {
    one.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "file": file}),
    );
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    one.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "name": "e", "node-name": "q",
        "writable": true});
    one.ok("block-export-add", export);
    let socket = format!("nbd+unix:///e?socket={}", daemon.text("nbd"));
    let client = Command::new("qemu-io")
        .args([
            "-f",
            "raw",
            "-c",
            &format!("write -P 7 0 {mib}M"),
            "-c",
            "sigraise 9",
        ])
        .arg(socket)
        .output()
        .unwrap();
    assert!(!client.status.success());
    let stats = one.ok("query-export-stats", json!({}))[0].clone();
    assert_eq!(stats["wr-bytes"], mib << 20);
    assert_eq!(stats["flush-operations"], 0);
}

#[test]
fn the_same_signal_again_loses_nothing() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for signals in [
        ["TERM", "TERM", "TERM"],
        ["INT", "INT", "INT"],
        ["HUP", "TERM", "INT"],
        ["QUIT", "QUIT", "QUIT"],
    ] {
        let (mut daemon, image) = with_unflushed_writes();
        // Through the shell, which sends them within a millisecond.
        let pid = daemon.pid();
        let line = signals
            .map(|signal| format!("kill -s {signal} {pid}"))
            .join("; ");
        Command::new("sh").args(["-c", &line]).status().unwrap();
        assert!(daemon.wait().success(), "{signals:?}");
        let want = daemon.text("want");
        let mut bytes = vec![0; 64 << 20];
        bytes[..32 << 20].fill(7);
        std::fs::write(&want, bytes).unwrap();
        qemu_img(&["check", "-q", &image]);
        qemu_img(&["compare", "-q", &image, &want]);
    }
}

#[test]
fn every_signal_that_can_be_caught_ends_in_order_or_does_nothing() {
    let orderly = [
        "HUP", "INT", "QUIT", "TERM", "USR2", "STKFLT", "XCPU", "VTALRM", "PROF", "PWR",
    ];
    let real_time: Vec<String> = (34..=64).map(|number| number.to_string()).collect();
    for signal in orderly
        .into_iter()
        .chain(real_time.iter().map(String::as_str))
    {
        let mut daemon = Daemon::start(&[]);
        daemon.qmp();
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0), "{signal}");
    }
    let mut daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    for signal in [
        "USR1", "ALRM", "IO", "XFSZ", "PIPE", "CHLD", "URG", "WINCH", "CONT",
    ] {
        daemon.signal(signal);
    }
    qmp.ok("query-block-exports", json!({}));
    assert!(!daemon.has_ended());
}

#[test]
fn an_end_that_cannot_write_back_says_so() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for how in ["TERM", "quit"] {
        let (mut daemon, mut one, mut two) = daemon();
        let image = daemon.text("image");
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
        let rule = json!({"event": "l2_update", "errno": 5});
        let file = json!({"driver": "blkdebug", "inject-error": [rule],
            "image": {"driver": "file", "filename": image}});
        serve(&daemon, &mut one, file, 32);
        end(&daemon, &mut two, how);
        assert_eq!(daemon.wait().code(), Some(3), "{how}");
        let log = daemon.log();
        assert!(log.contains("Node 'q' could not be closed"), "{log}");
        let lost = "what it acknowledged since its last flush is lost";
        assert!(log.contains(lost), "{log}");
    }
}

#[test]
fn the_end_of_standard_input_ends_the_daemon_where_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let mut child = Command::new(OUTPORTD)
        .arg("--end-with-stdin")
        .arg("--pidfile")
        .arg(&pid)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    eventually("it is up", || pid.exists());
    assert!(child.try_wait().unwrap().is_none());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert!(!pid.exists());
}
