//! `qemu:dirty-bitmap:NAME`: a bitmap as a metadata context. Flag 1: dirty.
//!
//! On a connection's iothread, without waiting. Whoever offers the context holds the bitmap.

use super::DirtyBitmap;
use crate::ByteRange;
use crate::metacontext::{ContextExtent, ContextProvider};
use crate::node::NodeFuture;

use std::sync::Arc;

/// The context of one bitmap.
#[derive(Debug)]
pub struct DirtyBitmapContext {
    name: String,
    bitmap: Arc<DirtyBitmap>,
}

impl DirtyBitmapContext {
    /// Of this bitmap.
    #[must_use]
    pub fn new(bitmap: Arc<DirtyBitmap>) -> Self {
        Self {
            name: format!("qemu:dirty-bitmap:{}", bitmap.name()),
            bitmap,
        }
    }
}

impl ContextProvider for DirtyBitmapContext {
    fn name(&self) -> &str {
        &self.name
    }

    fn extents(&self, range: ByteRange, extents_max: usize) -> NodeFuture<'_, Vec<ContextExtent>> {
        let bits = self.bitmap.bits();
        let mut extents = Vec::new();
        bits.runs(range, |len, dirty| {
            let flags = u64::from(dirty);
            extents.push(ContextExtent { len, flags });
            extents.len() < extents_max
        });
        Box::pin(std::future::ready(Ok(extents)))
    }
}
