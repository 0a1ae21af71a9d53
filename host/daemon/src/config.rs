//! The configuration: the commands that would make what there is now.
//!
//! Control plane. What was asked for is kept as it was asked for; what is gone since is left out
//! when it is told, so nobody has to tell this module of removals.

use std::cell::RefCell;
use std::collections::BTreeSet;

use hashlink::LinkedHashMap;
use outport_qmp::Command;
use outport_qmp::de::{self, Mode};
use outport_qmp::types::block_core::BlockdevOptions;
use outport_qmp::types::block_export::{BlockExportOptions, NbdServerOptions};
use outport_qmp::types::char::ChardevAdd;
use outport_qmp::types::control::{AllowPaths, ConfigCommand};
use outport_qmp::types::qom::ObjectBranch;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::exports::Exports;
use crate::graph::Graph;
use crate::nbd_server::NbdServers;

/// Entries of what is gone are dropped when there are this many more than twice those that are
/// there: looking each time would make every command look at everything.
const STALE_MAX: usize = 64;

/// What was asked for, by name and in order.
#[derive(Debug, Default)]
pub(crate) struct Config {
    nodes: RefCell<LinkedHashMap<String, BlockdevOptions>>,
    exports: RefCell<LinkedHashMap<String, BlockExportOptions>>,
    servers: RefCell<Vec<NbdServerOptions>>,
}

impl Config {
    /// A node was added, or has other options now.
    pub(crate) fn node_added(&self, graph: &Graph, options: BlockdevOptions) {
        let mut nodes = self.nodes.borrow_mut();
        nodes.insert(options.node_name.clone().unwrap_or_default(), options);
        if nodes.len() > 2 * graph.len() + STALE_MAX {
            nodes.retain(|name, _| graph.find(name).is_some());
        }
    }

    /// A node has other options now. It may live inside those of its parent, and name children that
    /// live inside its own.
    pub(crate) fn node_reopened(&self, graph: &Graph, options: BlockdevOptions) {
        let Some(name) = options.node_name.clone() else {
            return;
        };
        let mut nodes = self.nodes.borrow_mut();
        let Ok(mut new) = serde_json::to_value(&options) else {
            return;
        };
        for known in nodes.values_mut() {
            let Ok(mut value) = serde_json::to_value(&*known) else {
                continue;
            };
            let Some(old) = defined(&mut value, &name) else {
                continue;
            };
            spell_out(graph, &name, old, &mut new);
            *old = new.clone();
            if let Ok(changed) = de::from_value(&value, Mode::Typed) {
                *known = changed;
            }
        }
    }

    /// An export was added.
    pub(crate) fn export_added(&self, exports: &Exports, options: BlockExportOptions) {
        let mut list = self.exports.borrow_mut();
        list.insert(options.id.clone(), options);
        if list.len() > 2 * exports.len() + STALE_MAX {
            list.retain(|id, _| exports.has(id));
        }
    }

    /// An NBD server was started.
    pub(crate) fn server_started(&self, running: &NbdServers, options: NbdServerOptions) {
        let mut list = self.servers.borrow_mut();
        list.retain(|other| other.id != options.id && running.running(other.id.as_deref()).is_ok());
        list.push(options);
    }
}

/// Where a node is defined inside these options.
fn defined<'v>(value: &'v mut Value, name: &str) -> Option<&'v mut Value> {
    if value.get("node-name").and_then(Value::as_str) == Some(name) {
        return Some(value);
    }
    let members = value.as_object_mut()?.values_mut();
    members
        .filter(|it| it.is_object())
        .find_map(|it| defined(it, name))
}

/// Children that live inside a node cannot be named: nobody would have added them.
fn spell_out(graph: &Graph, name: &str, old: &Value, new: &mut Value) {
    let Some(members) = new.as_object_mut() else {
        return;
    };
    for (role, child) in members.iter_mut() {
        let Some(named) = child.as_str() else {
            continue;
        };
        let inside = graph.child_in(name, role).as_deref() == Some(named)
            && graph.find(named).is_some_and(|entry| !entry.owned);
        if let Some(definition) = old.get(role).filter(|it| inside && it.is_object()) {
            *child = definition.clone();
        }
    }
}

/// The commands, each after those that it needs. The data of a secret is left out: only a secret
/// in a file, or an encrypted one, can be loaded again.
pub(crate) fn dump(daemon: &Daemon) -> Vec<ConfigCommand> {
    let mut commands = Vec::new();
    for path in daemon.policy.borrow().allowed() {
        let path = path.display().to_string();
        commands.push(Command::AllowPaths(AllowPaths { path }));
    }
    for device in daemon.chardevs.borrow().iter() {
        commands.push(Command::ChardevAdd(ChardevAdd {
            id: device.id().to_owned(),
            backend: device.backend().to_qmp(),
        }));
    }
    for mut options in daemon.objects.borrow().options() {
        if let ObjectBranch::Secret(secret) = &mut options.branch
            && secret.keyid.is_none()
        {
            secret.data = None;
        }
        commands.push(Command::ObjectAdd(options));
    }
    nodes(daemon, &mut commands);
    let servers = daemon.config.servers.borrow();
    let is_running =
        |options: &&NbdServerOptions| daemon.nbd.running(options.id.as_deref()).is_ok();
    let servers = servers.iter().filter(is_running).cloned();
    commands.extend(servers.map(|options| Command::NbdServerStart(options.into())));
    let exports = daemon.config.exports.borrow();
    let exports = exports
        .values()
        .filter(|options| daemon.exports.has(&options.id));
    commands.extend(exports.cloned().map(Command::BlockExportAdd));
    let told = |command: Command| ConfigCommand {
        execute: command.name().to_owned(),
        arguments: command.arguments(),
    };
    commands.into_iter().map(told).collect()
}

/// Nodes after the nodes that they use.
fn nodes(daemon: &Daemon, commands: &mut Vec<Command>) {
    let graph = daemon.graph.borrow();
    let nodes = daemon.config.nodes.borrow();
    let mut told = BTreeSet::new();
    for name in nodes.keys() {
        tell(&graph, &nodes, name, &mut told, commands);
    }
}

fn tell(
    graph: &Graph,
    nodes: &LinkedHashMap<String, BlockdevOptions>,
    name: &str,
    told: &mut BTreeSet<String>,
    commands: &mut Vec<Command>,
) {
    if !told.insert(name.to_owned()) {
        return;
    }
    for (_, child) in graph.children(name) {
        tell(graph, nodes, child, told, commands);
    }
    if graph.find(name).is_some_and(|entry| entry.owned) {
        let asked = nodes.get(name).cloned().map(|mut options| {
            options.active = (!graph.is_active(name)).then_some(false);
            options
        });
        commands.extend(asked.map(Command::BlockdevAdd));
    }
}
