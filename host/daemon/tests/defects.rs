//! What qemu-storage-daemon gets wrong, each as a test that shows it right here (spec 6).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::json;
use support::*;

#[test]
fn a_null_node_of_negative_size_is_refused() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.err(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": -1}),
    );
    qmp.ok(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": 1}),
    );
}

#[test]
fn merging_no_bitmaps_changes_nothing() {
    let daemon = Daemon::start(&["--blockdev", "null-co,node-name=n"]);
    let mut qmp = daemon.qmp();
    qmp.ok("block-dirty-bitmap-add", json!({"node": "n", "name": "b"}));
    let merge = json!({"node": "n", "target": "b", "bitmaps": []});
    qmp.ok("block-dirty-bitmap-merge", merge.clone());
    let action = json!({"type": "block-dirty-bitmap-merge", "data": merge});
    qmp.ok("transaction", json!({"actions": [action]}));
    let merge = json!({"node": "n", "target": "nosuch", "bitmaps": []});
    assert_eq!(
        qmp.err("block-dirty-bitmap-merge", merge),
        "Dirty bitmap 'nosuch' not found"
    );
}

#[test]
fn an_iothread_in_use_is_not_deleted() {
    let daemon = Daemon::start(&[
        "--object",
        "iothread,id=io0",
        "--blockdev",
        "null-co,node-name=n",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd",
        "--export",
        "nbd,id=e,node-name=n,iothread=io0",
    ]);
    let mut qmp = daemon.qmp();
    assert_eq!(
        qmp.err("object-del", json!({"id": "io0"})),
        "object 'io0' is in use, can not be deleted"
    );
    qmp.ok("block-export-del", json!({"id": "e"}));
    qmp.ok("object-del", json!({"id": "io0"}));
}

#[test]
fn a_list_in_a_file_has_two_names_and_both_work() {
    let daemon = Daemon::start(&[]);
    std::fs::write(daemon.path("rules"), r#"{"policy": "allow"}"#).unwrap();
    let mut qmp = daemon.qmp();
    for name in ["authz-list-file", "authz-listfile"] {
        let object = json!({"qom-type": name, "id": "af", "filename": daemon.text("rules")});
        qmp.ok("object-add", object);
        let decision = qmp.ok("x-authz-check", json!({"id": "af", "identity": "me"}));
        assert_eq!(decision, json!({"allowed": true}));
        qmp.ok("object-del", json!({"id": "af"}));
    }
}

#[test]
fn the_data_of_a_secret_is_not_told() {
    let daemon = Daemon::start(&["--object", "secret,id=s,data=hunter2"]);
    let mut qmp = daemon.qmp();
    assert_eq!(
        qmp.err("qom-get", json!({"path": "s", "property": "data"})),
        "Property 'secret.data' is not readable"
    );
    for (command, arguments) in [
        ("qom-list", json!({"path": "s"})),
        ("qom-list-get", json!({"paths": ["s", "/objects"]})),
        ("x-outport-config", json!({})),
    ] {
        let told = qmp.ok(command, arguments).to_string();
        assert!(!told.contains("hunter2"), "{told}");
    }
    assert!(!daemon.log().contains("hunter2"));
}

#[test]
fn a_regular_file_at_the_path_of_a_socket_stays() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    std::fs::write(daemon.path("image"), "data").unwrap();
    let addr = json!({"type": "unix", "data": {"path": daemon.text("image")}});
    let nbd = qmp.err("nbd-server-start", json!({"addr": addr}));
    assert!(nbd.contains("is no socket"), "{nbd}");
    let backend = json!({"type": "socket", "data": {"addr": addr}});
    let chardev = qmp.err("chardev-add", json!({"id": "c", "backend": backend}));
    assert!(chardev.contains("is no socket"), "{chardev}");
    assert_eq!(std::fs::read(daemon.path("image")).unwrap(), b"data");
}

#[test]
fn socket_files_go_with_the_daemon() {
    for ending in ["quit", "TERM"] {
        let mut daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"]);
        let mut qmp = daemon.qmp();
        let addr = json!({"type": "unix", "data": {"path": daemon.text("more")}});
        let backend = json!({"type": "socket", "data": {"addr": addr}});
        qmp.ok("chardev-add", json!({"id": "c", "backend": backend}));
        assert!(daemon.path("nbd").exists() && daemon.path("more").exists());
        match ending {
            "quit" => _ = qmp.ok("quit", json!({})),
            signal => daemon.signal(signal),
        }
        assert!(daemon.wait().success());
        for name in ["nbd", "more", "qmp"] {
            assert!(!daemon.path(name).exists(), "{name} after {ending}");
        }
    }
}

#[test]
fn waiting_for_a_client_does_not_defer_a_signal() {
    let mut daemon = Daemon::start(&["--chardev", "socket,id=w,path={}/w,server=on,wait=on"]);
    eventually("it waits", || daemon.path("w").exists());
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    assert!(!daemon.path("w").exists());
}

#[test]
fn waiting_for_a_client_at_run_time_holds_up_only_who_asked() {
    let other = "socket,id=n,path={}/qmp2,server=on,wait=off";
    let daemon = Daemon::start(&["--chardev", other, "--monitor", "n"]);
    let mut asks = daemon.qmp();
    let addr = json!({"type": "unix", "data": {"path": daemon.text("w")}});
    let backend = json!({"type": "socket", "data": {"addr": addr, "wait": true}});
    let add = json!({"execute": "chardev-add", "arguments": {"id": "w", "backend": backend}});
    asks.send(add.to_string().as_bytes());
    eventually("it waits", || daemon.path("w").exists());
    let mut other = Qmp::negotiated(&daemon.path("qmp2"));
    other.ok(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n"}),
    );
    let _client = std::os::unix::net::UnixStream::connect(daemon.path("w")).unwrap();
    assert_eq!(asks.answer().unwrap(), json!({"return": {}}));
}

#[test]
fn damage_names_what_lists_it() {
    if !has("qemu-img") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let path = daemon.text("disk");
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "1M"]);
    let file = json!({"driver": "file", "filename": path});
    let node = json!({"driver": "qcow2", "node-name": "n", "file": file});
    let image = std::fs::read(&path).unwrap();
    // The header's place for the L1 table: unaligned, behind the file, on top of the header.
    for offset in [3_u64, 1 << 40, 0] {
        let mut damaged = image.clone();
        damaged[40..48].copy_from_slice(&offset.to_be_bytes());
        std::fs::write(&path, damaged).unwrap();
        let said = qmp.err("blockdev-add", node.clone());
        assert!(said.ends_with("qemu-img check lists the damage"), "{said}");
    }
    // An L1 entry that leads behind the file is met when it is used.
    let at = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    let mut damaged = image;
    damaged[at..at + 8].copy_from_slice(&(1_u64 << 63 | 1 << 40).to_be_bytes());
    std::fs::write(&path, damaged).unwrap();
    qmp.ok("blockdev-add", node);
    let address = json!({"type": "unix", "data": {"path": daemon.text("nbd")}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e"}),
    );
    let uri = format!("nbd+unix:///e?socket={}", daemon.text("nbd"));
    let read = std::process::Command::new("qemu-io")
        .args(["-r", "-f", "raw", "-c", "read 0 64k", &uri])
        .output();
    assert!(read.unwrap().status.code().is_some());
    qmp.ok("query-block-exports", json!({}));
    assert_eq!(qmp.event("BLOCK_IMAGE_CORRUPTED")["node-name"], "n");
    assert!(daemon.log().contains("qemu-img check"), "{}", daemon.log());
}
