//! `compress`: what is written through this node is stored compressed.
//!
//! Any iothread. A write becomes whole clusters, each compressed by itself; the rest of a cluster
//! that a write covers in part is read first, under a range lock that all writes take, so that two
//! parts of one cluster do not undo each other. A cluster that does not get smaller, or that lies
//! uncompressed in the image already, is written plainly by the image.

use std::sync::Arc;

use crate::engine::buffer::{Buf, IoMem};
use crate::format::Codec;
use crate::image::RangeLocks;
use crate::{ByteRange, Errno, Node};

use super::image_below;

/// The node.
#[derive(Debug)]
pub struct Compress {
    child: Arc<Node>,
    codec: Codec,
    cluster: u64,
    locks: RangeLocks,
}

impl Compress {
    /// A node before `child`, whose format compresses clusters with `codec`; `None`: there is no
    /// image there.
    #[must_use]
    pub fn new(child: Arc<Node>, codec: Codec) -> Option<Self> {
        let cluster = u64::from(image_below(&child)?.cluster_size());
        Some(Self {
            child,
            codec,
            cluster,
            locks: RangeLocks::default(),
        })
    }

    /// The node behind it.
    #[must_use]
    pub const fn child(&self) -> &Arc<Node> {
        &self.child
    }

    pub(super) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<(), Errno> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        let mut at = offset;
        while at < range.end() {
            let start = at / self.cluster * self.cluster;
            let end = range.end().min(start + self.cluster);
            let part = mem.part((at - offset) as usize, (end - at) as usize);
            self.write_cluster(start, at - start, part).await?;
            at = end;
            // Compressing takes its time; others on this thread have theirs.
            tokio::task::yield_now().await;
        }
        if fua {
            self.child.flush().await
        } else {
            Ok(())
        }
    }

    /// Write a part of the cluster at `start`, `skip` bytes into it.
    async fn write_cluster(&self, start: u64, skip: u64, part: IoMem) -> Result<(), Errno> {
        // The end of the image may cut the last cluster.
        let end = self.child.len_bytes().min(start + self.cluster);
        let whole = ByteRange::between(start, end);
        let _guard = self.locks.lock(whole).await;
        let mut unit = Buf::zeroed(whole.len() as usize);
        if skip > 0 || (part.len() as u64) < whole.len() {
            self.child.read_mem(start, unit.io()).await?;
        }
        let inside = (whole.len().saturating_sub(skip) as usize).min(part.len());
        let skip = skip as usize;
        part.part(0, inside)
            .copy_to(&mut unit.as_mut_slice()[skip..skip + inside]);
        self.child.write_compressed(start, &unit, self.codec).await
    }

    /// Zeroes need no bytes where the format has a mark for them.
    pub(super) async fn zero(
        &self,
        range: ByteRange,
        may_unmap: bool,
        fast: bool,
    ) -> Result<(), Errno> {
        let _guard = self.locks.lock(range.align_out(self.cluster)).await;
        self.child.zero(range, may_unmap, fast).await
    }

    pub(super) async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        let _guard = self.locks.lock(range.align_out(self.cluster)).await;
        self.child.discard(range).await
    }
}
