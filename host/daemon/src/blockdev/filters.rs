//! `throttle`, `compress` and `copy-on-read` nodes.

use std::sync::Arc;

use outport_block::Node;
use outport_block::filter::{Compress, CopyOnRead, Filter, Throttle};
use outport_block::format::Codec;
use outport_block::node::Kind;
use outport_qmp::Error;
use outport_qmp::types::block_core::BlockdevRef;
use outport_qmp::types::block_filter::{
    BlockdevOptionsCor, BlockdevOptionsGenericFormat, BlockdevOptionsThrottle,
};

use super::base::Common;
use super::{Made, Opening};
use crate::graph::{Graph, Use};

impl Opening<'_> {
    /// The node that a filter is over.
    async fn filtered(
        &mut self,
        name: &str,
        file: BlockdevRef,
        common: &Common,
        purpose: Use,
    ) -> Result<Arc<Node>, Error> {
        self.child(name, "file", file, common.for_filter(), purpose)
            .await
    }

    /// `throttle`.
    pub(super) async fn throttle(
        &mut self,
        name: &str,
        options: BlockdevOptionsThrottle,
        common: &Common,
    ) -> Result<Made, Error> {
        let child = self
            .filtered(name, options.file, common, Use::Filter)
            .await?;
        let group = self
            .daemon
            .objects
            .borrow()
            .throttle_group(&options.throttle_group)?;
        let filter = Filter::Throttle(Throttle::new(child, group));
        Ok(filter_node(name, "throttle", filter, common).into())
    }

    /// `compress`.
    pub(super) async fn compress(
        &mut self,
        name: &str,
        options: BlockdevOptionsGenericFormat,
        common: &Common,
    ) -> Result<Made, Error> {
        let child = self
            .filtered(name, options.file, common, Use::Filter)
            .await?;
        let codec = codec(&self.daemon.graph.borrow(), &child);
        let unsupported = Error::generic(format!(
            "Compression is not supported for underlying format: {}",
            child.driver()
        ));
        let compress = codec.and_then(|codec| Compress::new(child, codec));
        let filter = Filter::Compress(compress.ok_or(unsupported)?);
        Ok(filter_node(name, "compress", filter, common).into())
    }

    /// `copy-on-read`.
    pub(super) async fn copy_on_read(
        &mut self,
        name: &str,
        options: BlockdevOptionsCor,
        common: &Common,
    ) -> Result<Made, Error> {
        let child = self.filtered(name, options.file, common, Use::Copy).await?;
        let depth_max = match &options.bottom {
            None => None,
            Some(bottom) => Some(depth(&self.daemon.graph.borrow(), &child, bottom)?),
        };
        let filter = Filter::CopyOnRead(CopyOnRead::new(child, depth_max));
        Ok(filter_node(name, "copy-on-read", filter, common).into())
    }
}

/// A filter as a node.
pub(super) fn filter_node(name: &str, driver: &str, filter: Filter, common: &Common) -> Arc<Node> {
    let kind = Kind::Filter(Box::new(filter));
    Node::with_discard(name, driver, common.read_only, common.unmap, kind)
}

/// The nodes that a node's data comes from: itself, then what is behind it, filters left out.
fn layers<'g>(graph: &'g Graph, node: &Arc<Node>) -> impl Iterator<Item = &'g crate::graph::Entry> {
    let below = |name: &str, role: &[&str]| {
        let mut children = graph.children(name);
        let child = children.find(|(other, _)| role.contains(other));
        child.and_then(|(_, child)| graph.find(child))
    };
    let through = move |mut entry: &'g crate::graph::Entry| {
        while let Kind::Filter(_) = entry.node.kind() {
            entry = below(entry.node.name(), &["file", "image"])?;
        }
        Some(entry)
    };
    let top = graph.find(node.name()).and_then(through);
    std::iter::successors(top, move |entry| {
        below(entry.node.name(), &["backing"]).and_then(through)
    })
}

/// How a node's format compresses.
fn codec(graph: &Graph, node: &Arc<Node>) -> Option<Codec> {
    let entry = layers(graph, node).next()?;
    let specific = entry.facts.get("format-specific")?;
    match specific.get("data")?.get("compression-type")?.as_str()? {
        // qcow2 calls bare deflate by this name.
        "zlib" => Some(Codec::Deflate),
        "zstd" => Some(Codec::Zstd),
        _ => None,
    }
}

/// How many layers there are from `node` down to `bottom`.
fn depth(graph: &Graph, node: &Arc<Node>, bottom: &str) -> Result<u32, Error> {
    let entry = graph.find(bottom);
    let entry = entry.ok_or_else(|| Error::generic(format!("Bottom node '{bottom}' not found")))?;
    if let Kind::Filter(_) = entry.node.kind() {
        return Err(Error::generic(format!(
            "Bottom node '{bottom}' is a filter"
        )));
    }
    let at = layers(graph, node).position(|layer| layer.node.name() == bottom);
    let depth = at.and_then(|at| u32::try_from(at + 1).ok());
    depth.ok_or_else(|| {
        let message = format!(
            "Bottom node '{bottom}' is not in the chain of '{}'",
            node.name()
        );
        Error::generic(message)
    })
}
