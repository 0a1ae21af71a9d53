//! The whole graph, for `x-debug-query-block-graph`.

use std::collections::HashMap;

use outport_qmp::types::block_graph::{
    BlockPermission, XDbgBlockGraph, XDbgBlockGraphEdge, XDbgBlockGraphNode, XDbgBlockGraphNodeType,
};

use super::{Graph, Permissions, User};

impl Graph {
    /// All nodes, all users that are no nodes, and who uses whom.
    pub(crate) fn dump(&self) -> XDbgBlockGraph {
        let number = |at: usize| u64::try_from(at).unwrap_or(u64::MAX) + 1;
        let names = self.entries.keys().map(String::as_str);
        let ids: HashMap<_, _> = names.clone().zip(1..).collect();
        let id_of = |name: &str| ids.get(name).copied();
        let vertex = |id, r#type, name: &str| XDbgBlockGraphNode {
            id,
            r#type,
            name: name.to_owned(),
        };
        let mut nodes: Vec<_> = names
            .zip(1..)
            .map(|(name, id)| vertex(id, XDbgBlockGraphNodeType::BlockDriver, name))
            .collect();
        let mut edges = Vec::new();
        for edge in self.edges.iter() {
            // A node that is being opened or closed is not shown, nor what it uses.
            let Some(child) = id_of(&edge.child) else {
                continue;
            };
            let parent = match &edge.user {
                User::Node(parent) => id_of(parent),
                User::Block => {
                    let id = number(nodes.len());
                    nodes.push(vertex(id, XDbgBlockGraphNodeType::BlockBackend, ""));
                    Some(id)
                }
            };
            let Some(parent) = parent else { continue };
            let claim = self.edge_claim(edge);
            edges.push(XDbgBlockGraphEdge {
                parent,
                child,
                name: edge.role.to_owned(),
                perm: names_of(claim.required),
                shared_perm: names_of(claim.shared),
            });
        }
        XDbgBlockGraph { nodes, edges }
    }
}

fn names_of(permissions: Permissions) -> Vec<BlockPermission> {
    let all = [
        (
            Permissions::CONSISTENT_READ,
            BlockPermission::ConsistentRead,
        ),
        (Permissions::WRITE, BlockPermission::Write),
        (
            Permissions::WRITE_UNCHANGED,
            BlockPermission::WriteUnchanged,
        ),
        (Permissions::RESIZE, BlockPermission::Resize),
    ];
    let held = all
        .into_iter()
        .filter(|(one, _)| !permissions.and(*one).is_empty());
    held.map(|(_, name)| name).collect()
}
