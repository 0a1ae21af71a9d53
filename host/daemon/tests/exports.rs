//! Exports: adding, the removal state machine, and what is told of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::{Value, json};
use support::*;

/// A daemon with a node `n` and an NBD server, and its monitor.
fn serving() -> (Daemon, Qmp) {
    let daemon = Daemon::start(&[
        "--blockdev",
        "null-co,node-name=n,size=1048576",
        "--blockdev",
        "null-co,node-name=ro,read-only=on",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd",
    ]);
    let qmp = daemon.qmp();
    (daemon, qmp)
}

fn export(id: &str) -> Value {
    json!({"type": "nbd", "id": id, "node-name": "n", "name": id, "writable": true})
}

#[test]
fn an_idle_export_goes_at_once() {
    let (_daemon, mut qmp) = serving();
    qmp.ok("block-export-add", export("e"));
    let listed = json!([
        {"id": "e", "type": "nbd", "node-name": "n", "shutting-down": false}
    ]);
    assert_eq!(qmp.ok("query-block-exports", json!({})), listed);
    assert_eq!(
        qmp.err("blockdev-del", json!({"node-name": "n"})),
        "Node n is in use"
    );
    qmp.ok("block-export-del", json!({"id": "e"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(qmp.ok("query-block-exports", json!({})), json!([]));
    qmp.ok("blockdev-del", json!({"node-name": "n"}));
    let gone = qmp.err("block-export-del", json!({"id": "e"}));
    assert_eq!(gone, "Export 'e' is not found");
}

#[test]
fn safe_deletion_leaves_a_used_export_alone() {
    let (daemon, mut qmp) = serving();
    qmp.ok("block-export-add", export("e"));
    let mut client = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    assert_eq!(client.read(0, 512), Some(vec![0; 512]));
    assert_eq!(
        qmp.err("block-export-del", json!({"id": "e"})),
        "export 'e' still in use"
    );
    assert_eq!(client.read(0, 512), Some(vec![0; 512]), "nothing changed");
    drop(client);
    eventually("the client has left", || {
        qmp.execute("block-export-del", json!({"id": "e"}))
            .get("return")
            .is_some()
    });
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert!(qmp.events.is_empty());
}

#[test]
fn hard_deletion_cuts_clients_and_tells_once() {
    let (daemon, mut qmp) = serving();
    qmp.ok("block-export-add", export("e"));
    qmp.ok("block-export-add", export("other"));
    let mut client = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    let mut neighbour = Nbd::enter(&daemon.path("nbd"), "other").unwrap();
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert!(client.is_cut());
    assert!(
        Nbd::enter(&daemon.path("nbd"), "e").is_none(),
        "the name is gone"
    );
    assert_eq!(neighbour.read(0, 512), Some(vec![0; 512]));
    // The id is free as soon as the event was sent, and no second event comes.
    qmp.ok("block-export-add", export("e"));
    assert!(Nbd::enter(&daemon.path("nbd"), "e").is_some());
    qmp.ok("query-version", json!({}));
    assert!(qmp.events.is_empty());
}

#[test]
fn stopping_the_server_deletes_its_exports_first() {
    let (daemon, mut qmp) = serving();
    qmp.ok("block-export-add", export("a"));
    qmp.ok("block-export-add", export("b"));
    let mut client = Nbd::enter(&daemon.path("nbd"), "a").unwrap();
    qmp.ok("nbd-server-stop", json!({}));
    let mut ids: Vec<_> = qmp
        .events
        .drain(..)
        .map(|event| event["data"]["id"].clone())
        .collect();
    ids.sort_by_key(Value::to_string);
    assert_eq!(ids, ["a", "b"]);
    assert!(client.is_cut());
    assert!(!daemon.path("nbd").exists());
    assert_eq!(
        qmp.err("nbd-server-stop", json!({})),
        "NBD server not running"
    );
    assert_eq!(
        qmp.err("block-export-add", export("a")),
        "NBD server not running"
    );
    // What failed left nothing behind.
    qmp.ok("blockdev-del", json!({"node-name": "n"}));
}

#[test]
fn the_old_commands_work_by_id() {
    let (_daemon, mut qmp) = serving();
    qmp.ok("nbd-server-add", json!({"device": "ro", "writable": true}));
    assert_eq!(qmp.ok("query-block-exports", json!({}))[0]["id"], "ro");
    assert_eq!(
        qmp.err("nbd-server-add", json!({"device": "n", "name": "1x"})),
        "Invalid block export id"
    );
    qmp.ok("nbd-server-remove", json!({"name": "ro"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "ro"}));
}

#[test]
fn iothreads_in_use_stay() {
    let (daemon, mut qmp) = serving();
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    let mut wanted = export("e");
    wanted["iothread"] = json!("io0");
    qmp.ok("block-export-add", wanted);
    let error = qmp.err("object-del", json!({"id": "io0"}));
    assert_eq!(error, "object 'io0' is in use, can not be deleted");
    let mut client = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    assert_eq!(client.read(0, 512), Some(vec![0; 512]));
    drop(client);
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("object-del", json!({"id": "io0"}));
    let objects = qmp.ok("qom-list", json!({"path": "/objects"}));
    let monitor = json!({"name": "compat_monitor0", "type": "child<monitor-qmp>"});
    assert_eq!(
        objects,
        json!([{"name": "type", "type": "string"}, monitor])
    );
}

#[test]
fn resize_is_refused_below_an_export() {
    let (_daemon, mut qmp) = serving();
    assert_eq!(
        qmp.err("block_resize", json!({"node-name": "n", "size": 2 << 20})),
        "Image format driver does not support resize"
    );
    qmp.ok("block-export-add", export("e"));
    assert_eq!(
        qmp.err("block_resize", json!({"node-name": "n", "size": 1 << 20})),
        "Permission conflict on node 'n': permissions 'resize' are both required by an unnamed \
         block device (uses node 'n' as 'root' child) and unshared by an unnamed block device \
         (uses node 'n' as 'root' child)."
    );
}
