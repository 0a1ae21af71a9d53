//! Metadata contexts that plugins bring, over NBD: offered, answered, withdrawn when they break.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write;

use outport_test_guests as guests;
use outport_tests::nbd::Request;
use outport_tests::nbd::wire::{cmd, opt};
use outport_tests::{Daemon, Server, eventually};
use serde_json::{Value, json};

const BASE: &str = "base:allocation";
const OURS: &str = "x-test:all";

fn serving(plugin: &[u8]) -> Daemon {
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let path = daemon.path("plugin.wasm");
    std::fs::write(&path, plugin).unwrap();
    let object = json!({"qom-type": "wasm-plugin", "id": "p", "filename": path,
                        "allow-unpinned": true, "call-time-max-ms": 30});
    daemon.qmp.ok("object-add", object);
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20,
                      "read-zeroes": true});
    daemon.qmp.ok("blockdev-add", node);
    daemon
        .qmp
        .ok("block-export-add", export(json!([{"plugin": "p"}])));
    daemon
}

fn export(contexts: Value) -> Value {
    json!({"type": "nbd", "id": "e", "node-name": "n", "name": "e", "metadata-contexts": contexts})
}

fn listed(daemon: &Daemon) -> Vec<String> {
    let mut haggle = daemon.haggle();
    haggle.structured_replies().unwrap();
    let told = haggle
        .meta_contexts(opt::LIST_META_CONTEXT, "e", &[])
        .unwrap();
    told.into_iter().map(|(_, name)| name).collect()
}

/// Status of the first extent of each context that was selected, by id.
fn status(daemon: &Daemon, names: &[&str]) -> Result<Vec<(String, u32)>, u32> {
    let mut haggle = daemon.haggle();
    haggle.structured_replies().unwrap();
    let selected = haggle
        .meta_contexts(opt::SET_META_CONTEXT, "e", names)
        .unwrap();
    assert_eq!(selected.len(), names.len());
    let mut client = haggle.go("e").unwrap();
    let told = client.block_status(0, 0, 1 << 20).unwrap()?;
    let name = |id| {
        selected
            .iter()
            .find(|(other, _)| *other == id)
            .unwrap()
            .1
            .clone()
    };
    Ok(told
        .iter()
        .map(|(id, extents)| (name(*id), extents[0].1))
        .collect())
}

#[test]
fn a_vendor_s_context_stands_beside_the_hosts() {
    let daemon = serving(&guests::describes());
    assert_eq!(listed(&daemon), [BASE, OURS]);
    let mut told = status(&daemon, &[OURS, BASE]).unwrap();
    told.sort();
    assert_eq!(told, [(BASE.to_owned(), 3), (OURS.to_owned(), 5)]);
}

#[test]
fn what_cannot_be_brought_is_refused_at_once() {
    let mut daemon = serving(&guests::describes());
    daemon.qmp.ok("block-export-del", json!({"id": "e"}));
    for (contexts, said) in [
        (
            json!([{"plugin": "x"}]),
            "No metadata context plugin with id 'x'",
        ),
        (
            json!([{"plugin": "p", "config": {"x": 1}}]),
            "Parameter 'x' is unexpected",
        ),
        (
            json!([{"plugin": "p"}, {"plugin": "p"}]),
            "Two plugins bring the metadata context 'x-test:all'",
        ),
    ] {
        let (_, desc) = daemon.qmp.err("block-export-add", export(contexts));
        assert_eq!(desc, said);
    }
    daemon.qmp.ok("object-del", json!({"id": "p"}));
}

#[test]
fn a_broken_one_is_withdrawn_and_never_the_export() {
    for (plugin, fault) in [
        (guests::context_traps(), "trap"),
        (guests::context_spins(), "deadline"),
        (guests::context_lies(), "bad-answer"),
    ] {
        let mut daemon = serving(&plugin);
        assert!(status(&daemon, &[OURS]).is_err(), "{fault}");
        assert_eq!(listed(&daemon), [BASE], "{fault}");
        assert_eq!(status(&daemon, &[BASE]).unwrap()[0].1, 3, "{fault}");
        assert!(daemon.client("e").read(0, 512).unwrap().is_ok());
        let events = eventually("the fault is told", || {
            let events = daemon.qmp.events("OUTPORT_PLUGIN_FAULT");
            (!events.is_empty()).then_some(events)
        });
        let told = (&events[0]["data"]["fault"], &events[0]["data"]["export"]);
        assert_eq!(told, (&json!(fault), &json!("e")));
    }
}

#[test]
fn a_provider_that_spins_holds_no_other_request_up() {
    let daemon = serving(&guests::context_spins());
    let mut haggle = daemon.haggle();
    haggle.structured_replies().unwrap();
    let selected = haggle.meta_contexts(opt::SET_META_CONTEXT, "e", &[OURS]);
    assert_eq!(selected.unwrap().len(), 1);
    let mut client = haggle.go("e").unwrap();
    let requests = [
        (cmd::BLOCK_STATUS, 1),
        (cmd::CACHE, 2),
        (cmd::FLUSH, 3),
        (cmd::BLOCK_STATUS, 4),
    ];
    let mut message = Vec::new();
    for (kind, cookie) in requests {
        let request = Request {
            kind,
            cookie,
            len: if kind == cmd::FLUSH { 0 } else { 4096 },
            ..Request::default()
        };
        message.extend(request.bytes());
    }
    client.socket().write_all(&message).unwrap();
    let outcomes: Vec<_> = (0..4).map(|_| client.any_outcome().unwrap()).collect();
    // What the provider is not asked for is answered first; its own requests fail in the end.
    let cookies: Vec<u64> = outcomes.iter().map(|(cookie, _)| *cookie).collect();
    assert!(
        cookies[..2].iter().all(|it| [2, 3].contains(it)),
        "{outcomes:?}"
    );
    for (cookie, outcome) in outcomes {
        assert_eq!(outcome.is_ok(), [2, 3].contains(&cookie), "{cookie}");
    }
    assert!(client.read(0, 512).unwrap().is_ok());
}
