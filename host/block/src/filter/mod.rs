//! Nodes that stand between a user and one child and change what happens on the way.
//!
//! On whatever iothread a request runs. A filter that has nothing to do for a request passes it on
//! by a plain call, the forms that never wait included; one that has says so by "would wait"
//! (`None`, [`Segment::Unknown`]), and the request takes the async form. Invariant: what a filter
//! passes on reaches the child once, with the bytes that it came with.

pub mod blkdebug;
pub mod compress;
pub mod copy_on_read;
pub mod throttle;

use std::ops::Deref;
use std::sync::Arc;

use arc_swap::Guard;

use crate::engine::buffer::{IoMem, Iov};
use crate::format::Codec;
use crate::image::Image;
use crate::node::{Ask, Front, Kind, NodeFuture, Segment, Status};
use crate::window::Window;
use crate::{Buf, ByteRange, Errno, Node};

pub use blkdebug::Blkdebug;
pub use compress::Compress;
pub use copy_on_read::CopyOnRead;
pub use throttle::{Throttle, ThrottleGroup};

/// Which filter.
#[derive(Debug)]
pub enum Filter {
    /// Injects errors and holds requests up.
    Blkdebug(Blkdebug),
    /// Writes compressed.
    Compress(Compress),
    /// Keeps what was read from a backing node.
    CopyOnRead(CopyOnRead),
    /// Makes requests wait for limits.
    Throttle(Arc<Throttle>),
}

/// The image at or below a node, through filters, which change no offsets.
fn image_below(node: &Arc<Node>) -> Option<Arc<Image>> {
    match node.kind() {
        Kind::Filter(filter) => image_below(&filter.child().1),
        _ => node.image().cloned(),
    }
}

/// The node behind a filter: the same for ever, or that of the moment. A request that is on its way
/// keeps it.
#[derive(Debug)]
pub enum Below<'f> {
    /// The same for ever.
    Fixed(&'f Arc<Node>),
    /// Of the moment.
    Now(Guard<Arc<Window>>),
}

impl Deref for Below<'_> {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        match self {
            Self::Fixed(child) => child,
            Self::Now(window) => &window.child,
        }
    }
}

impl Filter {
    /// The child, and QEMU's name for its role.
    #[must_use]
    pub fn child(&self) -> (&'static str, Below<'_>) {
        match self {
            Self::Blkdebug(debug) => ("image", Below::Fixed(debug.child())),
            Self::Compress(compress) => ("file", Below::Fixed(compress.child())),
            Self::CopyOnRead(copy) => ("file", Below::Fixed(copy.child())),
            Self::Throttle(throttle) => ("file", Below::Now(throttle.child())),
        }
    }

    /// The child, if reads of the range go straight to it.
    fn plain_reads(&self, range: ByteRange) -> Option<Below<'_>> {
        let plain = match self {
            Self::Blkdebug(debug) => debug.is_quiet(),
            Self::Compress(_) => true,
            Self::CopyOnRead(copy) => copy.is_copied(range),
            Self::Throttle(throttle) => throttle.is_open(),
        };
        plain.then(|| self.child().1)
    }

    /// The child, if writes go straight to it.
    fn plain_writes(&self) -> Option<Below<'_>> {
        let plain = match self {
            Self::Blkdebug(debug) => debug.is_quiet(),
            Self::Compress(_) => false,
            Self::CopyOnRead(_) => true,
            Self::Throttle(throttle) => throttle.is_open(),
        };
        plain.then(|| self.child().1)
    }

    pub(crate) fn try_read(&self, offset: u64, iov: Iov<'_>) -> Option<Result<(), Errno>> {
        let range = ByteRange::new(offset, iov.len() as u64)?;
        self.plain_reads(range)?.try_read_iov(offset, iov)
    }

    pub(crate) fn try_write(&self, offset: u64, iov: Iov<'_>) -> Option<Result<(), Errno>> {
        self.plain_writes()?.try_write_iov(offset, iov)
    }

    pub(crate) fn segment(&self, range: ByteRange) -> Segment {
        match self.plain_reads(range) {
            Some(child) => child.segment(range),
            None => Segment::Unknown { len: range.len() },
        }
    }

    pub(crate) fn front(&self, range: ByteRange, ask: Ask) -> Front {
        match self.plain_reads(range) {
            Some(child) => child.front(range, ask),
            None => Front::data(range.len()),
        }
    }

    pub(crate) fn read(&self, offset: u64, mem: IoMem) -> NodeFuture<'_, ()> {
        let range = ByteRange::new(offset, mem.len() as u64).unwrap_or_default();
        if let Some(Below::Fixed(child)) = self.plain_reads(range) {
            return child.read_mem(offset, mem);
        }
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.read(offset, mem)),
            Self::Compress(compress) => compress.child().read_mem(offset, mem),
            Self::CopyOnRead(copy) => Box::pin(copy.read(offset, mem)),
            Self::Throttle(throttle) => Box::pin(throttle.read(offset, mem)),
        }
    }

    pub(crate) fn write(&self, offset: u64, mem: IoMem, fua: bool) -> NodeFuture<'_, ()> {
        if let Some(Below::Fixed(child)) = self.plain_writes() {
            return child.write_mem(offset, mem, fua);
        }
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.write(offset, mem, fua)),
            Self::Compress(compress) => Box::pin(compress.write(offset, mem, fua)),
            Self::CopyOnRead(copy) => copy.child().write_mem(offset, mem, fua),
            Self::Throttle(throttle) => Box::pin(throttle.write(offset, mem, fua)),
        }
    }

    pub(crate) fn write_compressed<'a>(
        &'a self,
        offset: u64,
        buf: &'a Buf,
        codec: Codec,
    ) -> NodeFuture<'a, ()> {
        Box::pin(async move {
            match self {
                Self::Blkdebug(debug) => debug.before_compressed(offset, buf.len()).await?,
                Self::Throttle(throttle) => throttle.before_compressed(buf.len()).await,
                Self::Compress(_) | Self::CopyOnRead(_) => {}
            }
            self.child().1.write_compressed(offset, buf, codec).await
        })
    }

    pub(crate) fn flush(&self) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.flush()),
            Self::Compress(compress) => compress.child().flush_as_child(),
            Self::CopyOnRead(copy) => copy.child().flush_as_child(),
            Self::Throttle(throttle) => Box::pin(throttle.flush()),
        }
    }

    pub(crate) fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.discard(range)),
            Self::Compress(compress) => Box::pin(compress.discard(range)),
            Self::CopyOnRead(copy) => copy.child().discard(range),
            Self::Throttle(throttle) => Box::pin(throttle.discard(range)),
        }
    }

    /// `fast`: `NotSup` where it is not known to be faster than writing.
    pub(crate) fn zero(&self, range: ByteRange, may_unmap: bool, fast: bool) -> NodeFuture<'_, ()> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.zero(range, may_unmap, fast)),
            Self::Compress(compress) => Box::pin(compress.zero(range, may_unmap, fast)),
            Self::CopyOnRead(copy) => copy.child().zero(range, may_unmap, fast),
            Self::Throttle(throttle) => Box::pin(throttle.zero(range, may_unmap, fast)),
        }
    }

    pub(crate) fn status(&self, range: ByteRange) -> NodeFuture<'_, Status> {
        match self {
            Self::Blkdebug(debug) => Box::pin(debug.status(range)),
            Self::Compress(compress) => compress.child().status(range),
            Self::CopyOnRead(copy) => copy.child().status(range),
            Self::Throttle(throttle) => Box::pin(throttle.status(range)),
        }
    }
}

#[cfg(test)]
mod tests;
