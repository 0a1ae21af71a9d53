//! Writing: in place without a lock, else through `allocate`.

use std::sync::Arc;

use crate::bitmap::Mark;
use crate::engine::buffer::{IoMem, Iov};
use crate::filter::blkdebug::Event;
use crate::gate::Pass;
use crate::{ByteRange, Errno};

use super::map::Place;
use super::read::PARTS_MAX;
use super::{Image, ImageState};

impl Image {
    pub(super) fn writable_now(&self) -> Result<(), Errno> {
        if !self.is_writable() {
            return Err(Errno::Perm);
        }
        match self.state() {
            ImageState::Healthy => Ok(()),
            ImageState::WritesRefused | ImageState::Failed => Err(Errno::Io),
        }
    }

    /// Enter to change something: while this waited the image may have become read-only.
    pub(super) async fn enter_writing(&self) -> Result<Pass<'_>, Errno> {
        let pass = self.gate.enter().await;
        self.writable_now()?;
        Ok(pass)
    }

    /// Write in place without waiting; `None`: space or time is needed.
    pub(crate) fn try_write(&self, offset: u64, iov: Iov<'_>) -> Option<Result<(), Errno>> {
        let _pass = self.gate.try_enter()?;
        if let Err(e) = self.writable_now() {
            return Some(Err(e));
        }
        let written = self.try_write_inside(offset, iov);
        if written.is_some() {
            let end = offset + iov.len() as u64;
            self.bitmaps.mark(ByteRange::between(offset, end));
        }
        written
    }

    fn try_write_inside(&self, offset: u64, iov: Iov<'_>) -> Option<Result<(), Errno>> {
        let end = offset + iov.len() as u64;
        if end > self.size() {
            return None;
        }
        let whole = ByteRange::between(offset, end);
        let run = self.map.run(whole);
        if run.len < whole.len() && !self.is_in_place(whole) {
            // All of it or nothing: a half-done write would be done twice.
            return None;
        }
        let mut done = 0;
        while done < iov.len() {
            let run = match done {
                0 => run,
                _ => self.map.run(ByteRange::between(offset + done as u64, end)),
            };
            let Place::Raw {
                slot,
                offset,
                in_place: true,
            } = run.place
            else {
                return None;
            };
            let part = iov.part(done, run.len as usize);
            let result = self.files.node(slot).ok()?.try_write_iov(offset, part)?;
            if result.is_err() {
                return Some(result);
            }
            done += part.len();
        }
        Some(Ok(()))
    }

    fn is_in_place(&self, range: ByteRange) -> bool {
        let mut at = range.offset();
        while at < range.end() {
            let run = self.map.run(ByteRange::between(at, range.end()));
            if !matches!(run.place, Place::Raw { in_place: true, .. }) {
                return false;
            }
            at += run.len;
        }
        true
    }

    /// Write, whatever it takes. `fua`: durable when done.
    pub(crate) async fn write(
        self: &Arc<Self>,
        offset: u64,
        mem: IoMem,
        fua: bool,
    ) -> Result<(), Errno> {
        self.with_space(|| self.write_once(offset, &mem, fua)).await
    }

    /// Freed space may still be on its way back: try again when it is.
    pub(super) async fn with_space<F, T>(&self, attempt: impl Fn() -> F) -> Result<T, Errno>
    where
        F: Future<Output = Result<T, Errno>>,
    {
        self.writable_now()?;
        self.make_room().await?;
        match attempt().await {
            Err(Errno::NoSpc) if self.has_freed() => {
                self.settle().await?;
                attempt().await
            }
            other => other,
        }
    }

    async fn write_once(
        self: &Arc<Self>,
        offset: u64,
        mem: &IoMem,
        fua: bool,
    ) -> Result<(), Errno> {
        // Where a mapping is not durable yet, the bytes behind it are not
        // either, however they are written.
        let settled = self.flusher.is_settled();
        let allocated = {
            let _pass = self.enter_writing().await?;
            let _mark = self.mark_inside(offset, mem.len());
            self.write_inside(offset, mem, fua && settled).await?
        };
        if fua && (allocated || !settled || !self.flusher.is_settled()) {
            self.flush().await
        } else {
            Ok(())
        }
    }

    /// What is written is marked before the pass ends: who waits until nobody is inside may put
    /// bitmaps away that lack nothing.
    pub(super) fn mark_inside(&self, offset: u64, len: usize) -> Mark {
        let end = offset.saturating_add(len as u64);
        Mark::new(&self.bitmaps, ByteRange::between(offset, end))
    }

    /// Returns whether space was allocated. Bytes past the end of the image (a
    /// sector that the end cuts) have no place and are dropped.
    pub(super) async fn write_inside(
        self: &Arc<Self>,
        offset: u64,
        mem: &IoMem,
        fua: bool,
    ) -> Result<bool, Errno> {
        let end = (offset + mem.len() as u64).min(self.size());
        let mut at = offset;
        let mut allocated = false;
        let mut in_place = Vec::new();
        while at < end {
            let rest = ByteRange::between(at, end);
            let part = |len: u64| mem.part((at - offset) as usize, len as usize);
            let run = self.known_run(rest).await?;
            if let Place::Raw {
                slot,
                offset,
                in_place: true,
            } = run.place
            {
                let (files, part) = (&self.files, part(run.len));
                in_place.push(async move {
                    let node = files.node(slot)?;
                    node.write_as(Event::WRITE_AIO, offset, part, fua).await
                });
                at += run.len;
            } else {
                at += self.allocate(rest, &part(rest.len())).await?;
                allocated = true;
            }
            if in_place.len() == PARTS_MAX || at >= end {
                for result in futures_util::future::join_all(in_place.drain(..)).await {
                    result?;
                }
            }
        }
        Ok(allocated)
    }
}
