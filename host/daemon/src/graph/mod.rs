//! The graph: which nodes there are, and who uses them for what.
//!
//! Owned by the control thread; requests never come here. An edge exists from before its parent is
//! opened until after it is closed, so a child in use is always seen to be. Invariants: names are
//! unique, those of nodes being opened or closed included; no two users of a node conflict.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hashlink::LinkedHashMap;
use outport_block::Node;
use outport_block::file::HostFile;
use outport_block::filter::ThrottleGroup;
use outport_qmp::Error;
use outport_qmp::error::is_identifier;

mod activity;
mod dump;
mod edges;
mod iothreads;
mod permissions;
mod reopen;

use edges::{Edge, Edges};
use iothreads::Iothreads;
use permissions::conflicts;
pub(crate) use permissions::{Claim, Permissions, Use};
pub(crate) use reopen::Exchanged;

/// The longest node name, as in QEMU.
const NAME_BYTES_MAX: usize = 31;

/// One node and what the control plane knows of it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) node: Arc<Node>,
    /// Added by a command of its own; otherwise it lives as long as its parents.
    pub(crate) owned: bool,
    /// What a format says of its image.
    pub(crate) facts: serde_json::Map<String, serde_json::Value>,
    /// What it was added with beside what all nodes have, by dotted names.
    pub(crate) options: Vec<(String, serde_json::Value)>,
    pub(crate) detect_zeroes: outport_qmp::types::block_core::BlockdevDetectZeroesOptions,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    /// No image locks are taken: others may write.
    pub(crate) force_share: bool,
}

/// Who uses a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum User {
    /// Another node, by name.
    Node(String),
    /// An export, a command or a job.
    Block,
}

impl User {
    fn words(&self) -> String {
        match self {
            Self::Node(name) => format!("node '{name}'"),
            Self::Block => "an unnamed block device".into(),
        }
    }
}

/// Names an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EdgeId(u64);

/// All nodes.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    /// By name, in the order in which they were added.
    entries: LinkedHashMap<String, Entry>,
    edges: Edges,
    iothreads: Iothreads,
    /// Names of nodes that are being opened or closed.
    reserved: HashSet<String>,
    /// Names of nodes that somebody else has, those being opened included.
    inactive: BTreeSet<String>,
    edges_made: u64,
    names_made: u64,
}

impl Graph {
    // === nodes ===

    pub(crate) fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// How many nodes there are.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The node that a command names.
    ///
    /// # Errors
    /// There is none; `device` is what the command has instead of a node name.
    pub(crate) fn lookup(&self, device: &str, name: &str) -> Result<Arc<Node>, Error> {
        let entry = self.find(if name.is_empty() { device } else { name });
        let node = entry.map(|entry| entry.node.clone());
        node.ok_or_else(|| Error::no_such_device_or_node(device, name))
    }

    /// All nodes, newest first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().rev()
    }

    /// Reserves a name that an operator chose.
    ///
    /// # Errors
    /// It is no node name, or taken.
    pub(crate) fn reserve(&mut self, name: &str) -> Result<(), Error> {
        if !is_identifier(name) {
            return Err(Error::generic(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(Error::generic("Node name too long"));
        }
        if self.is_taken(name) {
            return Err(Error::generic(format!(
                "Duplicate nodes with node-name='{name}'"
            )));
        }
        self.reserved.insert(name.to_owned());
        Ok(())
    }

    /// Reserves a name for a node without one: `#block` and a number that does not repeat soon.
    pub(crate) fn reserve_implicit(&mut self) -> String {
        loop {
            self.names_made += 1;
            let clock = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let name = format!(
                "#block{}{:02}",
                self.names_made,
                clock.subsec_micros() % 100
            );
            if !self.is_taken(&name) {
                self.reserved.insert(name.clone());
                return name;
            }
        }
    }

    fn is_taken(&self, name: &str) -> bool {
        self.entries.contains_key(name) || self.reserved.contains(name)
    }

    /// Gives a reserved name back.
    pub(crate) fn release(&mut self, name: &str) {
        self.reserved.remove(name);
    }

    /// Adds an open node under its reserved name.
    pub(crate) fn insert(&mut self, entry: Entry) {
        let name = entry.node.name().to_owned();
        self.release(&name);
        self.entries.insert(name, entry);
    }

    /// Takes a node out, to be closed. Its name and its edges stay until [`Graph::forget`].
    pub(crate) fn take(&mut self, name: &str) -> Option<Arc<Node>> {
        let entry = self.entries.remove(name)?;
        self.iothreads.forget_node(name);
        self.reserved.insert(name.to_owned());
        Some(entry.node)
    }

    /// A node was closed, or was never opened: drops its name and its edges; returns the children
    /// that nobody needs any more.
    pub(crate) fn forget(&mut self, name: &str) -> Vec<String> {
        self.release(name);
        self.inactive.remove(name);
        let ids: Vec<_> = self.edges.below(name).map(|edge| edge.id).collect();
        let gone: Vec<_> = ids
            .into_iter()
            .filter_map(|id| self.edges.remove(id))
            .collect();
        for edge in &gone {
            self.unlock_below(&edge.child);
        }
        gone.into_iter()
            .map(|edge| edge.child)
            .filter(|child| self.is_orphan(child))
            .collect()
    }

    /// Whether a node that lives as long as its parents has none left.
    pub(crate) fn is_orphan(&self, name: &str) -> bool {
        !self.is_used(name) && self.find(name).is_some_and(|entry| !entry.owned)
    }

    /// Whether `blockdev-del` may delete a node.
    ///
    /// # Errors
    /// The first reason why not.
    pub(crate) fn check_deletable(&self, name: &str) -> Result<(), Error> {
        let entry = self.find(name).ok_or_else(|| Error::no_such_node(name))?;
        let users = || self.edges.above(name);
        if users().any(|edge| edge.user == User::Block) {
            return Err(Error::node_in_use(name));
        }
        let backed = users().find_map(|edge| match &edge.user {
            User::Node(parent) if edge.role == "backing" => Some(parent),
            _ => None,
        });
        if let Some(parent) = backed {
            return Err(Error::generic(format!(
                "Node '{name}' is busy: node is used as backing hd of '{parent}'"
            )));
        }
        if !entry.owned {
            return Err(Error::generic(format!(
                "Node {name} is not owned by the monitor"
            )));
        }
        let above = users().find_map(|edge| match &edge.user {
            User::Node(parent) if edge.role == "backing" => Some(parent),
            _ => None,
        });
        if let Some(parent) = above {
            return Err(Error::generic(format!(
                "Node '{name}' is busy: node is used as backing hd of '{parent}'"
            )));
        }
        if users().next().is_some() {
            return Err(Error::generic(format!("Block device {name} is in use")));
        }
        Ok(())
    }

    /// Nodes that no other node uses: the next ones to close at exit.
    pub(crate) fn roots(&self) -> Vec<String> {
        let names = self.entries.keys();
        names.filter(|name| !self.is_used(name)).cloned().collect()
    }

    /// Whether a node is in this throttle group.
    pub(crate) fn uses_throttle(&self, group: &Arc<ThrottleGroup>) -> bool {
        let throttles = self
            .entries
            .values()
            .filter_map(|entry| entry.node.throttle());
        throttles
            .into_iter()
            .any(|throttle| Arc::ptr_eq(&throttle.group(), group))
    }

    /// Children of a node, with their roles.
    pub(crate) fn children(&self, name: &str) -> impl Iterator<Item = (&'static str, &str)> {
        let edges = self.edges.below(name);
        edges.map(|edge| (edge.role, edge.child.as_str()))
    }

    fn is_used(&self, name: &str) -> bool {
        self.edges.above(name).next().is_some()
    }

    // === edges ===

    /// Lets `user` use the node `child`.
    ///
    /// # Errors
    /// There is no such node, it conflicts with other users, or the node is read-only; nothing
    /// changed then.
    pub(crate) fn attach(
        &mut self,
        user: User,
        child: &str,
        role: &'static str,
        purpose: Use,
    ) -> Result<EdgeId, Error> {
        // Whoever waited after it was found may be too late.
        if self.find(child).is_none() {
            return Err(Error::no_such_device_or_node(child, child));
        }
        self.check_activity(&user, child, role)?;
        self.edges_made += 1;
        let id = EdgeId(self.edges_made);
        // A format writes only after it has read: its claim grows in two steps, and conflicts are
        // told in the words of the first step that fails.
        let first = match purpose {
            Use::Storage { .. } => Use::Storage { writable: false },
            other => other,
        };
        self.edges.insert(Edge {
            id,
            user,
            child: child.to_owned(),
            role,
            purpose: first,
        });
        let checked = self.check_below(child).and_then(|()| {
            self.edges.set_purpose(id, purpose);
            self.check_below(child)?;
            self.check_pins(child)?;
            self.lock_below(child)
        });
        if let Err(error) = checked {
            self.detach(id);
            return Err(error);
        }
        Ok(id)
    }

    /// Ends a use.
    pub(crate) fn detach(&mut self, id: EdgeId) {
        self.iothreads.forget_edge(id);
        if let Some(edge) = self.edges.remove(id) {
            self.unlock_below(&edge.child);
        }
    }

    /// Tells the files at and below a node what they are used for: other processes see it as locks.
    fn lock_below(&self, name: &str) -> Result<(), Error> {
        if let Some(file) = self.find(name).and_then(|entry| entry.node.host_file()) {
            let claim = self.claim(name);
            let locked = file.set_permissions(claim.required.as_lock(), claim.shared.as_lock());
            locked.map_err(|error| Error::generic(error.to_string()))?;
        }
        self.children(name)
            .try_for_each(|(_, child)| self.lock_below(child))
    }

    /// The same after a use ended: there is less to lock, so nobody can be in the way.
    fn unlock_below(&self, name: &str) {
        if let Err(error) = self.lock_below(name) {
            tracing::warn!(node = name, %error, "image locks could not be given up");
        }
    }

    /// What all users of a node together require and share.
    fn claim(&self, name: &str) -> Claim {
        let users = self.edges.above(name);
        users.fold(Claim::NONE, |sum, edge| sum.with(self.edge_claim(edge)))
    }

    /// The graph has no cycles: a parent is opened after its children.
    fn edge_claim(&self, edge: &Edge) -> Claim {
        let above = match &edge.user {
            User::Node(parent) => self.claim(parent),
            User::Block => Claim::NONE,
        };
        let claim = edge.purpose.claim(above);
        match self.is_idle(edge) {
            true => claim.idle(),
            false => claim,
        }
    }

    /// Checks a node and all below it.
    fn check_below(&self, name: &str) -> Result<(), Error> {
        let claim = self.claim(name);
        let writes = !claim.required.and(Permissions::WRITE).is_empty();
        let read_only = |entry: &&Entry| writes && entry.node.is_read_only();
        if let Some(entry) = self.find(name).filter(read_only) {
            let refused = entry.node.host_file().and_then(HostFile::why_read_only);
            return Err(match refused {
                Some(refused) => Error::generic(refused.to_string()),
                None => Error::generic("Block node is read-only"),
            });
        }
        self.check_inactive(name, claim)?;
        self.check_conflicts(name)?;
        self.children(name)
            .try_for_each(|(_, child)| self.check_below(child))
    }

    fn check_conflicts(&self, name: &str) -> Result<(), Error> {
        let users = self.edges.above(name).rev();
        let claims: Vec<_> = users.map(|edge| (edge, self.edge_claim(edge))).collect();
        if !conflicts(claims.iter().map(|(_, claim)| *claim)) {
            return Ok(());
        }
        for (one, wanted) in &claims {
            for (other, left) in claims.iter().filter(|(other, _)| other.id != one.id) {
                let conflict = wanted.required.without(left.shared);
                if !conflict.is_empty() {
                    return Err(Error::generic(format!(
                        "Permission conflict on node '{name}': permissions '{}' are both required \
                         by {} (uses node '{name}' as '{}' child) and unshared by {} (uses node \
                         '{name}' as '{}' child).",
                        conflict.names(),
                        one.user.words(),
                        one.role,
                        other.user.words(),
                        other.role,
                    )));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
