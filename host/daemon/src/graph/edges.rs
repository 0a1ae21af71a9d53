//! Who uses whom: the edges of the graph, found from either end.
//!
//! Part of the graph, so of the control thread. Invariant: an edge is in both indexes for as long
//! as it exists, and each index lists edges in the order in which they were made, so that a
//! command looks at the neighbours of a node and never at the whole graph.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{EdgeId, Use, User};

/// One use of a node.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) id: EdgeId,
    pub(super) user: User,
    pub(super) child: String,
    pub(super) role: &'static str,
    pub(super) purpose: Use,
}

/// Edges by the name of a node.
type Index = HashMap<String, BTreeSet<EdgeId>>;

/// All edges.
#[derive(Debug, Default)]
pub(super) struct Edges {
    all: BTreeMap<EdgeId, Edge>,
    /// By the node that is used.
    above: Index,
    /// By the node that uses.
    below: Index,
}

impl Edges {
    /// Adds an edge; an edge that was removed before comes back to its old place.
    pub(super) fn insert(&mut self, edge: Edge) {
        let id = edge.id;
        self.above.entry(edge.child.clone()).or_default().insert(id);
        if let User::Node(parent) = &edge.user {
            self.below.entry(parent.clone()).or_default().insert(id);
        }
        self.all.insert(id, edge);
    }

    /// Removes an edge.
    pub(super) fn remove(&mut self, id: EdgeId) -> Option<Edge> {
        let edge = self.all.remove(&id)?;
        leave(&mut self.above, &edge.child, id);
        if let User::Node(parent) = &edge.user {
            leave(&mut self.below, parent, id);
        }
        Some(edge)
    }

    /// Changes the purpose of an edge.
    pub(super) fn set_purpose(&mut self, id: EdgeId, purpose: Use) {
        if let Some(edge) = self.all.get_mut(&id) {
            edge.purpose = purpose;
        }
    }

    /// All edges, the oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Edge> {
        self.all.values()
    }

    /// The uses of a node, the oldest first.
    pub(super) fn above(&self, name: &str) -> impl DoubleEndedIterator<Item = &Edge> {
        self.named(&self.above, name)
    }

    /// The nodes that a node uses, the oldest use first.
    pub(super) fn below(&self, name: &str) -> impl DoubleEndedIterator<Item = &Edge> {
        self.named(&self.below, name)
    }

    fn named<'e>(
        &'e self,
        index: &'e Index,
        name: &str,
    ) -> impl DoubleEndedIterator<Item = &'e Edge> {
        let ids = index.get(name).into_iter().flatten();
        ids.filter_map(|id| self.all.get(id))
    }
}

fn leave(index: &mut Index, name: &str, id: EdgeId) {
    if let Some(ids) = index.get_mut(name) {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(name);
        }
    }
}
