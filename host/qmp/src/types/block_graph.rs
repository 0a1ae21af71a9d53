//! The graph of nodes as a debugging command tells it (part of QEMU's `block-core.json`).

qapi! {
    /// Kinds of vertex.
    enum XDbgBlockGraphNodeType {
        /// An export, or a command at work.
        BlockBackend = "block-backend",
        /// A job.
        BlockJob = "block-job",
        /// A node.
        BlockDriver = "block-driver",
    }

    /// A vertex.
    struct XDbgBlockGraphNode {
        /// A number for the edges to name it by.
        id: u64,
        /// Its kind.
        r#type: XDbgBlockGraphNodeType = "type",
        /// The node's name; empty for what has none.
        name: String,
    }

    /// What a user of a node may do.
    enum BlockPermission {
        /// What is read is what was written.
        ConsistentRead = "consistent-read",
        /// Change data.
        Write = "write",
        /// Write what is there already.
        WriteUnchanged = "write-unchanged",
        /// Change the length.
        Resize = "resize",
    }

    /// An edge: a parent uses a child.
    struct XDbgBlockGraphEdge {
        /// The user.
        parent: u64,
        /// The node that is used.
        child: u64,
        /// What for.
        name: String,
        /// What the parent may do.
        perm: Vec<BlockPermission>,
        /// What others may do.
        shared_perm: Vec<BlockPermission> = "shared-perm",
    }

    /// The graph.
    struct XDbgBlockGraph {
        /// Its vertices.
        nodes: Vec<XDbgBlockGraphNode>,
        /// Its edges.
        edges: Vec<XDbgBlockGraphEdge>,
    }
}
