//! `blockdev-set-active`: an image changes hands between daemons; what an inactive node refuses.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::*;

/// What `qemu-io` says of these commands on the export `e`.
fn io(socket: &Path, commands: &[&str]) -> String {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]);
    for one in commands {
        command.args(["-c", one]);
    }
    command.arg(format!("nbd+unix:///e?socket={}", socket.display()));
    let output = command.output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// A daemon with the qcow2 image as a writable export `e` that puts up with being inactive.
fn share(qmp: &mut Qmp, folder: &str, image: &str, active: bool) {
    let file = json!({"driver": "file", "filename": image});
    let node = json!({"driver": "qcow2", "node-name": "n", "active": active, "file": file});
    qmp.ok("blockdev-add", node);
    let path = format!("{folder}/nbd");
    let address = json!({"type": "unix", "data": {"path": path}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e",
        "writable": true, "allow-inactive": true});
    qmp.ok("block-export-add", export);
}

fn set(qmp: &mut Qmp, active: bool) {
    qmp.ok(
        "blockdev-set-active",
        json!({"node-name": "n", "active": active}),
    );
}

#[test]
fn an_image_changes_hands_with_qsd() {
    if !has("qemu-io") || !has("qemu-img") || !has(QSD) {
        return;
    }
    let ours = Daemon::start(&[]);
    let theirs = Daemon::qsd(&[]).unwrap();
    let image = ours.text("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "16M"]);
    let (mut a, mut b) = (ours.qmp(), theirs.qmp());
    share(&mut a, &ours.text("."), &image, true);
    let file = json!({"driver": "file", "filename": image, "node-name": "nf", "active": false});
    b.ok("blockdev-add", file);
    let node = json!({"driver": "qcow2", "node-name": "n", "active": false, "file": "nf"});
    b.ok("blockdev-add", node);
    let address = json!({"type": "unix", "data": {"path": theirs.text("nbd")}});
    b.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e",
        "writable": true, "allow-inactive": true});
    b.ok("block-export-add", export);
    let (ours_at, theirs_at) = (ours.path("nbd"), theirs.path("nbd"));
    for round in 0..3_u8 {
        let at = u32::from(round) * 2;
        let (mine, yours) = (round * 2 + 1, round * 2 + 2);
        let write = |pattern: u8, at: u32| format!("write -P {pattern} {at}M 1M");
        let read = |pattern: u8, at: u32| format!("read -P {pattern} {at}M 1M");
        let said = io(&ours_at, &[&write(mine, at)]);
        assert!(said.starts_with("wrote 1048576"), "{said}");
        set(&mut a, false);
        let said = io(&ours_at, &["read 0 4k", &write(9, at), "write -z 0 4k"]);
        assert!(said.contains("read 4096/4096"), "{said}");
        assert_eq!(said.matches("Operation not permitted").count(), 2, "{said}");
        set(&mut b, true);
        let said = io(&theirs_at, &[&read(mine, at), &write(yours, at + 1)]);
        assert!(
            said.contains("wrote 1048576") && !said.contains("failed"),
            "{said}"
        );
        set(&mut b, false);
        set(&mut a, true);
        let said = io(&ours_at, &[&read(mine, at), &read(yours, at + 1)]);
        assert!(!said.contains("failed"), "{said}");
    }
    a.ok("quit", json!({}));
    b.ok("quit", json!({}));
    // Their ends come after their answers, and locks go with those.
    eventually("both have let go of it", || {
        let mut info = Command::new("qemu-img");
        info.args(["info", &image]).stderr(Stdio::null());
        info.stdout(Stdio::null()).status().unwrap().success()
    });
    qemu_img(&["check", "-q", &image]);
}

/// What the file holds now.
fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn nothing_is_written_after_the_answer() {
    if !has("qemu-img") {
        return;
    }
    for format in ["raw", "qcow2"] {
        let daemon = Daemon::start(&[]);
        let image = daemon.text("image");
        qemu_img(&["create", "-q", "-f", format, &image, "64M"]);
        let mut qmp = daemon.qmp();
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": format, "node-name": "n", "file": file});
        qmp.ok("blockdev-add", node);
        let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
        qmp.ok("nbd-server-start", json!({"addr": address}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e",
            "writable": true, "allow-inactive": true});
        qmp.ok("block-export-add", export);
        let mut client = Command::new("qemu-img")
            .args(["bench", "-f", "raw", "-t", "none", "-d", "16", "-w"])
            .args(["--pattern=7", "-c", "10000000", "-s", "4096"])
            .arg(format!("nbd+unix:///e?socket={}", daemon.text("nbd")))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the client writes", || {
            content(&daemon.path("image")).contains(&7)
        });
        set(&mut qmp, false);
        let before = content(&daemon.path("image"));
        let status = client.wait().unwrap();
        assert!(!status.success(), "{format}: its next write was refused");
        let after = content(&daemon.path("image"));
        assert!(before == after, "{format}: written after the answer");
        if format == "qcow2" {
            qemu_img(&["check", "-q", &image]);
        }
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        let active = |node: &Value| node["active"] == json!(false);
        assert!(nodes.as_array().unwrap().iter().all(active), "{nodes}");
        set(&mut qmp, true);
        let said = io(&daemon.path("nbd"), &["write -P 5 0 4k", "read -P 5 0 4k"]);
        assert!(said.contains("read 4096/4096"), "{said}");
    }
}

#[test]
fn an_image_that_is_none_any_more_stays_inactive() {
    if !has("qemu-img") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let image = daemon.text("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
    let mut qmp = daemon.qmp();
    share(&mut qmp, &daemon.text("."), &image, true);
    set(&mut qmp, false);
    let good = content(&daemon.path("image"));
    std::fs::write(&image, vec![0; good.len()]).unwrap();
    let asked = json!({"node-name": "n", "active": true});
    assert_eq!(
        qmp.err("blockdev-set-active", asked),
        "Could not reopen qcow2 layer: Image is not in qcow2 format"
    );
    std::fs::write(&image, good).unwrap();
    set(&mut qmp, true);
    assert_eq!(qmp.ok("query-block-exports", json!({}))[0]["id"], "e");
}
