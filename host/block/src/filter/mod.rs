//! Nodes that stand between a user and one child and change what happens on the way.
//!
//! On whatever iothread a request runs. A filter that has nothing to do for a request passes it on
//! by a plain call, the forms that never wait included; one that has says so by "would wait"
//! (`None`, [`Segment::Unknown`]), and the request takes the async form. Invariant: what a filter
//! passes on reaches the child once, with the bytes that it came with.

pub mod blkdebug;

use std::sync::Arc;

use crate::engine::buffer::IoMem;
use crate::node::{NodeFuture, Segment, Status};
use crate::{ByteRange, Errno, Node};

pub use blkdebug::Blkdebug;

/// Which filter.
#[derive(Debug)]
pub enum Filter {
    /// Injects errors and holds requests up.
    Blkdebug(Blkdebug),
}

impl Filter {
    /// The child, and QEMU's name for its role.
    #[must_use]
    pub const fn child(&self) -> (&'static str, &Arc<Node>) {
        match self {
            Self::Blkdebug(debug) => ("image", debug.child()),
        }
    }

    /// The child, if reads go straight to it.
    fn plain_reads(&self) -> Option<&Arc<Node>> {
        match self {
            Self::Blkdebug(debug) => debug.is_quiet().then(|| debug.child()),
        }
    }

    /// The child, if writes go straight to it.
    fn plain_writes(&self) -> Option<&Arc<Node>> {
        match self {
            Self::Blkdebug(debug) => debug.is_quiet().then(|| debug.child()),
        }
    }

    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), Errno>> {
        self.plain_reads()?.try_read(offset, buf)
    }

    pub(crate) fn try_write(&self, offset: u64, buf: &[u8]) -> Option<Result<(), Errno>> {
        self.plain_writes()?.try_write(offset, buf)
    }

    pub(crate) fn segment(&self, range: ByteRange) -> Segment {
        match self.plain_reads() {
            Some(child) => child.segment(range),
            None => Segment::Unknown { len: range.len() },
        }
    }

    pub(crate) fn is_known_zero(&self, range: ByteRange) -> bool {
        self.plain_reads()
            .is_some_and(|child| child.is_known_zero(range))
    }

    pub(crate) fn read(&self, offset: u64, mem: IoMem) -> NodeFuture<'_, ()> {
        if let Some(child) = self.plain_reads() {
            return child.read_mem(offset, mem);
        }
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.read(offset, mem)),
        }
    }

    pub(crate) fn write(&self, offset: u64, mem: IoMem, fua: bool) -> NodeFuture<'_, ()> {
        if let Some(child) = self.plain_writes() {
            return child.write_mem(offset, mem, fua);
        }
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.write(offset, mem, fua)),
        }
    }

    pub(crate) fn flush(&self) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.flush()),
        }
    }

    pub(crate) fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.discard(range)),
        }
    }

    pub(crate) fn zero_fast(&self, range: ByteRange, may_unmap: bool) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.zero(range, may_unmap)),
        }
    }

    pub(crate) fn status(&self, range: ByteRange) -> NodeFuture<'_, Status> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.status(range)),
        }
    }
}
