//! `blockdev-reopen`: other options for nodes that are in use.
//!
//! On the control thread. All nodes are looked at first, then the graph is changed as a whole or
//! not at all, then the data path follows: requests that came before end where they came in, later
//! ones take the new way. Nobody is refused meanwhile. What a driver cannot change is refused.

use std::sync::Arc;

use outport_block::Node;
use outport_block::node::Kind;
use outport_block::window::{OldWindow, Window};
use outport_qmp::Error;
use outport_qmp::types::block_core::{
    BlockdevDriverOptions, BlockdevOptions, BlockdevRef, BlockdevRefOrNull,
};
use serde_json::Value;

use super::base::{Common, Inherited};
use super::native::{check_window, not_negative};
use crate::daemon::Daemon;
use crate::graph::{Claim, EdgeId, Entry, Exchanged, Graph, Use, User};

/// Members that every node has: they may change, or are dealt with by name.
const COMMON: [&str; 9] = [
    "driver",
    "node-name",
    "discard",
    "cache",
    "active",
    "read-only",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
];

/// What becomes of one node.
struct Change {
    node: Arc<Node>,
    common: Common,
    options: Vec<(String, Value)>,
    exchange: Option<Exchange>,
}

/// Another child.
enum Exchange {
    Window(Window, Use),
    Backing(Arc<Node>),
}

/// The members of a node's options, nested ones by dotted names, without those that all have.
pub(super) fn flat(options: &BlockdevOptions) -> Vec<(String, Value)> {
    let mut members = Vec::new();
    if let Ok(Value::Object(all)) = serde_json::to_value(options) {
        for (name, value) in &all {
            if !COMMON.contains(&name.as_str()) {
                flatten(name, value, &mut members);
            }
        }
    }
    members
}

fn flatten(name: &str, value: &Value, into: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(members) => {
            for (member, value) in members {
                flatten(&format!("{name}.{member}"), value, into);
            }
        }
        Value::Array(elements) => {
            for (number, value) in elements.iter().enumerate() {
                flatten(&format!("{name}.{number}"), value, into);
            }
        }
        leaf => into.push((name.to_owned(), leaf.clone())),
    }
}

/// Gives nodes other options, all of them or none.
///
/// # Errors
/// In QEMU's words; nothing changed then.
pub(crate) async fn reopen(daemon: &Daemon, options: Vec<BlockdevOptions>) -> Result<(), Error> {
    let changes = {
        let graph = daemon.graph.borrow();
        let plans = options.into_iter().map(|options| plan(&graph, options));
        plans.collect::<Result<Vec<_>, _>>()?
    };
    for change in &changes {
        let name = change.node.name();
        if daemon.exports.is_bypassed(name) {
            return Err(Error::generic(format!(
                "Node '{name}' cannot be reopened: a file with 'passthrough' is open, which reads it"
            )));
        }
    }
    let exchanged = apply(&mut daemon.graph.borrow_mut(), &changes)?;
    // What is left behind stays in use until the last request has left it.
    let left_behind: Vec<(String, Option<EdgeId>)> = exchanged
        .iter()
        .map(|exchanged| {
            let name = exchanged.old_child().to_owned();
            let mut graph = daemon.graph.borrow_mut();
            let purpose = Use::Direct(Claim::NONE);
            let edge = graph.attach(User::Block, &name, "reopen", purpose).ok();
            (name, edge)
        })
        .collect();
    follow(daemon, changes).await;
    for (name, edge) in left_behind {
        let is_orphan = {
            let mut graph = daemon.graph.borrow_mut();
            if let Some(edge) = edge {
                graph.detach(edge);
            }
            graph.is_orphan(&name)
        };
        if is_orphan {
            super::close(daemon, name).await;
        }
    }
    Ok(())
}

/// Changes the graph; on an error it is as before.
fn apply(graph: &mut Graph, changes: &[Change]) -> Result<Vec<Exchanged>, Error> {
    let flags = |change: &Change| (change.node.is_read_only(), change.node.unmaps());
    let before: Vec<_> = changes.iter().map(flags).collect();
    for change in changes.iter().filter(|change| !change.common.read_only) {
        change.node.set_options(false, change.common.unmap);
    }
    let mut exchanged = Vec::new();
    let mut outcome = Ok(());
    for change in changes {
        let name = change.node.name();
        let done = match &change.exchange {
            None => Ok(None),
            Some(Exchange::Window(window, purpose)) => {
                graph.exchange(name, "file", window.child.name(), *purpose)
            }
            Some(Exchange::Backing(node)) => {
                graph.exchange(name, "backing", node.name(), Use::Backing)
            }
        };
        match done {
            Ok(done) => exchanged.extend(done),
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    let refused =
        |change: &&Change| change.common.read_only && graph.has_writers(change.node.name());
    if outcome.is_ok()
        && let Some(change) = changes.iter().find(refused)
    {
        outcome = Err(Error::generic(format!(
            "Read-only block node '{}' cannot support read-write users",
            change.node.name()
        )));
    }
    if let Err(error) = outcome {
        for exchanged in exchanged.into_iter().rev() {
            graph.restore(exchanged);
        }
        for (change, (read_only, unmap)) in changes.iter().zip(before) {
            change.node.set_options(read_only, unmap);
        }
        return Err(error);
    }
    for change in changes {
        let common = &change.common;
        change.node.set_options(common.read_only, common.unmap);
        if let Some(entry) = graph.find_mut(change.node.name()) {
            entry.detect_zeroes = common.detect_zeroes;
            entry.options = change.options.clone();
        }
    }
    Ok(exchanged)
}

/// The data path follows; returns when nobody is on the old way.
async fn follow(daemon: &Daemon, changes: Vec<Change>) {
    let mut old_windows: Vec<OldWindow> = Vec::new();
    for change in changes {
        match (change.exchange, change.node.kind()) {
            (Some(Exchange::Window(window, _)), Kind::Raw(raw)) => {
                old_windows.push(raw.exchange(window));
            }
            (Some(Exchange::Backing(backing)), Kind::Image(image)) => {
                let image = image.clone();
                let exchange = || async move { image.exchange_backing(backing).await };
                let done = match daemon.default_iothread() {
                    Ok(iothread) => iothread.run(exchange).await,
                    Err(_) => Some(exchange().await),
                };
                if !matches!(done, Some(Ok(()))) {
                    tracing::error!(node = change.node.name(), "backing node not exchanged");
                }
            }
            _ => {}
        }
    }
    for old in old_windows {
        old.left().await;
    }
}

/// What one element asks for.
fn plan(graph: &Graph, options: BlockdevOptions) -> Result<Change, Error> {
    let name = options.node_name.clone();
    let name = name.ok_or_else(|| Error::generic("node-name not specified"))?;
    let entry = graph
        .find(&name)
        .ok_or_else(|| Error::no_such_node(&name))?;
    let members = flat(&options);
    if options.driver() != entry.node.driver() {
        check_not_reset(entry.options.iter(), &members)?;
        return Err(cannot_change("driver"));
    }
    let common = Common::of(&options, &Inherited::default())?;
    let mut kept = members.clone();
    // The children of an image may change, with conditions of their own.
    let mut apart = false;
    let exchange = match options.branch {
        BlockdevDriverOptions::Raw(raw) => {
            let offset = not_negative("offset", raw.offset)?;
            let size = not_negative("size", raw.size)?;
            let child = child(graph, entry, "file", &raw.file, &members)?;
            check_window(offset.unwrap_or(0), size, child.size())?;
            kept.clear();
            window(entry, child, offset, size)
        }
        BlockdevDriverOptions::Qcow2(qcow2) => {
            let file = child(graph, entry, "file", &qcow2.file, &members)?;
            if graph.child_in(&name, "file").as_deref() != Some(file.name()) {
                return Err(cannot_change("file"));
            }
            kept.retain(|(name, _)| !is_child(name));
            apart = true;
            backing(graph, entry, qcow2.backing.as_ref(), &members)?
        }
        _ => None,
    };
    if !matches!(entry.node.kind(), Kind::Raw(_)) {
        let old = entry.options.iter();
        check_kept(old.filter(|(name, _)| !apart || !is_child(name)), &kept)?;
    }
    check_common(entry, &common)?;
    Ok(Change {
        node: entry.node.clone(),
        common,
        options: members,
        exchange,
    })
}

/// Whether a member of an image is about `file` or `backing`.
fn is_child(member: &str) -> bool {
    let first = member.split('.').next();
    matches!(first, Some("file" | "backing"))
}

/// Members that a driver cannot change are as they were.
fn check_kept<'o>(
    old: impl Iterator<Item = &'o (String, Value)>,
    new: &[(String, Value)],
) -> Result<(), Error> {
    let old: Vec<_> = old.collect();
    for (name, value) in new {
        let same = |member: &&&(String, Value)| member.0 == *name && member.1 == *value;
        if !old.iter().any(|member| same(&member)) {
            return Err(cannot_change(name));
        }
    }
    check_not_reset(old.into_iter(), new)
}

/// Members that were given are given again.
fn check_not_reset<'o>(
    old: impl Iterator<Item = &'o (String, Value)>,
    new: &[(String, Value)],
) -> Result<(), Error> {
    for (name, _) in old {
        if !new.iter().any(|(other, _)| other == name) {
            return Err(Error::generic(format!(
                "Option '{name}' cannot be reset to its default value"
            )));
        }
    }
    Ok(())
}

/// What all nodes have, and only some can change.
fn check_common(entry: &Entry, common: &Common) -> Result<(), Error> {
    let node = &entry.node;
    let refused = |option: &str| {
        let (name, driver) = (node.name(), node.driver());
        Err(Error::generic(format!(
            "Changing '{option}' of node '{name}' (driver '{driver}') is not supported"
        )))
    };
    let becomes_writable = node.is_read_only() && !common.read_only;
    match node.kind() {
        Kind::Image(_) if node.is_read_only() != common.read_only => refused("read-only"),
        Kind::File(file) if becomes_writable && file.is_read_only() => refused("read-only"),
        Kind::File(_) if entry.direct != common.direct => refused("cache.direct"),
        Kind::File(_) if entry.no_flush != common.no_flush => refused("cache.no-flush"),
        _ => Ok(()),
    }
}

/// The child that a reference or a definition means.
fn child(
    graph: &Graph,
    entry: &Entry,
    role: &str,
    child: &BlockdevRef,
    members: &[(String, Value)],
) -> Result<Arc<Node>, Error> {
    let name = entry.node.name();
    let now = graph.child_in(name, role);
    match child {
        BlockdevRef::Reference(child) => {
            let found = graph.find(child);
            let found = found.ok_or_else(|| Error::no_such_device_or_node("", child))?;
            if graph.reaches(child, name) {
                let article = if role == "file" {
                    "a file"
                } else {
                    "a backing"
                };
                return Err(Error::generic(format!(
                    "Making '{child}' {article} child of '{name}' would create a cycle"
                )));
            }
            Ok(found.node.clone())
        }
        BlockdevRef::Definition(_) => {
            let prefix = format!("{role}.");
            let mine = |(name, _): &&(String, Value)| name.starts_with(&prefix);
            let new: Vec<_> = members.iter().filter(mine).cloned().collect();
            check_kept(entry.options.iter().filter(mine), &new)?;
            let now = now.and_then(|now| graph.find(&now));
            now.map(|now| now.node.clone())
                .ok_or_else(|| cannot_change(role))
        }
    }
}

fn window(
    entry: &Entry,
    child: Arc<Node>,
    offset: Option<u64>,
    size: Option<u64>,
) -> Option<Exchange> {
    let Kind::Raw(raw) = entry.node.kind() else {
        return None;
    };
    let now = raw.get();
    let purpose = match (offset, size) {
        (None | Some(0), None) => Use::Filter,
        _ => Use::Window,
    };
    let offset = offset.unwrap_or(0);
    let same = Arc::ptr_eq(&now.child, &child) && now.offset == offset && now.size == size;
    let window = Window {
        child,
        offset,
        size,
    };
    (!same).then_some(Exchange::Window(window, purpose))
}

fn backing(
    graph: &Graph,
    entry: &Entry,
    asked: Option<&BlockdevRefOrNull>,
    members: &[(String, Value)],
) -> Result<Option<Exchange>, Error> {
    let name = entry.node.name();
    let now = graph.child_in(name, "backing");
    let is_none = |asked: &BlockdevRefOrNull| match asked {
        BlockdevRefOrNull::Null(()) => true,
        BlockdevRefOrNull::Reference(node) => node.is_empty(),
        BlockdevRefOrNull::Definition(_) => false,
    };
    let refused = |why: &str| {
        let message = format!("Changing 'backing' of node '{name}' is not supported: {why}");
        Err(Error::generic(message))
    };
    let asked = match (asked, &now) {
        (None, Some(_)) => {
            return Err(Error::generic(format!("backing is missing for '{name}'")));
        }
        (None, None) => return Ok(None),
        (Some(asked), None) if is_none(asked) => return Ok(None),
        (Some(asked), Some(_)) if is_none(asked) => {
            return refused("a node that has one keeps one");
        }
        (Some(BlockdevRefOrNull::Reference(node)), _) => BlockdevRef::Reference(node.clone()),
        (Some(BlockdevRefOrNull::Definition(node)), _) => BlockdevRef::Definition(node.clone()),
        (Some(BlockdevRefOrNull::Null(())), _) => return Ok(None),
    };
    let child = child(graph, entry, "backing", &asked, members)?;
    let Some(now) = now.and_then(|now| graph.find(&now)) else {
        return refused("the node was opened without one");
    };
    if Arc::ptr_eq(&now.node, &child) {
        return Ok(None);
    }
    if now.node.size() != child.size() {
        return refused("the new one has another length");
    }
    Ok(Some(Exchange::Backing(child)))
}

fn cannot_change(option: &str) -> Error {
    Error::generic(format!("Cannot change the option '{option}'"))
}
