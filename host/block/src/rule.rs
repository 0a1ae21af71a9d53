//! What metadata contexts mean, in terms of what the host knows of a node: `wit/rules.wit`.
//!
//! A plugin says it once; answers are worked out here for every request, on the iothread of the
//! client that asks.

use crate::bitmap::Bits;
use crate::metacontext::{ContextExtent, EXTENTS_AT_ONCE, LOOKS_MAX};
use crate::{ByteRange, Errno, Node};

/// What the status of a range is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// What is dirty in the bitmap of this name.
    Bitmap {
        /// A bitmap that the view shows.
        name: String,
        /// Flags of bytes whose granule is clean.
        clean: u64,
        /// Flags of bytes whose granule is dirty.
        dirty: u64,
    },
    /// How far down the backing chain the bytes are; 0: nowhere.
    AllocationDepth,
}

impl Rule {
    /// Needs more than 32 bits.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        match self {
            Self::Bitmap { clean, dirty, .. } => u32::try_from(clean | dirty).is_err(),
            Self::AllocationDepth => false,
        }
    }
}

/// The runs of a bitmap, as many of the range's as `extents_max`.
pub(crate) fn dirty(
    bits: &Bits,
    [clean, dirty]: [u64; 2],
    range: ByteRange,
    extents_max: usize,
) -> Vec<ContextExtent> {
    let mut extents = Vec::with_capacity(extents_max.min(EXTENTS_AT_ONCE));
    bits.runs(range, |len, is_dirty| {
        let flags = if is_dirty { dirty } else { clean };
        extents.push(ContextExtent { len, flags });
        extents.len() < extents_max
    });
    extents
}

/// Depths in the backing chain, as many runs of the range as `extents_max`.
pub(crate) async fn depths(
    node: &Node,
    range: ByteRange,
    extents_max: usize,
) -> Result<Vec<ContextExtent>, Errno> {
    let mut extents: Vec<ContextExtent> = Vec::new();
    let (mut at, mut looks) = (range.offset(), 0);
    while at < range.end() {
        let status = node.status(ByteRange::between(at, range.end())).await?;
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
        looks += 1;
        if looks % LOOKS_MAX == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(extents)
}
