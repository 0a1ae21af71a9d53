//! Allocating writes, in three steps.
//!
//! ```text
//!   range lock -> prepare (plugin) -> payload and fills (host) -> commit (plugin)
//! ```
//!
//! Fills are what an intent does not cover of its placement: the present
//! content of those guest bytes, wherever it is. That is all copy-on-write is.

use std::sync::Arc;

use crate::engine::buffer::{Buf, IoMem};
use crate::filter::blkdebug::Event;
use crate::format::{Codec, Placement, WriteIntent, WriteKind};
use crate::{ByteRange, Errno};

use super::map::Place;
use super::turn::{Prepared, Uncommitted};
use super::{Image, codec};

/// Bytes per allocating step: bounds what one `prepare-write` asks for, and
/// the range that others wait on.
const INTENT_MAX: u64 = 4 << 20;

/// A fill is copied in pieces of this size: blocks may be 256 MiB.
pub(super) const FILL_MAX: u64 = 2 << 20;

/// How often a write starts over because the instance that reserved its space
/// is gone. The instances go with it when the node fails at the second fault.
pub(super) const STARTS_MAX: usize = 4;

impl Image {
    /// Give space to a front part of `range` and write it; returns its length.
    pub(super) async fn allocate(
        self: &Arc<Self>,
        range: ByteRange,
        mem: &IoMem,
    ) -> Result<u64, Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let range =
            ByteRange::between(range.offset(), range.end().min(range.offset() + INTENT_MAX));
        let _guard = self.locks.lock(range.align_out(cluster)).await;
        for _ in 0..STARTS_MAX {
            match self.allocate_locked(range, mem).await {
                Err(Uncommitted::Stale) => self.writable_now()?,
                Err(Uncommitted::Failed(e)) => return Err(e),
                Ok(done) => return Ok(done),
            }
        }
        Err(self.files.why_in_vain())
    }

    pub(super) async fn allocate_locked(
        self: &Arc<Self>,
        range: ByteRange,
        mem: &IoMem,
    ) -> Result<u64, Uncommitted> {
        // Whoever held the lock may have done it already.
        let run = self.known_run(range).await?;
        if let Place::Raw {
            slot,
            offset,
            in_place: true,
        } = run.place
        {
            let part = mem.part(0, run.len as usize);
            let node = self.files.node(slot)?;
            node.write_as(Event::WRITE_AIO, offset, part, false).await?;
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
        self: &Arc<Self>,
        range: ByteRange,
        mem: &IoMem,
        prepared: Prepared,
    ) -> Result<u64, Uncommitted> {
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
            return Err(e.into());
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
            0 => Err(Errno::NoSpc.into()),
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
        let from = (data.offset() - range.offset()) as usize;
        let payload = mem.part(from, data.len() as usize);
        let (head, far_head) =
            near_part(ByteRange::between(p.covers.offset(), data.offset()), true);
        let (tail, far_tail) = near_part(ByteRange::between(data.end(), p.covers.end()), false);
        for far in [far_head, far_tail] {
            self.fill_far(far, p, virgin).await?;
        }
        let head_mem = self.present_content(head, virgin).await?;
        let tail_mem = self.present_content(tail, virgin).await?;
        let start = match &head_mem {
            Some(_) => head.offset(),
            None => data.offset(),
        };
        let whole = match (head_mem, tail_mem) {
            (None, None) => payload,
            (head, tail) => IoMem::join(head.into_iter().chain([payload]).chain(tail)),
        };
        let at = p.offset + (start - p.covers.offset());
        let node = self.files.node(p.slot)?;
        node.write_as(Event::WRITE_AIO, at, whole, false).await
    }

    /// Copy what does not go into one write with the payload.
    async fn fill_far(&self, range: ByteRange, p: &Placement, virgin: bool) -> Result<(), Errno> {
        let mut at = range.offset();
        while at < range.end() {
            let part = ByteRange::between(at, range.end().min(at + FILL_MAX));
            if let Some(content) = self.present_content(part, virgin).await? {
                let to = p.offset + (at - p.covers.offset());
                self.files
                    .node(p.slot)?
                    .write_as(Event::COW_WRITE, to, content, false)
                    .await?;
            }
            at = part.end();
        }
        Ok(())
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

    pub(super) async fn reads_as_zero(&self, range: ByteRange) -> Result<bool, Errno> {
        let mut at = range.offset();
        let end = range.end().min(self.size());
        while at < end {
            let run = self.known_run(ByteRange::between(at, end)).await?;
            let zero = match run.place {
                Place::Zero | Place::Hole => true,
                Place::Backing(offset) => match self.backing() {
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

    // === compressed ===

    /// Write one whole cluster compressed; plain if that is not smaller, or if
    /// the cluster can be overwritten where it is.
    pub(crate) async fn write_compressed(
        self: &Arc<Self>,
        offset: u64,
        mem: IoMem,
        codec: Codec,
    ) -> Result<(), Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        let whole = range.len() == cluster || range.end() == self.size();
        if !offset.is_multiple_of(cluster) || range.len() > cluster || !whole || cluster > FILL_MAX
        {
            return Err(Errno::Inval);
        }
        let mut unit = vec![0; cluster as usize];
        mem.copy_to(&mut unit[..mem.len()]);
        let Some(stored) = codec::encode(codec, &unit, unit.len()) else {
            return self.write(offset, mem, false).await;
        };
        let stored = Buf::from_slice(&stored);
        let done = self
            .with_space(|| self.store_compressed(range, &stored))
            .await?;
        if done {
            Ok(())
        } else {
            self.write(offset, mem, false).await
        }
    }

    /// `false`: part of the cluster is in place, write it plainly.
    async fn store_compressed(
        self: &Arc<Self>,
        range: ByteRange,
        stored: &Buf,
    ) -> Result<bool, Errno> {
        let _pass = self.enter_writing().await?;
        let _mark = self.mark_inside(range.offset(), range.len() as usize);
        let cluster = u64::from(self.geometry.cluster_size);
        let _guard = self.locks.lock(range.align_out(cluster)).await;
        let intent = WriteIntent {
            range,
            kind: WriteKind::Compressed,
            stored_len: stored.len() as u32,
        };
        for _ in 0..STARTS_MAX {
            let mut at = range.offset();
            while at < range.end() {
                let run = self.known_run(ByteRange::between(at, range.end())).await?;
                if matches!(run.place, Place::Raw { in_place: true, .. }) {
                    return Ok(false);
                }
                at += run.len;
            }
            match self.compressed_locked(intent, stored).await {
                Err(Uncommitted::Stale) => self.writable_now()?,
                Err(Uncommitted::Failed(e)) => return Err(e),
                Ok(()) => return Ok(true),
            }
        }
        Err(self.files.why_in_vain())
    }

    async fn compressed_locked(
        self: &Arc<Self>,
        intent: WriteIntent,
        stored: &Buf,
    ) -> Result<(), Uncommitted> {
        let prepared = self.prepare(intent).await?;
        let placements: Vec<Placement> = prepared.placements.iter().map(|(p, _)| *p).collect();
        let [p] = placements.as_slice() else {
            self.abort(&placements, prepared.generation).await;
            return Err(Errno::Io.into());
        };
        self.files
            .extend_reach(p.slot, p.offset + stored.len() as u64);
        let node = self.files.node(p.slot)?;
        let written = node.write_as(Event::WRITE_COMPRESSED, p.offset, stored.io(), false);
        if let Err(e) = written.await {
            self.abort(&placements, prepared.generation).await;
            return Err(e.into());
        }
        self.decoded.clear();
        self.commit(placements, prepared.generation).await
    }
}

impl From<Errno> for Uncommitted {
    fn from(e: Errno) -> Self {
        Self::Failed(e)
    }
}

/// The part of a fill that goes into one write with the payload beside it
/// (`at_end`: it ends where the payload begins), and the rest.
fn near_part(fill: ByteRange, at_end: bool) -> (ByteRange, ByteRange) {
    let near = fill.len().min(FILL_MAX);
    if at_end {
        let cut = fill.end() - near;
        (
            ByteRange::between(cut, fill.end()),
            ByteRange::between(fill.offset(), cut),
        )
    } else {
        let cut = fill.offset() + near;
        (
            ByteRange::between(fill.offset(), cut),
            ByteRange::between(cut, fill.end()),
        )
    }
}
