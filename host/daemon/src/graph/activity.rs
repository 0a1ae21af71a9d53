//! Which nodes are ours, and which somebody else has for now.

use outport_qmp::Error;

use super::{Claim, Edge, Graph, Permissions, Use, User};

impl Graph {
    /// Is a node ours to write?
    pub(crate) fn is_active(&self, name: &str) -> bool {
        !self.inactive.contains(name)
    }

    /// Notes that a node is ours, or not. Whoever does so tells the node itself, too.
    pub(crate) fn set_active(&mut self, name: &str, active: bool) {
        if active {
            self.inactive.remove(name);
        } else {
            self.inactive.insert(name.to_owned());
        }
    }

    /// Is a user of a node idle because of that?
    pub(super) fn is_idle(&self, edge: &Edge) -> bool {
        match (&edge.user, edge.purpose) {
            (User::Node(parent), _) => !self.is_active(parent),
            (User::Block, Use::Export { .. }) => !self.is_active(&edge.child),
            (User::Block, _) => false,
        }
    }

    /// An active node has active children.
    ///
    /// # Errors
    /// This one would not.
    pub(crate) fn check_activity(&self, user: &User, child: &str, role: &str) -> Result<(), Error> {
        let User::Node(parent) = user else {
            return Ok(());
        };
        let leaving = |entry: &super::Entry| !entry.node.is_active();
        let inactive = !self.is_active(child) || self.find(child).is_some_and(leaving);
        if inactive && self.is_active(parent) {
            return Err(Error::generic(format!(
                "Inactive '{child}' can't be a {role} child of active '{parent}'"
            )));
        }
        Ok(())
    }

    /// Nobody may change a node that is inactive.
    pub(super) fn check_inactive(&self, name: &str, claim: Claim) -> Result<(), Error> {
        let asked = claim.required.without(Permissions::CONSISTENT_READ);
        if self.is_active(name) || asked.is_empty() {
            return Ok(());
        }
        Err(Error::generic(format!(
            "Permission '{}' unavailable on inactive node",
            asked.names()
        )))
    }

    /// Does an active node use this one?
    pub(crate) fn has_active_parent(&self, name: &str) -> bool {
        let mut users = self.edges.above(name);
        users.any(|edge| matches!(&edge.user, User::Node(parent) if self.is_active(parent)))
    }

    /// Does somebody write who does not put up with the node becoming inactive?
    pub(crate) fn insists_on_writing(&self, name: &str) -> bool {
        let writing = Permissions::WRITE.or(Permissions::WRITE_UNCHANGED);
        let mut users = self.edges.above(name);
        users.any(|edge| match edge.purpose {
            Use::Export {
                claim,
                allow_inactive,
            } => !allow_inactive && !claim.required.and(writing).is_empty(),
            Use::Direct(claim) => !claim.required.and(writing).is_empty(),
            _ => false,
        })
    }

    /// Nodes that no other node uses, those with exports first.
    pub(crate) fn tops(&self) -> Vec<String> {
        let below = |name: &str| {
            let mut users = self.edges.above(name);
            users.any(|edge| matches!(edge.user, User::Node(_)))
        };
        let names = self.entries.keys().filter(|name| !below(name));
        let mut tops: Vec<_> = names.cloned().collect();
        tops.sort_by_key(|name| !self.is_used(name));
        tops
    }

    /// The node would be active: may its users do then what they want?
    ///
    /// # Errors
    /// They conflict, with one another or with other processes; it is inactive again.
    pub(crate) fn try_activate(&mut self, name: &str) -> Result<(), Error> {
        self.set_active(name, true);
        let checked = self.check_below(name).and_then(|()| self.lock_below(name));
        if checked.is_err() {
            self.deactivate(name);
        }
        checked
    }

    /// The node is inactive: locks that its users held are given up.
    pub(crate) fn deactivate(&mut self, name: &str) {
        self.set_active(name, false);
        self.unlock_below(name);
    }
}
