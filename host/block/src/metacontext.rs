//! Metadata contexts: what clients may be told of ranges beside their bytes. The seam to those
//! who know it, native or plugin.
//!
//! A provider runs on the iothread of the connection that asks. Invariant: nobody believes its
//! answer; who passes it on merges, cuts and bounds it (`export`'s `nbd/status.rs`).

use std::fmt;

use crate::ByteRange;
use crate::node::NodeFuture;

/// Extents that a provider is asked for at once: they stay in the processor's cache until they are
/// in the reply.
pub const EXTENTS_AT_ONCE: usize = 4 << 10;

/// Looks at a node's ranges, each a call to the kernel at worst, before other tasks of the iothread
/// get their turn.
pub const LOOKS_MAX: usize = 256;

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
