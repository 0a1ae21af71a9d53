//! Metadata contexts: what clients may be told of ranges beside their bytes. The seam to those
//! who know it, native or plugin.
//!
//! A provider runs on the iothread of the connection that asks. Invariant: nobody believes its
//! answer; who passes it on merges, cuts and bounds it (`export`'s `nbd/status.rs`).

use std::fmt;
use std::sync::Arc;

use crate::node::NodeFuture;
use crate::{ByteRange, Node};

/// A run of bytes of which the same is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextExtent {
    /// Bytes; at least one.
    pub len: u64,
    /// What the context's documents say of this number.
    pub flags: u64,
}

/// One metadata context of one export.
pub trait ContextProvider: fmt::Debug + Send + Sync {
    /// `namespace:leaf`, such as `qemu:dirty-bitmap:b0`.
    fn name(&self) -> &str;

    /// Its flags need more than 32 bits: only clients with extended headers may have it.
    fn is_wide(&self) -> bool {
        false
    }

    /// New clients may select it. One that broke is withdrawn, and offered again when it works.
    fn is_offered(&self) -> bool {
        true
    }

    /// The extents from `range.offset()` on, without gaps: as much of the range as `extents_max`
    /// of them cover, or less, but at least one. The last one may run past the range.
    ///
    /// # Errors
    /// The client's request fails with it.
    fn extents(&self, range: ByteRange, extents_max: usize) -> NodeFuture<'_, Vec<ContextExtent>>;
}

/// `qemu:allocation-depth`: how far down the backing chain the bytes are; 0: nowhere.
#[derive(Debug)]
pub struct AllocationDepth(Arc<Node>);

impl AllocationDepth {
    /// Of this node.
    #[must_use]
    pub const fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

impl ContextProvider for AllocationDepth {
    fn name(&self) -> &'static str {
        "qemu:allocation-depth"
    }

    fn extents(&self, range: ByteRange, extents_max: usize) -> NodeFuture<'_, Vec<ContextExtent>> {
        Box::pin(async move {
            let mut extents: Vec<ContextExtent> = Vec::new();
            let mut at = range.offset();
            while at < range.end() {
                let status = self.0.status(ByteRange::between(at, range.end())).await?;
                at += status.len;
                let flags = u64::from(status.depth);
                let full = extents.len() == extents_max;
                match extents.last_mut() {
                    Some(last) if last.flags == flags => last.len += status.len,
                    _ if full => break,
                    _ => extents.push(ContextExtent {
                        len: status.len,
                        flags,
                    }),
                }
            }
            Ok(extents)
        })
    }
}
