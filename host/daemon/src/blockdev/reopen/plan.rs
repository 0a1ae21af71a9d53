//! What `blockdev-reopen` asks for, node by node: what changes, and what is refused.
//!
//! Pure: looks at the graph and changes nothing. A child that was made with its parent and is
//! spelled out again is reopened with it; one that is only named stays as it is.

use std::sync::Arc;

use outport_block::Node;
use outport_block::file::FileMode;
use outport_block::image::{Change as ImageChange, NewBacking};
use outport_block::node::Kind;
use outport_block::window::Window;
use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::block_core::{
    BlockdevDriverOptions, BlockdevOptions, BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull,
};
use outport_qmp::types::block_filter::BlockdevOptionsThrottle;
use serde_json::{Map, Value};

use super::super::base::{Common, Inherited};
use super::super::native::{check_window, not_negative};
use super::{Change, Data, Throttled};
use crate::daemon::Daemon;
use crate::graph::{Entry, Graph, Use};

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

/// The members of a node's options, nested ones by dotted names, without those that all have.
pub(in super::super) fn flat(options: &BlockdevOptions) -> Vec<(String, Value)> {
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

/// What one element asks for: of its node, and of children that it spells out.
///
/// # Errors
/// In QEMU's words.
pub(super) fn plan(
    daemon: &Daemon,
    graph: &Graph,
    options: &BlockdevOptions,
) -> Result<Vec<Change>, Error> {
    let name = options.node_name.clone();
    let name = name.ok_or_else(|| Error::generic("node-name not specified"))?;
    let entry = graph
        .find(&name)
        .ok_or_else(|| Error::no_such_node(&name))?;
    let mut planning = Planning {
        daemon,
        graph,
        changes: Vec::new(),
    };
    planning.node(entry, options, &Inherited::default())?;
    Ok(planning.changes)
}

struct Planning<'g> {
    daemon: &'g Daemon,
    graph: &'g Graph,
    changes: Vec<Change>,
}

impl Planning<'_> {
    fn node(
        &mut self,
        entry: &Entry,
        options: &BlockdevOptions,
        inherited: &Inherited,
    ) -> Result<(), Error> {
        let members = flat(options);
        if options.driver() != entry.node.driver() {
            check_not_reset(entry.options.iter(), &members)?;
            return Err(cannot_change("driver"));
        }
        if options.active == Some(false) && self.graph.is_active(entry.node.name()) {
            return Err(cannot_reset("active"));
        }
        let asked = options.force_share;
        if asked.is_some_and(|asked| asked != entry.force_share) {
            return Err(cannot_change("force-share"));
        }
        let common = Common::of(options, inherited)?;
        if entry.force_share && !common.force_share {
            return Err(cannot_reset("force-share"));
        }
        let mut change = Change {
            node: entry.node.clone(),
            common,
            options: members,
            edges: Vec::new(),
            data: Data::Nothing,
        };
        match &options.branch {
            BlockdevDriverOptions::Raw(raw) => self.raw(entry, raw, &mut change)?,
            BlockdevDriverOptions::Qcow2(qcow2) => {
                let mut rest = match serde_json::to_value(qcow2) {
                    Ok(Value::Object(rest)) => rest,
                    _ => Map::default(),
                };
                for child in ["file", "backing"] {
                    rest.remove(child);
                }
                let backing = qcow2.backing.as_ref();
                self.image(entry, &qcow2.file, backing, rest, &mut change)?;
            }
            BlockdevDriverOptions::Plugin(plugin) => {
                let mut plugin = plugin.clone();
                let file = plugin.take_child("file", Mode::Typed)?;
                let file = file.ok_or_else(|| Error::missing("file"))?;
                let backing = plugin.take_backing(Mode::Typed)?;
                let rest = plugin.options;
                self.image(entry, &file, backing.as_ref(), rest, &mut change)?;
            }
            BlockdevDriverOptions::Throttle(throttle) => {
                self.throttle(entry, throttle, &mut change)?;
            }
            BlockdevDriverOptions::CopyOnRead(_) | BlockdevDriverOptions::Compress(_) => {
                return Err(Error::generic(format!(
                    "Block format '{}' used by node '{}' does not support reopening files",
                    entry.node.driver(),
                    entry.node.name()
                )));
            }
            _ => {
                check_kept(entry.options.iter(), &change.options)?;
                self.file(entry, &mut change)?;
            }
        }
        self.changes.push(change);
        Ok(())
    }

    fn throttle(
        &mut self,
        entry: &Entry,
        asked: &BlockdevOptionsThrottle,
        change: &mut Change,
    ) -> Result<(), Error> {
        let Some(throttle) = entry.node.throttle() else {
            return Ok(());
        };
        let group = self.daemon.objects.borrow();
        let group = group.throttle_group(&asked.throttle_group)?;
        let inherited = change.common.for_filter();
        let child = self.child(entry, "file", &asked.file, &change.options, &inherited)?;
        let now = self.graph.child_in(entry.node.name(), "file");
        let other = now.as_deref() != Some(child.name());
        if other {
            change
                .edges
                .push(("file", Some(child.clone()), Use::Filter));
        }
        change.data = Data::Throttle(Throttled {
            child: other.then_some(child),
            group: Some(group).filter(|it| !Arc::ptr_eq(it, &throttle.group())),
        });
        Ok(())
    }

    fn file(&self, entry: &Entry, change: &mut Change) -> Result<(), Error> {
        let Some(file) = entry.node.host_file() else {
            return Ok(());
        };
        let common = &change.common;
        let native = file.options().aio == outport_block::Aio::Native;
        if native && !common.direct {
            return Err(Error::generic(
                "aio=native was specified, but it requires cache.direct=on, which was not \
                 specified.",
            ));
        }
        let mode = FileMode {
            // What is open for writing stays so: locks and flags say who may.
            writable: !common.read_only || !file.is_read_only(),
            direct: common.direct,
            no_flush: common.no_flush,
            unmap: common.unmap,
        };
        if mode != file.mode() {
            change.data = Data::File(mode);
        }
        Ok(())
    }

    fn raw(
        &mut self,
        entry: &Entry,
        raw: &BlockdevOptionsRaw,
        change: &mut Change,
    ) -> Result<(), Error> {
        let offset = not_negative("offset", raw.offset)?;
        let size = not_negative("size", raw.size)?;
        let inherited = change.common.for_filter();
        let child = self.child(entry, "file", &raw.file, &change.options, &inherited)?;
        check_window(offset.unwrap_or(0), size, child.size())?;
        let Kind::Raw(now) = entry.node.kind() else {
            return Ok(());
        };
        let now = now.get();
        let purpose = match (offset, size) {
            (None | Some(0), None) => Use::Filter,
            _ => Use::Window,
        };
        let offset = offset.unwrap_or(0);
        if !Arc::ptr_eq(&now.child, &child) || now.offset != offset || now.size != size {
            change.edges.push(("file", Some(child.clone()), purpose));
            change.data = Data::Window(Window {
                child,
                offset,
                size,
            });
        }
        Ok(())
    }

    fn image(
        &mut self,
        entry: &Entry,
        file: &BlockdevRef,
        backing: Option<&BlockdevRefOrNull>,
        options: Map<String, Value>,
        change: &mut Change,
    ) -> Result<(), Error> {
        let name = entry.node.name();
        let inherited = change.common.for_storage();
        let primary = self.child(entry, "file", file, &change.options, &inherited)?;
        let other_file = self.graph.child_in(name, "file").as_deref() != Some(primary.name());
        if other_file && !self.graph.is_active(name) {
            // Nothing of the new file may be looked at before the node is active.
            return Err(cannot_change("file"));
        }
        let of_data_file =
            |(name, _): &&(String, Value)| name == "data-file" || name.starts_with("data-file.");
        let asked: Vec<_> = change
            .options
            .iter()
            .filter(of_data_file)
            .cloned()
            .collect();
        check_kept(entry.options.iter().filter(of_data_file), &asked)?;
        let mut image = ImageChange::default();
        if let Some(new) = self.backing(entry, backing, change)? {
            let child = match &new {
                NewBacking::Node(node) => Some(node.clone()),
                NewBacking::None => None,
            };
            change.edges.push(("backing", child, Use::Backing));
            image.backing = Some(new);
        }
        let writable = !change.common.read_only;
        let other_mode = writable == entry.node.is_read_only();
        let purpose = Use::Storage { writable };
        if other_mode || other_file {
            change.edges.push(("file", Some(primary.clone()), purpose));
        }
        image.file = other_file.then_some(primary);
        if other_mode {
            let data_file = self.graph.child_in(name, "data-file");
            let data_file = data_file.and_then(|it| self.graph.find(&it));
            if let Some(data_file) = data_file {
                let node = data_file.node.clone();
                change.edges.push(("data-file", Some(node), purpose));
            }
            image.writable = Some(writable);
        }
        let is_child = |(name, _): &&(String, Value)| {
            matches!(
                name.split('.').next(),
                Some("file" | "backing" | "data-file")
            )
        };
        let before = entry.options.iter().filter(|it| !is_child(it));
        if !before.eq(change.options.iter().filter(|it| !is_child(it))) {
            let mut options = options;
            options.remove("data-file");
            let options = Value::Object(options);
            self.check_options(entry.node.driver(), &options)?;
            image.options = Some(options.to_string());
        }
        if !self.graph.is_active(name) {
            // Somebody else has it: it is opened for writing when it becomes active.
            image.writable = None;
        }
        let same = image.writable.is_none()
            && image.file.is_none()
            && image.backing.is_none()
            && image.options.is_none();
        if !same {
            change.data = Data::Image(image);
        }
        Ok(())
    }

    /// The format's own options, as when it was opened.
    fn check_options(&self, driver: &str, options: &Value) -> Result<(), Error> {
        let registry = self.daemon.plugins.registry()?;
        let factory = registry.format(driver);
        let factory = factory.map_err(|error| Error::generic(error.to_string()))?;
        let checked = factory.options_schema().check(options);
        checked.map_err(|error| Error::generic(error.to_string()))
    }

    /// The child that a reference or a definition means. A definition is that of the child there
    /// is, and reopens it.
    fn child(
        &mut self,
        entry: &Entry,
        role: &str,
        child: &BlockdevRef,
        members: &[(String, Value)],
        inherited: &Inherited,
    ) -> Result<Arc<Node>, Error> {
        let (graph, name) = (self.graph, entry.node.name());
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
            BlockdevRef::Definition(options) => {
                let now = graph.child_in(name, role);
                let now = now.and_then(|now| graph.find(&now));
                let prefix = format!("{role}.");
                let given = options.node_name.as_deref();
                let other = now.is_some_and(|now| given.is_some_and(|it| it != now.node.name()));
                let Some(now) = now.filter(|now| !now.owned && !other) else {
                    let mine = |(name, _): &&(String, Value)| name.starts_with(&prefix);
                    let new: Vec<_> = members.iter().filter(mine).cloned().collect();
                    check_kept(entry.options.iter().filter(mine), &new)?;
                    return Err(cannot_change(role));
                };
                self.node(now, options, inherited)?;
                Ok(now.node.clone())
            }
        }
    }

    fn backing(
        &mut self,
        entry: &Entry,
        asked: Option<&BlockdevRefOrNull>,
        change: &Change,
    ) -> Result<Option<NewBacking>, Error> {
        let name = entry.node.name();
        let now = self.graph.child_in(name, "backing");
        let asked = match asked {
            // Left out it would mean what the image names, which is not opened here.
            None if now.is_some() || entry.facts.contains_key("backing-filename") => {
                return Err(Error::generic(format!("backing is missing for '{name}'")));
            }
            None => return Ok(None),
            Some(BlockdevRefOrNull::Reference(node)) if node.is_empty() => {
                return Err(Error::no_such_device_or_node("", ""));
            }
            Some(BlockdevRefOrNull::Reference(node)) => BlockdevRef::Reference(node.clone()),
            Some(BlockdevRefOrNull::Definition(node)) => BlockdevRef::Definition(node.clone()),
            Some(BlockdevRefOrNull::Null(())) => {
                return Ok(now.is_some().then_some(NewBacking::None));
            }
        };
        let inherited = change.common.for_backing();
        let child = self.child(entry, "backing", &asked, &change.options, &inherited)?;
        let same = now.as_deref() == Some(child.name());
        Ok((!same).then_some(NewBacking::Node(child)))
    }
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
            return Err(cannot_reset(name));
        }
    }
    Ok(())
}

fn cannot_change(option: &str) -> Error {
    Error::generic(format!("Cannot change the option '{option}'"))
}

fn cannot_reset(option: &str) -> Error {
    Error::generic(format!(
        "Option '{option}' cannot be reset to its default value"
    ))
}
