//! Nodes that stay while a command waits for something about them.
//!
//! Control plane. A hold is a use that asks for nothing and shares everything: only `blockdev-del`
//! minds it. Invariant: whoever holds nodes releases them, as the last one may be the last user.

use crate::daemon::Daemon;
use crate::graph::{Claim, EdgeId, Use, User};

/// Nodes that a command holds.
pub(crate) struct Held<'d> {
    daemon: &'d Daemon,
    edges: Vec<(String, EdgeId)>,
}

impl<'d> Held<'d> {
    pub(crate) const fn new(daemon: &'d Daemon) -> Self {
        Self {
            daemon,
            edges: Vec::new(),
        }
    }

    /// Holds a node, if there is one of this name.
    pub(crate) fn hold(&mut self, name: &str) {
        let mut graph = self.daemon.graph.borrow_mut();
        let purpose = Use::Direct(Claim::NONE);
        if let Ok(edge) = graph.attach(User::Block, name, "held", purpose) {
            self.edges.push((name.to_owned(), edge));
        }
    }

    /// Lets go of all, and closes those that lived as long as their parents, which are gone.
    pub(crate) async fn release(self) {
        for (_, edge) in &self.edges {
            self.daemon.graph.borrow_mut().detach(*edge);
        }
        for (name, _) in self.edges {
            let is_orphan = self.daemon.graph.borrow().is_orphan(&name);
            if is_orphan {
                super::close(self.daemon, name).await;
            }
        }
    }
}
