//! Nodes whose bytes a server keeps: the seam to protocols, which this crate does not know.
//!
//! A [`Remote`] carries out requests of the lengths and alignment that it asked for; a
//! [`RemoteNode`] makes such requests out of any. Used from every thread. Invariant: a [`Remote`]
//! sees only requests inside its length, in multiples of its smallest block.

use std::fmt;
use std::sync::Arc;

use tokio::sync::{RwLock, RwLockReadGuard};

use crate::engine::buffer::{BOUNCE_MAX, Buf, IoMem};
use crate::engine::transfer::{Landing, Payload};
use crate::node::{NodeFuture, Status};
use crate::{ByteRange, Errno};

/// What a [`Remote`] can take in one request.
#[derive(Clone, Copy, Debug)]
pub struct RemoteLimits {
    /// Offsets and lengths are multiples of this: a power of two.
    pub block_min: u32,
    /// Requests of this size run best.
    pub preferred: u32,
    /// Bytes of one read or write, at least `block_min`.
    pub transfer_max: u32,
    /// Bytes of one request without payload, at least `block_min`.
    pub effect_max: u64,
}

/// A server's bytes.
pub trait Remote: fmt::Debug + Send + Sync {
    /// Length in bytes, a multiple of `block_min`; it does not change.
    fn len_bytes(&self) -> u64;
    /// What one request may be; does not change.
    fn limits(&self) -> RemoteLimits;
    /// Where the bytes are, for people: a URI.
    fn name(&self) -> String;
    /// Fill `into` from `offset`. Answers through `into`.
    fn read(&self, offset: u64, into: Landing);
    /// Write. `fua`: durable when done.
    fn write(&self, offset: u64, from: Payload, fua: bool) -> NodeFuture<'_, ()>;
    /// What was acknowledged becomes durable.
    fn flush(&self) -> NodeFuture<'_, ()>;
    /// The content is not needed; a hint.
    fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()>;
    /// Zero; `NotSup` where the server cannot, or with `fast` not without writing.
    fn zero(&self, range: ByteRange, may_unmap: bool, fast: bool) -> NodeFuture<'_, ()>;
    /// The range will be read soon; a hint.
    fn prefetch(&self, range: ByteRange) -> NodeFuture<'_, ()>;
    /// Allocation status of a front part.
    fn status(&self, range: ByteRange) -> NodeFuture<'_, Status>;
    /// The daemon ends: what the server does not answer soon fails.
    fn hurry(&self) {}
    /// Say goodbye; nothing is asked afterwards.
    fn close(&self) -> NodeFuture<'_, ()>;
}

/// A [`Remote`] as a node uses it.
#[derive(Debug)]
pub struct RemoteNode {
    remote: Arc<dyn Remote>,
    limits: RemoteLimits,
    len: u64,
    /// Writes of parts of blocks read, change and write them: nobody else writes meanwhile.
    partial: RwLock<()>,
}

type Outcome<T> = Result<T, Errno>;

impl RemoteNode {
    /// A node over `remote`.
    #[must_use]
    pub fn new(remote: Arc<dyn Remote>) -> Self {
        Self {
            limits: remote.limits(),
            len: remote.len_bytes(),
            remote,
            partial: RwLock::new(()),
        }
    }

    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn preferred_io(&self) -> u32 {
        self.limits.preferred.max(4096)
    }

    pub(crate) fn name(&self) -> String {
        self.remote.name()
    }

    fn is_aligned(&self, range: ByteRange) -> bool {
        let min = u64::from(self.limits.block_min);
        (range.offset() | range.len()).is_multiple_of(min)
    }

    /// Shared by those who write whole blocks; nobody waits where blocks are bytes.
    async fn whole_blocks(&self) -> Option<RwLockReadGuard<'_, ()>> {
        match self.limits.block_min {
            1 => None,
            _ => Some(self.partial.read().await),
        }
    }

    /// What lies past the end reads as zeroes: users see a length of whole sectors.
    pub(crate) async fn read(&self, offset: u64, mem: IoMem) -> Outcome<()> {
        let len = mem.len();
        let inside = self.len.saturating_sub(offset).min(len as u64) as usize;
        if inside == len {
            return self.read_inside(offset, mem).await;
        }
        mem.part(inside, len - inside).fill_zero();
        match inside {
            0 => Ok(()),
            _ => self.read_inside(offset, mem.part(0, inside)).await,
        }
    }

    async fn read_inside(&self, offset: u64, mem: IoMem) -> Outcome<()> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        if self.is_aligned(range) {
            return self.read_blocks(offset, mem).await;
        }
        for piece in self.bounces(range) {
            let mut mem = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
            if self.is_aligned(piece) {
                self.read_blocks(piece.offset(), mem).await?;
                continue;
            }
            let (buf, at) = self.read_around(piece).await?;
            mem.copy_from(&buf.as_slice()[at..at + mem.len()]);
        }
        Ok(())
    }

    /// Pieces that are aligned, or take little memory to be.
    fn bounces(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        range.cut_at(BOUNCE_MAX.max(u64::from(self.limits.block_min)))
    }

    /// The whole blocks around the range, and where in them it begins.
    async fn read_around(&self, range: ByteRange) -> Outcome<(Buf, usize)> {
        let wide = range.align_out(u64::from(self.limits.block_min));
        let buf = Buf::zeroed(wide.len() as usize);
        self.read_blocks(wide.offset(), buf.io()).await?;
        Ok((buf, (range.offset() - wide.offset()) as usize))
    }

    async fn read_blocks(&self, offset: u64, mem: IoMem) -> Outcome<()> {
        let len = mem.len();
        let max = self.limits.transfer_max as usize;
        if len <= max {
            let (landing, landed) = Landing::new(mem);
            self.remote.read(offset, landing);
            return landed.await;
        }
        for at in (0..len).step_by(max) {
            let part = mem.part(at, max.min(len - at));
            let (landing, landed) = Landing::new(part);
            self.remote.read(offset + at as u64, landing);
            landed.await?;
        }
        Ok(())
    }

    pub(crate) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Outcome<()> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        if range.end() > self.len {
            return Err(Errno::NoSpc);
        }
        if self.is_aligned(range) {
            let _whole = self.whole_blocks().await;
            return self.write_blocks(offset, mem, fua).await;
        }
        let _alone = self.partial.write().await;
        for piece in self.bounces(range) {
            let mem = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
            if self.is_aligned(piece) {
                self.write_blocks(piece.offset(), mem, fua).await?;
                continue;
            }
            let (mut buf, at) = self.read_around(piece).await?;
            mem.copy_to(&mut buf.as_mut_slice()[at..at + mem.len()]);
            let start = piece.offset() - at as u64;
            self.write_blocks(start, buf.io(), fua).await?;
        }
        Ok(())
    }

    async fn write_blocks(&self, offset: u64, mem: IoMem, fua: bool) -> Outcome<()> {
        let len = mem.len();
        let max = self.limits.transfer_max as usize;
        if len <= max {
            return self.remote.write(offset, Payload::new(mem), fua).await;
        }
        for at in (0..len).step_by(max) {
            let part = Payload::new(mem.part(at, max.min(len - at)));
            self.remote.write(offset + at as u64, part, fua).await?;
        }
        Ok(())
    }

    pub(crate) async fn flush(&self) -> Outcome<()> {
        self.remote.flush().await
    }

    /// The whole blocks of the range, in pieces that one request may have.
    fn pieces(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let limits = self.limits;
        let end = range.end().min(self.len);
        let inner = ByteRange::between(range.offset(), end).align_in(limits.block_min.into());
        let step = usize::try_from(limits.effect_max).unwrap_or(usize::MAX);
        (inner.offset()..inner.end())
            .step_by(step)
            .map(move |at| ByteRange::between(at, inner.end().min(at + limits.effect_max)))
    }

    pub(crate) async fn discard(&self, range: ByteRange) -> Outcome<()> {
        let _whole = self.whole_blocks().await;
        for piece in self.pieces(range) {
            self.remote.discard(piece).await?;
        }
        Ok(())
    }

    pub(crate) async fn zero(&self, range: ByteRange, unmap: bool, fast: bool) -> Outcome<()> {
        if range.end() > self.len {
            return Err(Errno::NoSpc);
        }
        if !self.is_aligned(range) {
            // The caller writes the zeroes then.
            return Err(Errno::NotSup);
        }
        let _whole = self.whole_blocks().await;
        for piece in self.pieces(range) {
            self.remote.zero(piece, unmap, fast).await?;
        }
        Ok(())
    }

    pub(crate) async fn prefetch(&self, range: ByteRange) -> Outcome<()> {
        for piece in self.pieces(range) {
            self.remote.prefetch(piece).await?;
        }
        Ok(())
    }

    pub(crate) async fn status(&self, range: ByteRange) -> Outcome<Status> {
        if range.offset() >= self.len {
            return Ok(Status {
                len: range.len(),
                data: false,
                zero: true,
                depth: 1,
            });
        }
        let wide = range.align_out(u64::from(self.limits.block_min));
        let end = wide.end().min(self.len);
        let end = end.min(wide.offset() + self.limits.effect_max);
        let before = range.offset() - wide.offset();
        let asked = ByteRange::between(wide.offset(), end);
        let status = self.remote.status(asked).await?;
        if status.len <= before {
            // Finer than the server's own blocks: not to be believed.
            return Ok(Status {
                len: range.len().min(u64::from(self.limits.block_min) - before),
                data: true,
                zero: false,
                depth: 1,
            });
        }
        Ok(Status {
            len: (status.len - before).min(range.len()),
            ..status
        })
    }

    pub(crate) fn hurry(&self) {
        self.remote.hurry();
    }

    pub(crate) async fn close(&self) {
        // There is nobody to tell but the server.
        let _ = self.remote.close().await;
    }
}

#[cfg(test)]
mod tests;
