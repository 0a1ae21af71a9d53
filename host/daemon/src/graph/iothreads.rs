//! Which iothread nodes belong to.
//!
//! Here a node is used from any iothread, so it has none of its own. But clients of QEMU rely on
//! what QEMU promises: nodes that are connected are in one iothread, an export with
//! `fixed-iothread` keeps them there, and what would move them is refused. An export that names no
//! iothread is served by that of its node.

use std::collections::{BTreeMap, BTreeSet};

use outport_qmp::Error;

use super::{EdgeId, Graph, User};

/// `None` is QEMU's main loop, here the default iothread.
type Iothread = Option<String>;

/// What was said about iothreads.
#[derive(Debug, Default)]
pub(super) struct Iothreads {
    /// Nodes that were moved.
    placed: BTreeMap<String, String>,
    /// Exports that do not move, and where they are.
    pinned: BTreeMap<EdgeId, Iothread>,
}

impl Iothreads {
    pub(super) fn forget_node(&mut self, name: &str) {
        self.placed.remove(name);
    }

    pub(super) fn forget_edge(&mut self, id: EdgeId) {
        self.pinned.remove(&id);
    }
}

impl Graph {
    /// The iothread of a node: its own, or that of a node that it is connected with.
    pub(crate) fn iothread_of(&self, name: &str) -> Option<&str> {
        if self.iothreads.placed.is_empty() {
            return None;
        }
        let own = self.iothreads.placed.get(name);
        let connected = || {
            let names = self.connected(name);
            let mut placed = names.iter().filter_map(|it| self.iothreads.placed.get(*it));
            placed.next()
        };
        own.or_else(connected).map(String::as_str)
    }

    /// The use of a node by an export stays in an iothread: the one named, or that of the node.
    ///
    /// # Errors
    /// Another one does not move from another iothread; nothing changed then.
    pub(crate) fn pin(
        &mut self,
        edge: EdgeId,
        name: &str,
        iothread: Iothread,
    ) -> Result<(), Error> {
        let at = iothread.or_else(|| self.iothread_of(name).map(str::to_owned));
        self.iothreads.pinned.insert(edge, at.clone());
        if let Err(error) = self.check_pins(name) {
            self.iothreads.pinned.remove(&edge);
            return Err(error);
        }
        self.place(name, at.as_deref());
        Ok(())
    }

    /// Moves a node, and all that it is connected with.
    ///
    /// # Errors
    /// An export does not move.
    pub(crate) fn set_iothread(&mut self, name: &str, iothread: Option<&str>) -> Result<(), Error> {
        let stays = |name: &&str| self.pins_of(name).any(|pin| pin.as_deref() != iothread);
        if self.connected(name).iter().any(stays) {
            return Err(does_not_move());
        }
        self.place(name, iothread);
        Ok(())
    }

    /// Whether an export, or a command at work, uses a node itself.
    pub(crate) fn has_exports(&self, name: &str) -> bool {
        let mut users = self.edges.above(name);
        users.any(|edge| edge.user == User::Block)
    }

    /// Exports that do not move are in one iothread, if nodes connect them.
    pub(super) fn check_pins(&self, name: &str) -> Result<(), Error> {
        if self.iothreads.pinned.len() < 2 {
            return Ok(());
        }
        let names = self.connected(name);
        let mut pins = names.iter().flat_map(|name| self.pins_of(name));
        let first = pins.next();
        match first.is_none_or(|first| pins.all(|pin| pin == first)) {
            true => Ok(()),
            false => Err(does_not_move()),
        }
    }

    fn pins_of<'g>(&'g self, name: &str) -> impl Iterator<Item = &'g Iothread> {
        let users = self.edges.above(name);
        users.filter_map(|edge| self.iothreads.pinned.get(&edge.id))
    }

    fn place(&mut self, name: &str, iothread: Option<&str>) {
        let names: Vec<_> = self
            .connected(name)
            .into_iter()
            .map(str::to_owned)
            .collect();
        for name in names {
            match iothread {
                Some(id) => self.iothreads.placed.insert(name, id.to_owned()),
                None => self.iothreads.placed.remove(&name),
            };
        }
    }

    /// A node and all that edges lead to from it, up and down.
    fn connected<'g>(&'g self, name: &'g str) -> BTreeSet<&'g str> {
        let mut found = BTreeSet::from([name]);
        let mut next = vec![name];
        while let Some(name) = next.pop() {
            let parents = self.edges.above(name).filter_map(|edge| match &edge.user {
                User::Node(parent) => Some(parent.as_str()),
                User::Block => None,
            });
            let children = self.edges.below(name).map(|edge| edge.child.as_str());
            next.extend(parents.chain(children).filter(|it| found.insert(it)));
        }
        found
    }
}

/// QEMU's sentence.
fn does_not_move() -> Error {
    Error::generic("Cannot change iothread of active block backend")
}
