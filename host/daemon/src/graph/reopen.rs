//! Changing edges of nodes that are in use.

use outport_qmp::Error;

use super::{Edge, Entry, Graph, Permissions, Use, User};

/// An edge that was exchanged: what to do to have it back.
#[derive(Debug)]
pub(crate) struct Exchanged {
    parent: String,
    old: Edge,
}

impl Exchanged {
    /// The child that the edge led to.
    pub(crate) fn old_child(&self) -> &str {
        &self.old.child
    }
}

impl Graph {
    /// The entry of a node, to change it.
    pub(crate) fn find_mut(&mut self, name: &str) -> Option<&mut Entry> {
        let mut entries = self.entries.iter_mut();
        entries.find(|entry| entry.node.name() == name)
    }

    /// The child in a role.
    pub(crate) fn child_in(&self, name: &str, role: &str) -> Option<String> {
        let mut children = self.children(name);
        let child = children.find(|(other, _)| *other == role);
        child.map(|(_, child)| child.to_owned())
    }

    /// Whether `below` is `name` or lies below it.
    pub(crate) fn reaches(&self, name: &str, below: &str) -> bool {
        name == below
            || self
                .children(name)
                .any(|(_, child)| self.reaches(child, below))
    }

    /// Whether somebody who uses a node writes.
    pub(crate) fn has_writers(&self, name: &str) -> bool {
        let required = self.claim(name).required;
        !required.and(Permissions::WRITE).is_empty()
    }

    /// Lets a parent use another child in a role.
    ///
    /// # Errors
    /// The new child is used by others in a way that conflicts; nothing changed then.
    pub(crate) fn exchange(
        &mut self,
        parent: &str,
        role: &'static str,
        child: &str,
        purpose: Use,
    ) -> Result<Option<Exchanged>, Error> {
        let user = User::Node(parent.to_owned());
        let edge = |edge: &Edge| edge.user == user && edge.role == role;
        let Some(at) = self.edges.iter().position(edge) else {
            return Ok(None);
        };
        let old = self.edges.remove(at);
        let exchanged = Exchanged {
            parent: parent.to_owned(),
            old,
        };
        match self.attach(user, child, role, purpose) {
            Ok(_) => {
                self.unlock_below(exchanged.old_child());
                Ok(Some(exchanged))
            }
            Err(error) => {
                let child = exchanged.old.child.clone();
                self.edges.insert(at, exchanged.old);
                self.unlock_below(&child);
                Err(error)
            }
        }
    }

    /// Takes an exchange back.
    pub(crate) fn restore(&mut self, exchanged: Exchanged) {
        let Exchanged { parent, old } = exchanged;
        let user = User::Node(parent);
        let edge = |edge: &Edge| edge.user == user && edge.role == old.role;
        if let Some(at) = self.edges.iter().position(edge) {
            let new = self.edges.remove(at);
            self.unlock_below(&new.child);
        }
        let child = old.child.clone();
        self.edges.push(old);
        self.unlock_below(&child);
    }
}
