//! Changing edges of nodes that are in use.

use outport_qmp::Error;

use super::{Edge, EdgeId, Entry, Graph, Permissions, Use, User};

/// An edge that was exchanged, made or removed: what to do to have it as it was.
#[derive(Debug)]
pub(crate) struct Exchanged {
    old: Option<Edge>,
    new: Option<EdgeId>,
}

impl Exchanged {
    /// The child that the edge led to.
    pub(crate) fn old_child(&self) -> Option<&str> {
        self.old.as_ref().map(|edge| edge.child.as_str())
    }
}

impl Graph {
    /// The entry of a node, to change it.
    pub(crate) fn find_mut(&mut self, name: &str) -> Option<&mut Entry> {
        self.entries.get_mut(name)
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

    /// Lets a parent use another child in a role, or none.
    ///
    /// # Errors
    /// The new child is used by others in a way that conflicts; nothing changed then.
    pub(crate) fn exchange(
        &mut self,
        parent: &str,
        role: &'static str,
        child: Option<&str>,
        purpose: Use,
    ) -> Result<Exchanged, Error> {
        let user = User::Node(parent.to_owned());
        let present = self.edges.below(parent);
        let old = present
            .filter(|edge| edge.role == role)
            .map(|edge| edge.id)
            .next();
        let mut exchanged = Exchanged {
            old: old.and_then(|id| self.edges.remove(id)),
            new: None,
        };
        if let Some(child) = child {
            match self.attach(user, child, role, purpose) {
                Ok(edge) => exchanged.new = Some(edge),
                Err(error) => {
                    self.restore(exchanged);
                    return Err(error);
                }
            }
        }
        if let Some(child) = exchanged.old_child() {
            self.unlock_below(child);
        }
        Ok(exchanged)
    }

    /// Takes an exchange back.
    pub(crate) fn restore(&mut self, exchanged: Exchanged) {
        if let Some(new) = exchanged.new {
            self.detach(new);
        }
        if let Some(old) = exchanged.old {
            let child = old.child.clone();
            self.edges.insert(old);
            self.unlock_below(&child);
        }
    }
}
