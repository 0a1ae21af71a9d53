//! A request that hangs holds up no command about anything else.
//!
//! A blkdebug rule suspends a client's write. While it is, every command of `query-commands` is
//! issued, and each has to answer before the write goes on. Nothing is timed: after each answer the
//! daemon is asked whether the write still is suspended. (QSD drains all nodes when an export is
//! added, which would wait for it: defect 8 of the specification.)

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;

use outport_tests::nbd::Client;
use outport_tests::{Daemon, Server, TempImage, eventually};
use serde_json::{Value, json};

/// Commands that are about everything, so also about the node that hangs; tried at the end.
const ABOUT_ALL: [&str; 3] = ["quit", "nbd-server-stop", "blockdev-set-active"];

/// What is done to other nodes, exports and objects, in this order. A command that is not here is
/// sent without arguments: it answers with a list, or says what is missing.
fn script(image: &TempImage, daemon: &Daemon) -> Vec<(&'static str, Value)> {
    let new = daemon.path("new.img");
    let file = |name: &str| json!({"driver": "file", "node-name": name, "filename": image.str()});
    let export = json!({"type": "nbd", "id": "e", "node-name": "r", "writable": true});
    let inet = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    let created = json!({"driver": "file", "filename": new, "size": 1 << 20});
    vec![
        ("blockdev-add", file("f")),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "file": "f"}),
        ),
        ("block-export-add", export),
        ("query-block-exports", json!({})),
        ("block-export-del", json!({"id": "e", "mode": "hard"})),
        ("nbd-server-start", json!({"addr": inet})),
        ("nbd-server-add", json!({"device": "r", "name": "old"})),
        ("nbd-server-remove", json!({"name": "old"})),
        ("block_resize", json!({"node-name": "r", "size": 4 << 20})),
        (
            "blockdev-reopen",
            json!({"options": [
            {"driver": "raw", "node-name": "r", "file": "f", "read-only": true}]}),
        ),
        ("query-named-block-nodes", json!({"flat": false})),
        ("query-blockstats", json!({"query-nodes": true})),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": created}),
        ),
        ("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        ("qom-list", json!({"path": "/objects"})),
        (
            "qom-get",
            json!({"path": "/objects/io0", "property": "poll-max-ns"}),
        ),
        (
            "qom-set",
            json!({"path": "/objects/io0", "property": "poll-max-ns", "value": 5}),
        ),
        ("object-del", json!({"id": "io0"})),
        ("query-jobs", json!({})),
        ("transaction", json!({"actions": []})),
        ("x-query-blkdebug", json!({"node-name": "slow"})),
        ("blockdev-del", json!({"node-name": "r"})),
        ("blockdev-del", json!({"node-name": "f"})),
        // About the export that hangs: it answers, and the export goes later.
        ("block-export-del", json!({"id": "slow", "mode": "safe"})),
        ("blockdev-del", json!({"node-name": "slow"})),
        ("block-export-del", json!({"id": "slow", "mode": "hard"})),
    ]
}

fn suspended(daemon: &mut Daemon) -> bool {
    let state = daemon
        .qmp
        .ok("x-query-blkdebug", json!({"node-name": "slow"}));
    state["suspended"] == json!(["held"])
}

/// A node whose next write hangs, and a client that has just written.
fn with_hanging_write(image: &TempImage) -> (Daemon, Client) {
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let file = json!({"driver": "file", "filename": image.str()});
    let slow = json!({"driver": "blkdebug", "node-name": "slow", "image": file});
    daemon.qmp.ok("blockdev-add", slow);
    daemon.add_export("slow", true);
    let hold = json!({"node-name": "slow", "event": "pwritev", "tag": "held"});
    daemon.qmp.ok("x-blkdebug-break", hold);
    let mut client = daemon.client("slow");
    let write = client.request(0, 1, 0, 4096);
    client.send(&write, &[7; 4096]).unwrap();
    eventually("the write hangs", || suspended(&mut daemon).then_some(()));
    (daemon, client)
}

#[test]
fn every_command_answers_while_a_write_hangs() {
    let (slow, other) = (TempImage::zeroes(1 << 20), TempImage::zeroes(1 << 20));
    let (mut daemon, _client) = with_hanging_write(&slow);
    let script = script(&other, &daemon);
    let listed = daemon.qmp.ok("query-commands", json!({}));
    let listed = listed.as_array().unwrap().iter();
    let all: BTreeSet<_> = listed
        .map(|it| it["name"].as_str().unwrap().to_owned())
        .collect();
    let scripted: BTreeSet<_> = script.iter().map(|(name, _)| *name).collect();
    let rest = all
        .iter()
        .filter(|name| !scripted.contains(name.as_str()) && !ABOUT_ALL.contains(&name.as_str()));
    let rest: Vec<_> = rest.map(|name| (name.as_str(), json!({}))).collect();
    let mut answered = BTreeSet::new();
    for (name, arguments) in rest.into_iter().chain(script) {
        // What it answers is the business of other tests; here, that it does.
        let outcome = daemon.qmp.execute(name, arguments);
        assert!(
            suspended(&mut daemon),
            "{name} let the write go, or waited for it: {outcome:?}"
        );
        if outcome.is_ok() {
            answered.insert(name.to_owned());
        }
    }
    println!(
        "{} commands, of which did something: {answered:?}",
        all.len()
    );
    let listed = daemon.qmp.ok("query-block-exports", json!({}));
    assert_eq!(listed[0]["shutting-down"], json!(true), "{listed}");
    daemon
        .qmp
        .ok("x-blkdebug-resume", json!({"node-name": "slow"}));
    while daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]["id"] != "slow" {}
    assert_eq!(
        std::fs::read(slow.path()).unwrap()[..4096],
        [7; 4096],
        "the write was done"
    );
    daemon.stop();
}
