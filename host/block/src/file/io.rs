//! The operations of a host file that go through the engine.
//!
//! Any thread. Each loops over what the kernel does in parts; with `O_DIRECT`
//! what is not aligned bounces. Invariant: the file never gets shorter except
//! by [`Inner::set_len`] and by cutting the padding of an unaligned tail, which
//! exclude everyone who makes it longer.

use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::{MutexGuard, RwLockReadGuard};

use crate::engine::buffer::{BOUNCE_MAX, Buf, IoMem};
use crate::engine::{Op, OpKind, submit};
use crate::{ByteRange, Errno};

use super::Inner;

type Result<T> = std::result::Result<T, Errno>;

impl Inner {
    /// Read; bytes past the end are zero.
    pub(super) async fn read(&self, offset: u64, mem: IoMem) -> Result<()> {
        if self.align() > 1 && !self.is_aligned(offset, &mem) {
            return self.read_bounced(offset, &mem).await;
        }
        let len = mem.len();
        let mut done = 0;
        while done < len {
            let part = rest_of(&mem, done, len);
            let n = match self.op(offset + done as u64, OpKind::Read(part)).await {
                // `cache.direct` came in between.
                Err(Errno::Inval) if !self.is_aligned(offset, &mem) => {
                    return self.read_bounced(offset, &mem).await;
                }
                other => other?,
            };
            done += n;
            // A direct read ends unaligned only at the end of the file.
            if n == 0 || !done.is_multiple_of(self.align() as usize) {
                mem.part(done, len - done).fill_zero();
                break;
            }
        }
        Ok(())
    }

    fn is_aligned(&self, offset: u64, mem: &IoMem) -> bool {
        let align = u64::from(self.align());
        offset.is_multiple_of(align) && mem.is_aligned(self.align() as usize)
    }

    async fn read_bounced(&self, offset: u64, mem: &IoMem) -> Result<()> {
        let align = u64::from(self.align());
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let mut bounce = bounce(range, align)?;
        for piece in range.cut_at(BOUNCE_MAX) {
            let outer = piece.align_out(align);
            bounce.set_len(outer.len() as usize);
            Box::pin(self.read(outer.offset(), bounce.io())).await?;
            let skip = (piece.offset() - outer.offset()) as usize;
            let mut part = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
            part.copy_from(&bounce.as_slice()[skip..skip + part.len()]);
        }
        Ok(())
    }

    /// Write; `fua`: durable when done.
    pub(super) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<()> {
        let fua = fua && !self.no_flush.load(Ordering::Acquire);
        if mem.len() == 0 {
            return Ok(());
        }
        if fua && !self.is_direct() {
            // A durable write that fails would hear, instead of the flush that follows, of
            // pages of others that were lost.
            self.write_plainly(offset, mem, false).await?;
            return self.flush().await;
        }
        self.write_plainly(offset, mem, fua).await
    }

    async fn write_plainly(&self, offset: u64, mem: IoMem, fua: bool) -> Result<()> {
        let end = offset + mem.len() as u64;
        if self.align() > 1 && !self.is_aligned(offset, &mem) {
            return self.write_bounced(offset, &mem, fua).await;
        }
        let _growing = self.growing(end).await;
        self.write_whole(offset, &mem, fua).await?;
        self.len.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Held while something makes the file longer, up to `end`.
    async fn growing(&self, end: u64) -> Option<RwLockReadGuard<'_, ()>> {
        match self.align() > 1 && end > self.len() {
            true => Some(self.tail.read().await),
            false => None,
        }
    }

    async fn write_whole(&self, offset: u64, mem: &IoMem, fua: bool) -> Result<()> {
        let traced = self.trace.as_ref().map(|t| (t, t.write(offset, mem)));
        let len = mem.len();
        let mut done = 0;
        while done < len {
            let part = rest_of(mem, done, len);
            let at = offset + done as u64;
            match self.op(at, OpKind::Write(part, fua)).await? {
                0 => return Err(Errno::Io),
                n => done += n,
            }
            if done < len {
                // A direct write may stop anywhere; go on at a block.
                done -= done % self.align() as usize;
            }
        }
        if let Some((trace, id)) = traced {
            trace.written(id);
            if fua {
                trace.durable(id);
            }
        }
        Ok(())
    }

    /// Whole blocks around what is not aligned: read, changed, written.
    async fn write_bounced(&self, offset: u64, mem: &IoMem, fua: bool) -> Result<()> {
        let align = u64::from(self.align());
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let end = range.align_out(align).end();
        let _one_at_a_time = self.rmw.lock().await;
        // The padding is cut off again: nobody may put anything there between.
        let tail = if !self.device && end > self.len() {
            Some(self.tail.write().await)
        } else {
            None
        };
        let len = self.len().max(range.end());
        let mut bounce = bounce(range, align)?;
        for piece in range.cut_at(BOUNCE_MAX) {
            let outer = piece.align_out(align);
            bounce.set_len(outer.len() as usize);
            if outer != piece {
                Box::pin(self.read(outer.offset(), bounce.io())).await?;
            }
            let skip = (piece.offset() - outer.offset()) as usize;
            let part = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
            part.copy_to(&mut bounce.as_mut_slice()[skip..skip + part.len()]);
            self.write_whole(outer.offset(), &bounce.io(), fua).await?;
        }
        if tail.is_some() && end > len {
            self.cut(len)?;
        }
        self.len.fetch_max(range.end(), Ordering::AcqRel);
        Ok(())
    }

    /// Held while something is done to parts of blocks, which a write of other parts of them
    /// would undo.
    async fn alone_in(&self, range: ByteRange) -> Option<MutexGuard<'_, ()>> {
        let align = u64::from(self.align());
        match (range.offset() | range.end()).is_multiple_of(align) {
            true => None,
            false => Some(self.rmw.lock().await),
        }
    }

    /// Give the range back to the file system if discards are wanted.
    pub(super) async fn discard(&self, range: ByteRange) -> Result<()> {
        let wanted = self.unmap.load(Ordering::Acquire) && self.can_punch.load(Ordering::Relaxed);
        if !wanted || range.is_empty() {
            return Ok(());
        }
        let _alone = self.alone_in(range).await;
        let punched = self.punch(range).await;
        let counts = &self.discards;
        match punched {
            Ok(()) => {
                counts.done.fetch_add(1, Ordering::Relaxed);
                counts.bytes.fetch_add(range.len(), Ordering::Relaxed);
            }
            Err(_) => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        match punched {
            // A hint that cannot be followed is no failure.
            Err(Errno::NotSup) => Ok(()),
            other => other,
        }
    }

    async fn punch(&self, range: ByteRange) -> Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (result, ever) = self.fallocate(mode, range).await;
        if !ever {
            self.can_punch.store(false, Ordering::Relaxed);
        }
        result
    }

    /// Zeroes by the file system, without writing them. `NotSup`: it cannot.
    pub(super) async fn zero(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let unmap = self.unmap.load(Ordering::Acquire) && self.can_punch.load(Ordering::Relaxed);
        let unmap = may_unmap && unmap;
        let _alone = self.alone_in(range).await;
        // Punching does not make a file longer.
        if unmap && range.end() <= self.len() {
            match self.punch(range).await {
                Err(Errno::NotSup) => {}
                other => return other,
            }
        }
        if !self.can_zero.load(Ordering::Relaxed) {
            return Err(Errno::NotSup);
        }
        let _growing = self.growing(range.end()).await;
        let (result, ever) = self.fallocate(libc::FALLOC_FL_ZERO_RANGE, range).await;
        if !ever {
            self.can_zero.store(false, Ordering::Relaxed);
        }
        if result.is_ok() {
            self.len.fetch_max(range.end(), Ordering::AcqRel);
        }
        result
    }

    /// The result, and whether it is worth trying another time. A device
    /// refuses ranges that cut a block, and only those.
    async fn fallocate(&self, mode: i32, range: ByteRange) -> (Result<()>, bool) {
        let traced = self.trace.as_ref().map(|t| (t, t.zero(range)));
        let len = range.len();
        let kind = OpKind::Fallocate { mode, len };
        match self.op(range.offset(), kind).await {
            Ok(_) => {}
            Err(Errno::Inval) => return (Err(Errno::NotSup), true),
            Err(e) => return (Err(e), e != Errno::NotSup),
        }
        self.data.forget();
        if let Some((trace, id)) = traced {
            trace.written(id);
        }
        (Ok(()), true)
    }

    /// Space for the range, wherever the file ends. `NotSup`: only writing tells.
    pub(super) async fn reserve(&self, range: ByteRange) -> Result<()> {
        if self.device || !self.can_reserve.load(Ordering::Relaxed) {
            return Err(Errno::NotSup);
        }
        let kind = OpKind::Fallocate {
            mode: libc::FALLOC_FL_KEEP_SIZE,
            len: range.len(),
        };
        match self.op(range.offset(), kind).await {
            Ok(_) => Ok(()),
            Err(Errno::NotSup | Errno::Inval) => {
                self.can_reserve.store(false, Ordering::Relaxed);
                Err(Errno::NotSup)
            }
            Err(e) => Err(e),
        }
    }

    /// Make it at least `len` bytes long, whoever else is making it longer: a
    /// length that was looked up is old before the file is cut to it.
    pub(super) async fn grow(&self, len: u64) -> Result<()> {
        if len <= self.len() {
            return Ok(());
        }
        if self.device {
            // Whoever owns it may have made it longer.
            return match len <= self.len_again() {
                true => Ok(()),
                false => Err(Errno::NoSpc),
            };
        }
        let last = OpKind::Fallocate { mode: 0, len: 1 };
        let growing = self.growing(len).await;
        match self.op(len - 1, last).await {
            Ok(_) => {}
            Err(Errno::NotSup | Errno::Inval) => {
                drop(growing);
                return self.set_len(len).await;
            }
            Err(e) => return Err(e),
        }
        if let Some(trace) = &self.trace {
            trace.grow(len);
        }
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    /// Change the length.
    pub(super) async fn set_len(&self, len: u64) -> Result<()> {
        if self.device {
            return match len <= self.len_again() {
                true => Ok(()),
                false => Err(Errno::NotSup),
            };
        }
        let _alone = self.tail.write().await;
        self.cut(len)
    }

    fn cut(&self, len: u64) -> Result<()> {
        if let Some(trace) = &self.trace {
            trace.truncate(len);
        }
        rustix::fs::ftruncate(&self.fd, len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    pub(super) async fn op(&self, offset: u64, kind: OpKind) -> Result<usize> {
        loop {
            let op = Op {
                fd: self.fd.clone(),
                offset,
                kind: kind.clone(),
            };
            #[cfg(test)]
            if let Some(answer) = self.answered(&op.kind) {
                return super::tests::transferred(answer.await);
            }
            let n = if self.writes_inline(&op.kind) {
                let before = Instant::now();
                let n = op.run_blocking();
                self.took(before.elapsed());
                // Many in a row must not keep the thread from everybody else.
                tokio::task::consume_budget().await;
                n
            } else {
                submit(op, self.options.aio).await
            };
            if n >= 0 {
                return Ok(n as usize);
            }
            match -n {
                libc::EINTR => {}
                // The ring had no memory or worker for it: let others go on.
                libc::EAGAIN => tokio::task::yield_now().await,
                e => return Err(Errno::from_raw(e)),
            }
        }
    }

    /// Is it a write that the page cache takes at once? The ring would hand it to a worker thread,
    /// which costs more than the copy.
    fn writes_inline(&self, kind: &OpKind) -> bool {
        match kind {
            OpKind::Write(mem, false) => self.is_inline(mem.len()),
            _ => false,
        }
    }
}

/// Memory for the blocks around any piece of the range.
fn bounce(range: ByteRange, align: u64) -> Result<Buf> {
    let len = range.align_out(align).len().min(BOUNCE_MAX);
    Ok(Buf::zeroed(usize::try_from(len).map_err(|_| Errno::NoMem)?))
}

/// What one operation can take of what is not done yet.
fn rest_of(mem: &IoMem, done: usize, len: usize) -> IoMem {
    let rest = if done == 0 {
        mem.clone()
    } else {
        mem.part(done, len - done)
    };
    match rest.one_op() {
        n if n == rest.len() => rest,
        n => rest.part(0, n),
    }
}
