//! What `query-named-block-nodes` says of a node.
//!
//! Told from what the control plane holds: nobody waits for a node here, however slow it is. What
//! a format says of its image is what it said when the image was opened; what a file takes is what
//! the kernel knows of it without asking a file server.

use std::sync::Arc;

use outport_block::Node;
use outport_block::bitmap::DirtyBitmap;
use outport_block::node::Kind;
use outport_qmp::de::{self, Mode};
use outport_qmp::types::block_info::{
    BlockDeviceInfo, BlockDirtyInfo, BlockdevCacheInfo, BlockdevChild, ImageInfo,
    ImageInfoSpecific, ImageInfoSpecificBranch, ImageInfoSpecificFile,
    ImageInfoSpecificFileWrapper,
};
use rustix::fs::{AtFlags, StatxFlags, statx};
use serde_json::Value;

use crate::graph::{Entry, Graph};

mod filename;

use filename::filename;

/// The unit of `stx_blocks`.
const BLOCK_BYTES: u64 = 512;

/// One element of the listing. `flat`: without the images behind it.
pub(crate) fn info(graph: &Graph, entry: &Entry, flat: bool) -> BlockDeviceInfo {
    let node = &entry.node;
    let children = graph.children(node.name());
    let child = |(role, name): (&str, &str)| BlockdevChild {
        child: role.to_owned(),
        node_name: name.to_owned(),
    };
    BlockDeviceInfo {
        file: filename(graph, entry),
        node_name: node.name().to_owned(),
        ro: node.is_read_only(),
        drv: node.driver().to_owned(),
        backing_file: backing(graph, entry).map(|backing| filename(graph, backing)),
        backing_file_depth: if flat { 0 } else { depth(graph, entry) },
        children: children.map(child).collect(),
        active: graph.is_active(node.name()),
        encrypted: false,
        detect_zeroes: entry.detect_zeroes,
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image: image(graph, entry, flat),
        cache: BlockdevCacheInfo {
            writeback: true,
            direct: entry.direct,
            no_flush: entry.no_flush,
        },
        write_threshold: node.write_threshold().cast_signed(),
        dirty_bitmaps: bitmaps(node),
    }
}

fn bitmaps(node: &Node) -> Option<Vec<BlockDirtyInfo>> {
    let info = |bitmap: &Arc<DirtyBitmap>| BlockDirtyInfo {
        name: Some(bitmap.name().to_owned()),
        count: signed(bitmap.bits().count() * u64::from(bitmap.granularity())),
        granularity: bitmap.granularity(),
        recording: bitmap.is_enabled(),
        busy: bitmap.is_busy(),
        persistent: bitmap.is_persistent(),
        inconsistent: bitmap.is_inconsistent().then_some(true),
    };
    let all = node.bitmaps().all();
    (!all.is_empty()).then(|| all.iter().map(info).collect())
}

fn image(graph: &Graph, entry: &Entry, flat: bool) -> ImageInfo {
    let node = &entry.node;
    let text = |name: &str| {
        entry
            .facts
            .get(name)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let specific = entry.facts.get("format-specific");
    let specific = match node.host_file() {
        Some(_) => Some(ImageInfoSpecific {
            branch: ImageInfoSpecificBranch::File(ImageInfoSpecificFileWrapper {
                data: ImageInfoSpecificFile {
                    extent_size_hint: None,
                },
            }),
        }),
        None => specific.and_then(|it| de::from_value::<ImageInfoSpecific>(it, Mode::Typed).ok()),
    };
    ImageInfo {
        filename: filename(graph, entry),
        format: node.driver().to_owned(),
        dirty_flag: match entry.facts.get("dirty-flag") {
            Some(flag) => flag.as_bool(),
            // QEMU passes on what the file says, and a file is never dirty.
            None => stored(node).then_some(false),
        },
        actual_size: actual_size(node),
        virtual_size: signed(node.size()),
        cluster_size: cluster_size(graph, entry),
        encrypted: None,
        compressed: None,
        full_backing_filename: text("backing-filename")
            .map(|name| filename::resolved(graph, entry, &name)),
        backing_filename: text("backing-filename"),
        backing_filename_format: text("backing-filename-format"),
        format_specific: specific,
        limits: None,
        backing_image: match behind(graph, entry) {
            Some(backing) if !flat => Some(Box::new(image(graph, backing, flat))),
            _ => None,
        },
    }
}

fn backing<'g>(graph: &'g Graph, entry: &Entry) -> Option<&'g Entry> {
    let mut children = graph.children(entry.node.name());
    let (_, name) = children.find(|(role, _)| *role == "backing")?;
    graph.find(name)
}

/// The backing node, or what a filter stands before.
fn behind<'g>(graph: &'g Graph, entry: &Entry) -> Option<&'g Entry> {
    let Kind::Filter(filter) = entry.node.kind() else {
        return backing(graph, entry);
    };
    graph.find(filter.child().1.name())
}

fn depth(graph: &Graph, entry: &Entry) -> i64 {
    let next = |entry: &&Entry| behind(graph, entry);
    let chain = std::iter::successors(behind(graph, entry), next);
    chain.map(|_| 1).sum()
}

/// The unit of the image, also through filters over it.
fn cluster_size(graph: &Graph, entry: &Entry) -> Option<i64> {
    if let Some(size) = entry.facts.get("cluster-size") {
        return size.as_i64();
    }
    let mut children = graph.children(entry.node.name());
    let (_, child) = children.find(|(role, _)| matches!(*role, "file" | "image"))?;
    cluster_size(graph, graph.find(child)?)
}

/// Whether there is a file at the bottom.
fn stored(node: &Node) -> bool {
    node.host_file().is_some()
        || node
            .children()
            .into_iter()
            .next()
            .is_some_and(|(_, child)| stored(&child))
}

/// Bytes that the file takes on the host, as far as the kernel knows without asking a server: on
/// a network file system that may be some seconds old. Nothing for what has no file.
fn actual_size(node: &Node) -> Option<i64> {
    if let Some(file) = node.host_file() {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(file.as_fd(), "", flags, StatxFlags::BLOCKS).ok()?;
        return Some(signed(stat.stx_blocks.saturating_mul(BLOCK_BYTES)));
    }
    match node.children().into_iter().next() {
        Some((_, child)) => actual_size(&child),
        // A server does not tell.
        None => node.remote_name().is_none().then_some(0),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
