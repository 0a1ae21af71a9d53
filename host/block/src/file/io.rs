//! The operations of a host file that go through the engine.
//!
//! Any thread. Each loops over what the kernel does in parts; with `O_DIRECT`
//! what is not aligned bounces. Invariant: the file never gets shorter except
//! by [`Inner::set_len`] and by cutting the padding of an unaligned tail, which
//! exclude everyone who makes it longer.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::buffer::{Buf, IoMem};
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
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let outer = range.align_out(u64::from(self.align()));
        let buf = Buf::zeroed(usize::try_from(outer.len()).map_err(|_| Errno::NoMem)?);
        Box::pin(self.read(outer.offset(), buf.io())).await?;
        let skip = (offset - outer.offset()) as usize;
        mem.copy_from(&buf.as_slice()[skip..skip + mem.len()]);
        Ok(())
    }

    /// Write; `fua`: durable when done.
    pub(super) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<()> {
        let fua = fua && !self.no_flush.load(Ordering::Acquire);
        if mem.len() == 0 {
            return Ok(());
        }
        let end = offset + mem.len() as u64;
        if self.align() > 1 && !self.is_aligned(offset, &mem) {
            return self.write_bounced(offset, &mem, fua).await;
        }
        let _growing = if self.align() > 1 && end > self.len() {
            Some(self.tail.read().await)
        } else {
            None
        };
        self.write_whole(offset, &mem, fua).await?;
        self.len.fetch_max(end, Ordering::AcqRel);
        Ok(())
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
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let outer = range.align_out(u64::from(self.align()));
        let mut buf = Buf::zeroed(usize::try_from(outer.len()).map_err(|_| Errno::NoMem)?);
        let _one_at_a_time = self.rmw.lock().await;
        // The padding is cut off again: nobody may put anything there between.
        let tail = if !self.device && outer.end() > self.len() {
            Some(self.tail.write().await)
        } else {
            None
        };
        let len = self.len().max(range.end());
        if outer != range {
            Box::pin(self.read(outer.offset(), buf.io())).await?;
        }
        let skip = (offset - outer.offset()) as usize;
        mem.copy_to(&mut buf.as_mut_slice()[skip..skip + mem.len()]);
        self.write_whole(outer.offset(), &buf.io(), fua).await?;
        if tail.is_some() && outer.end() > len {
            self.cut(len)?;
        }
        self.len.fetch_max(range.end(), Ordering::AcqRel);
        Ok(())
    }

    /// Everything written so far becomes durable.
    pub(super) async fn flush(&self) -> Result<()> {
        if self.no_flush.load(Ordering::Acquire) || self.read_only.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.lost.load(Ordering::Acquire) {
            return Err(Errno::Io);
        }
        let traced = self.trace.as_ref().map(|t| (t, t.flush()));
        if let Err(e) = self.op(0, OpKind::Datasync).await {
            // The kernel reports a lost page once and forgets it: the next
            // flush would succeed, and lie.
            if !self.is_direct() {
                self.lost.store(true, Ordering::Release);
            }
            return Err(e);
        }
        if let Some((trace, id)) = traced {
            trace.flushed(id);
        }
        Ok(())
    }

    /// Give the range back to the file system if discards are wanted.
    pub(super) async fn discard(&self, range: ByteRange) -> Result<()> {
        let wanted = self.unmap.load(Ordering::Acquire) && self.can_punch.load(Ordering::Relaxed);
        if !wanted || range.is_empty() {
            return Ok(());
        }
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
        if let Some((trace, id)) = traced {
            trace.written(id);
        }
        (Ok(()), true)
    }

    /// Make it at least `len` bytes long, whoever else is making it longer: a
    /// length that was looked up is old before the file is cut to it.
    pub(super) async fn grow(&self, len: u64) -> Result<()> {
        if len <= self.len() {
            return Ok(());
        }
        if self.device {
            return Err(Errno::NotSup);
        }
        let last = OpKind::Fallocate { mode: 0, len: 1 };
        match self.op(len - 1, last).await {
            Ok(_) => {}
            Err(Errno::NotSup | Errno::Inval) => return self.set_len(len).await,
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
            return if len <= self.len() {
                Ok(())
            } else {
                Err(Errno::NotSup)
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

    async fn op(&self, offset: u64, kind: OpKind) -> Result<usize> {
        loop {
            let op = Op {
                fd: self.fd.clone(),
                offset,
                kind: kind.clone(),
            };
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
