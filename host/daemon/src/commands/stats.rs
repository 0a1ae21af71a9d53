//! Statistics of nodes (`block-core.json`).

use std::collections::BTreeMap;

use outport_block::Node;
use outport_export::ExportTotals;
use outport_qmp::types::block_stats::{
    BlockDeviceStats, BlockStats, BlockStatsSpecific, BlockStatsSpecificBranch,
    BlockStatsSpecificFile, QueryBlockstats,
};

use crate::daemon::Daemon;
use crate::graph::Graph;

/// What only one driver counts.
fn specific(node: &Node) -> Option<BlockStatsSpecific> {
    let discards = node.host_file()?.discards();
    let file = BlockStatsSpecificFile {
        discard_nb_ok: discards.done,
        discard_nb_failed: discards.failed,
        discard_bytes_ok: discards.bytes,
    };
    Some(BlockStatsSpecific {
        branch: match node.driver() {
            "host_device" => BlockStatsSpecificBranch::HostDevice(file),
            _ => BlockStatsSpecificBranch::File(file),
        },
    })
}

/// `query-blockstats`: without `query-nodes` there is nothing to list, as there are no devices.
pub(super) fn query(daemon: &Daemon, arguments: &QueryBlockstats) -> Vec<BlockStats> {
    if arguments.query_nodes != Some(true) {
        return Vec::new();
    }
    let graph = daemon.graph.borrow();
    let totals = daemon.exports.totals();
    let names = graph.newest_first().map(|entry| entry.node.name());
    let mut stats: Vec<_> = names.map(|name| node(&totals, &graph, name)).collect();
    stats.reverse();
    stats
}

fn node(exported: &BTreeMap<String, ExportTotals>, graph: &Graph, name: &str) -> BlockStats {
    let child = |role| {
        let (_, child) = graph.children(name).find(|(other, _)| *other == role)?;
        Some(Box::new(node(exported, graph, child)))
    };
    let totals = exported.get(name).copied().unwrap_or_default();
    let found = graph.find(name).map(|entry| &entry.node);
    let wr_highest_offset = found.map_or(0, |node| node.highest_write());
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
            rd_total_time_ns: totals.waited_by[0],
            wr_total_time_ns: totals.waited_by[1],
            flush_total_time_ns: totals.waited_by[2],
            unmap_total_time_ns: totals.waited_by[3],
            idle_time_ns: totals.idle_ns(),
            wr_highest_offset,
            ..BlockDeviceStats::default()
        },
        driver_specific: found.and_then(|node| specific(node)),
        parent: child("file").or_else(|| child("image")),
        backing: child("backing"),
    }
}
