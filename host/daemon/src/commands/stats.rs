//! Statistics of nodes (`block-core.json`).

use outport_qmp::types::block_stats::{BlockDeviceStats, BlockStats, QueryBlockstats};

use crate::daemon::Daemon;
use crate::graph::Graph;

/// `query-blockstats`: without `query-nodes` there is nothing to list, as there are no devices.
pub(super) fn query(daemon: &Daemon, arguments: &QueryBlockstats) -> Vec<BlockStats> {
    if arguments.query_nodes != Some(true) {
        return Vec::new();
    }
    let graph = daemon.graph.borrow();
    let names = graph.newest_first().map(|entry| entry.node.name());
    let mut stats: Vec<_> = names.map(|name| node(daemon, &graph, name)).collect();
    stats.reverse();
    stats
}

fn node(daemon: &Daemon, graph: &Graph, name: &str) -> BlockStats {
    let child = |role| {
        let (_, child) = graph.children(name).find(|(other, _)| *other == role)?;
        Some(Box::new(node(daemon, graph, child)))
    };
    let totals = daemon.exports.totals_of(name);
    BlockStats {
        device: None,
        qdev: None,
        node_name: Some(name.to_owned()),
        stats: BlockDeviceStats {
            rd_bytes: totals.read_bytes,
            wr_bytes: totals.write_bytes,
            rd_operations: totals.reads,
            wr_operations: totals.writes,
            flush_operations: totals.flushes,
            unmap_operations: totals.discards,
            ..BlockDeviceStats::default()
        },
        parent: child("file").or_else(|| child("image")),
        backing: child("backing"),
    }
}
