//! Writing: in place without a lock, or in three steps where space is needed.
//!
//! ```text
//!   range lock -> prepare (plugin) -> payload and fills (host) -> commit (plugin)
//! ```
//!
//! Fills are what an intent does not cover of its placement: the present
//! content of those guest bytes, wherever it is. That is all copy-on-write is.

use std::sync::atomic::Ordering;

use crate::engine::buffer::{Buf, IoMem};
use crate::format::{
    CheckReport, Codec, DiscardKind, FormatError, Placement, Repair, WriteIntent, WriteKind,
};
use crate::{ByteRange, Errno};

use super::map::Place;
use super::turn::Prepared;
use super::{Image, ImageState, codec};

/// Bytes per allocating step: bounds what one `prepare-write` asks for, and
/// the range that others wait on.
const INTENT_MAX: u64 = 4 << 20;

impl Image {
    fn writable_now(&self) -> Result<(), Errno> {
        if !self.writable {
            return Err(Errno::Perm);
        }
        match self.state() {
            ImageState::Healthy => Ok(()),
            ImageState::WritesRefused | ImageState::Failed => Err(Errno::Io),
        }
    }

    /// Write in place without waiting; `None`: space or time is needed.
    pub(crate) fn try_write(&self, offset: u64, buf: &[u8]) -> Option<Result<(), Errno>> {
        if let Err(e) = self.writable_now() {
            return Some(Err(e));
        }
        let _pass = self.gate.try_enter()?;
        let whole = ByteRange::between(offset, offset + buf.len() as u64);
        // All of it or nothing: a half-done write would be done twice.
        let mut at = offset;
        while at < whole.end() {
            let run = self.map.run(ByteRange::between(at, whole.end()));
            if !matches!(run.place, Place::Raw { in_place: true, .. }) {
                return None;
            }
            at += run.len;
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let run = self.map.run(ByteRange::between(at, whole.end()));
            let Place::Raw {
                slot,
                offset,
                in_place: true,
            } = run.place
            else {
                return None;
            };
            let part = &buf[done..done + run.len as usize];
            let result = self.files.node(slot).ok()?.try_write(offset, part)?;
            if result.is_err() {
                return Some(result);
            }
            done += part.len();
        }
        Some(Ok(()))
    }

    /// Write, whatever it takes. `fua`: durable when done.
    pub(crate) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<(), Errno> {
        self.with_space(|| self.write_once(offset, &mem, fua)).await
    }

    /// Freed space may still be on its way back: try again when it is.
    async fn with_space<F>(&self, attempt: impl Fn() -> F) -> Result<(), Errno>
    where
        F: Future<Output = Result<(), Errno>>,
    {
        self.writable_now()?;
        self.make_room().await?;
        match attempt().await {
            Err(Errno::NoSpc) if self.has_freed().await => {
                self.settle().await?;
                attempt().await
            }
            other => other,
        }
    }

    async fn write_once(&self, offset: u64, mem: &IoMem, fua: bool) -> Result<(), Errno> {
        let allocated = {
            let _pass = self.gate.enter().await;
            self.write_inside(offset, mem, fua).await?
        };
        if fua && allocated {
            self.flush().await
        } else {
            Ok(())
        }
    }

    /// Returns whether space was allocated.
    async fn write_inside(&self, offset: u64, mem: &IoMem, fua: bool) -> Result<bool, Errno> {
        let end = offset + mem.len() as u64;
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
                let node = self.files.node(slot)?;
                let part = part(run.len);
                in_place.push(async move { node.write_mem(offset, part, fua).await });
                at += run.len;
            } else {
                at += self.allocate(rest, &part(rest.len())).await?;
                allocated = true;
            }
        }
        for result in futures_util::future::join_all(in_place).await {
            result?;
        }
        Ok(allocated)
    }

    /// Give space to a front part of `range` and write it; returns its length.
    async fn allocate(&self, range: ByteRange, mem: &IoMem) -> Result<u64, Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let range =
            ByteRange::between(range.offset(), range.end().min(range.offset() + INTENT_MAX));
        let _guard = self.locks.lock(range.align_out(cluster)).await;
        // Whoever held the lock may have done it already.
        let run = self.known_run(range).await?;
        if let Place::Raw {
            slot,
            offset,
            in_place: true,
        } = run.place
        {
            let part = mem.part(0, run.len as usize);
            self.files
                .node(slot)?
                .write_mem(offset, part, false)
                .await?;
            return Ok(run.len);
        }
        let mut end = range.offset() + run.len;
        while end < range.end() {
            let run = self.known_run(ByteRange::between(end, range.end())).await?;
            if matches!(run.place, Place::Raw { in_place: true, .. }) {
                break;
            }
            end += run.len;
        }
        let range = ByteRange::between(range.offset(), end);
        let intent = WriteIntent {
            range,
            kind: WriteKind::Data,
            stored_len: 0,
        };
        let prepared = self.prepare(intent).await?;
        self.fill_and_commit(range, mem, prepared).await
    }

    async fn fill_and_commit(
        &self,
        range: ByteRange,
        mem: &IoMem,
        prepared: Prepared,
    ) -> Result<u64, Errno> {
        let Prepared {
            placements,
            generation,
        } = prepared;
        let writes = placements
            .iter()
            .map(|(p, virgin)| self.fill(range, mem, p, *virgin));
        let written = futures_util::future::join_all(writes).await;
        let mut placements: Vec<Placement> = placements.iter().map(|(p, _)| *p).collect();
        if let Some(Err(e)) = written.into_iter().find(Result::is_err) {
            self.abort(&placements, generation).await;
            return Err(e);
        }
        self.commit(placements.clone(), generation).await?;
        placements.sort_unstable_by_key(|p| p.covers.offset());
        let mut end = range.offset();
        for p in &placements {
            if p.covers.offset() > end {
                break;
            }
            end = end.max(p.covers.end());
        }
        match end.min(range.end()) - range.offset() {
            0 => Err(Errno::NoSpc),
            done => Ok(done),
        }
    }

    /// Write payload and what surrounds it to where the plugin put it.
    async fn fill(
        &self,
        range: ByteRange,
        mem: &IoMem,
        p: &Placement,
        virgin: bool,
    ) -> Result<(), Errno> {
        let Some(data) = range.intersect(p.covers) else {
            return Ok(());
        };
        let payload = mem.part(
            (data.offset() - range.offset()) as usize,
            data.len() as usize,
        );
        let head = ByteRange::between(p.covers.offset(), data.offset());
        let tail = ByteRange::between(data.end(), p.covers.end());
        let head_mem = self.present_content(head, virgin).await?;
        let tail_mem = self.present_content(tail, virgin).await?;
        let start = if head_mem.is_some() {
            head.offset()
        } else {
            data.offset()
        };
        let whole = match (head_mem, tail_mem) {
            (None, None) => payload,
            (head, tail) => IoMem::join(head.into_iter().chain([payload]).chain(tail)),
        };
        let at = p.offset + (start - p.covers.offset());
        self.files.node(p.slot)?.write_mem(at, whole, false).await
    }

    /// The present content of guest bytes; `None` if nothing need be written:
    /// they are zero, and so is the target.
    async fn present_content(
        &self,
        range: ByteRange,
        virgin: bool,
    ) -> Result<Option<IoMem>, Errno> {
        if range.is_empty() {
            return Ok(None);
        }
        let zero = self.reads_as_zero(range).await?;
        if zero && virgin {
            return Ok(None);
        }
        let buf = Buf::zeroed(range.len() as usize);
        if !zero {
            self.read_inside(range.offset(), buf.io()).await?;
        }
        Ok(Some(buf.io()))
    }

    async fn reads_as_zero(&self, range: ByteRange) -> Result<bool, Errno> {
        let mut at = range.offset();
        let end = range.end().min(self.size());
        while at < end {
            let run = self.known_run(ByteRange::between(at, end)).await?;
            let zero = match run.place {
                Place::Zero | Place::Hole => true,
                Place::Backing(offset) => match &self.backing {
                    Some(backing) => offset >= backing.size(),
                    None => true,
                },
                _ => false,
            };
            if !zero {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }

    /// Write one whole cluster compressed; plain if that is not smaller.
    pub(crate) async fn write_compressed(
        &self,
        offset: u64,
        mem: IoMem,
        codec: Codec,
    ) -> Result<(), Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let mut unit = vec![0; cluster as usize];
        if !offset.is_multiple_of(cluster) || mem.len() > unit.len() {
            return Err(Errno::Inval);
        }
        mem.copy_to(&mut unit[..mem.len()]);
        let Some(stored) = codec::encode(codec, &unit, unit.len()) else {
            return self.write(offset, mem, false).await;
        };
        self.with_space(|| self.store_compressed(offset, &mem, &stored))
            .await
    }

    async fn store_compressed(&self, offset: u64, mem: &IoMem, stored: &[u8]) -> Result<(), Errno> {
        let _pass = self.gate.enter().await;
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let cluster = u64::from(self.geometry.cluster_size);
        let _guard = self.locks.lock(range.align_out(cluster)).await;
        let stored_len = stored.len() as u32;
        let intent = WriteIntent {
            range,
            kind: WriteKind::Compressed,
            stored_len,
        };
        let prepared = self.prepare(intent).await?;
        let placements: Vec<Placement> = prepared.placements.iter().map(|(p, _)| *p).collect();
        let [p] = placements.as_slice() else {
            self.abort(&placements, prepared.generation).await;
            return Err(Errno::Io);
        };
        let buf = Buf::from_slice(stored);
        self.files
            .extend_reach(p.slot, p.offset + stored.len() as u64);
        let written = self
            .files
            .node(p.slot)?
            .write_mem(p.offset, buf.io(), false)
            .await;
        if let Err(e) = written {
            self.abort(&placements, prepared.generation).await;
            return Err(e);
        }
        self.decoded.clear();
        self.commit(placements, prepared.generation).await
    }

    /// Discard or zero what the format can of `range`; returns the part that it
    /// could not (unaligned head and tail), which for zeroes the caller writes.
    pub(crate) async fn discard(
        &self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<[ByteRange; 2], Errno> {
        self.writable_now()?;
        self.make_room().await?;
        let granularity = u64::from(match kind {
            DiscardKind::Discard => self.geometry.discard_granularity,
            _ => self.geometry.zero_granularity,
        });
        let inner = self.granules(range, granularity);
        let Some(inner) = inner.filter(|r| !r.is_empty()) else {
            return Ok([range, ByteRange::between(range.end(), range.end())]);
        };
        let _pass = self.gate.enter().await;
        let cluster = u64::from(self.geometry.cluster_size);
        let _guard = self.locks.lock(inner.align_out(cluster)).await;
        let mut at = inner.offset();
        while at < inner.end() {
            at = self
                .discard_step(ByteRange::between(at, inner.end()), kind)
                .await?;
        }
        Ok([
            ByteRange::between(range.offset(), inner.offset()),
            ByteRange::between(inner.end(), range.end()),
        ])
    }

    fn granules(&self, range: ByteRange, granularity: u64) -> Option<ByteRange> {
        if granularity == 0 {
            return None;
        }
        let inner = range.align_in(granularity);
        // The last granule may be cut by the end of the image.
        let end = if range.end() == self.size() {
            range.end()
        } else {
            inner.end()
        };
        Some(ByteRange::between(inner.offset(), end))
    }

    /// One plugin call; returns where it got to.
    async fn discard_step(&self, rest: ByteRange, kind: DiscardKind) -> Result<u64, Errno> {
        let mut plugin = self.plugin.lock().await;
        let result = self.call(&mut plugin, |f| f.discard(rest, kind)).await;
        let done = match result {
            Ok(call) => self.apply(&mut plugin, call).await,
            Err(e) => Err(e),
        };
        let extents = done.map_err(|e| e.errno())?;
        let end = extents
            .last()
            .map_or(rest.offset(), |e| e.range.end())
            .min(rest.end());
        let changed = ByteRange::between(rest.offset(), end);
        self.map.invalidate(changed);
        if let Err(fault) = self.insert(&mut plugin, rest, &extents) {
            self.faulted(&mut plugin, &fault);
            self.set_state(ImageState::WritesRefused);
            return Err(Errno::Io);
        }
        Ok(end)
    }

    /// Change the length.
    pub(crate) async fn resize(&self, size: u64) -> Result<(), FormatError> {
        let refused = |code: Errno| FormatError::Refused {
            code,
            message: code.to_string(),
        };
        self.writable_now().map_err(refused)?;
        // Nobody may be using what a shrink takes away.
        let _drained = self.gate.drain().await;
        let mut plugin = self.plugin.lock().await;
        let call = self.call(&mut plugin, |f| f.resize(size)).await?;
        let geometry = self.apply(&mut plugin, call).await?;
        Self::check_geometry(&geometry)?;
        if geometry.unit != self.geometry.unit {
            let message = "resize changed the mapping unit".to_owned();
            let kind = crate::format::FaultKind::BadAnswer;
            return Err(self.lie(&mut plugin, crate::format::Fault { kind, message }));
        }
        let old = self.size.swap(geometry.size, Ordering::AcqRel);
        let changed = ByteRange::between(old.min(geometry.size), ByteRange::END_MAX);
        self.map
            .invalidate(changed.align_out(u64::from(geometry.unit)));
        if let Some(verifier) = &mut plugin.verifier {
            verifier.set_size(geometry.size);
            verifier.evict(changed.align_out(u64::from(geometry.unit)));
        }
        Ok(())
    }

    /// Check, and mend what `fix` allows. `progress` is told each cursor.
    pub(crate) async fn check(
        &self,
        fix: Repair,
        mut progress: impl FnMut(u64),
    ) -> Result<CheckReport, FormatError> {
        let _drained = self.gate.drain().await;
        let mut plugin = self.plugin.lock().await;
        let mut cursor = 0;
        loop {
            let call = self
                .call_once(&mut plugin, |f| f.check(fix, cursor))
                .await?;
            let (report, next) = self.apply(&mut plugin, call).await?;
            match next {
                Some(next) => {
                    cursor = next;
                    progress(cursor);
                }
                None => {
                    if fix != Repair::default() {
                        let all = ByteRange::between(0, ByteRange::END_MAX);
                        self.map.invalidate(all);
                        if let Some(verifier) = &mut plugin.verifier {
                            verifier.evict(all);
                        }
                    }
                    return Ok(report);
                }
            }
        }
    }
}
