//! Reading: hits without a lock, misses through the plugin.

use std::sync::Arc;

use crate::engine::buffer::{Buf, IoMem, Iov};
use crate::filter::blkdebug::Event;
use crate::format::{Coded, Extent, Fault, FormatError, FormatFiles};
use crate::node::{Ask, Front, Segment};
use crate::{ByteRange, Errno};

use super::map::{Place, Run};
use super::verify::{Claims, Pending};
use super::{Image, ImageState, Plugin, codec};

/// Parts of one request in flight at one time: a fragmented image could turn
/// 32 MiB into 65536 of them.
pub(super) const PARTS_MAX: usize = 64;

/// Bytes of one `read-special` call, as the contract says.
const SPECIAL_MAX: u64 = 2 << 20;

impl Image {
    /// Read without waiting; `None`: something must be asked or waited for.
    pub(crate) fn try_read(&self, offset: u64, iov: Iov<'_>) -> Option<Result<(), Errno>> {
        let _pass = self.gate.try_enter()?;
        if self.state() == ImageState::Failed {
            return Some(Err(Errno::Io));
        }
        // A unit that the end of the image cuts may hold anything behind it.
        let inside = self.size().saturating_sub(offset).min(iov.len() as u64) as usize;
        let mut done = 0;
        while done < inside {
            let at = offset + done as u64;
            let run = self.map.run(ByteRange::between(at, offset + inside as u64));
            let len = run.len as usize;
            let out = iov.part(done, len);
            let result = match run.place {
                Place::Raw { slot, offset, .. } => {
                    self.files.node(slot).ok()?.try_read_iov(offset, out)?
                }
                Place::Zero | Place::Hole => {
                    out.fill_zero();
                    Ok(())
                }
                Place::Backing(offset) => self.try_read_backing(offset, out)?,
                Place::Coded(unit) => {
                    let data = self.decoded.get(&unit)?;
                    let skip = (at - unit.unit_offset) as usize;
                    out.copy_from(&data[skip..skip + len]);
                    Ok(())
                }
                Place::Unknown | Place::Special(_) => return None,
            };
            if result.is_err() {
                return Some(result);
            }
            done += len;
        }
        iov.part(inside, iov.len() - inside).fill_zero();
        Some(Ok(()))
    }

    fn try_read_backing(&self, offset: u64, out: Iov<'_>) -> Option<Result<(), Errno>> {
        let Some(backing) = self.backing() else {
            out.fill_zero();
            return Some(Ok(()));
        };
        // A backing file may be shorter than what stands on it.
        let inside = backing.size().saturating_sub(offset).min(out.len() as u64) as usize;
        out.part(inside, out.len() - inside).fill_zero();
        if inside == 0 {
            Some(Ok(()))
        } else {
            backing.try_read_iov(offset, out.part(0, inside))
        }
    }

    /// Read, whatever it takes.
    pub(crate) async fn read(&self, offset: u64, mem: IoMem) -> Result<(), Errno> {
        let _pass = self.gate.enter().await;
        if self.state() == ImageState::Failed {
            return Err(Errno::Io);
        }
        self.read_inside(offset, mem).await
    }

    /// [`Image::read`] for who is inside the gate already. Bytes past the end
    /// are zero.
    pub(super) async fn read_inside(&self, offset: u64, mem: IoMem) -> Result<(), Errno> {
        let size = self.size();
        let end = offset + mem.len() as u64;
        let inside = end.min(size).max(offset);
        mem.part((inside - offset) as usize, (end - inside) as usize)
            .fill_zero();
        let mut at = offset;
        let mut parts = Vec::new();
        while at < inside {
            let mut run = self.known_run(ByteRange::between(at, inside)).await?;
            if matches!(run.place, Place::Special(_)) {
                run.len = run.len.min(SPECIAL_MAX);
            }
            let part = mem.part((at - offset) as usize, run.len as usize);
            parts.push(self.read_run(at, run, part));
            at += run.len;
            // Started one after another, waited for together.
            if parts.len() == PARTS_MAX || at >= inside {
                for result in futures_util::future::join_all(parts.drain(..)).await {
                    result?;
                }
            }
        }
        Ok(())
    }

    async fn read_run(&self, guest: u64, run: Run, mut mem: IoMem) -> Result<(), Errno> {
        match run.place {
            Place::Raw { slot, offset, .. } => {
                let node = self.files.node(slot)?;
                node.read_as(Event::READ_AIO, offset, mem).await
            }
            Place::Zero | Place::Hole => {
                mem.fill_zero();
                Ok(())
            }
            Place::Backing(offset) => {
                let Some(backing) = self.backing() else {
                    mem.fill_zero();
                    return Ok(());
                };
                let inside = backing.size().saturating_sub(offset).min(run.len) as usize;
                mem.part(inside, mem.len() - inside).fill_zero();
                if inside > 0 {
                    backing.read_mem(offset, mem.part(0, inside)).await?;
                }
                Ok(())
            }
            Place::Coded(unit) => {
                let data = self.decoded(unit).await?;
                let skip = (guest - unit.unit_offset) as usize;
                mem.copy_from(&data[skip..skip + mem.len()]);
                Ok(())
            }
            Place::Special(id) => {
                let range = ByteRange::between(guest, guest + run.len);
                let mut plugin = self.plugin.lock().await;
                let bytes = self.call(&mut plugin, |f| f.read_special(id, range)).await;
                let bytes = bytes.map_err(|e| e.errno())?;
                if bytes.len() != mem.len() {
                    return Err(Errno::Io);
                }
                mem.copy_from(&bytes);
                Ok(())
            }
            Place::Unknown => Err(Errno::Io),
        }
    }

    /// The run at the start of `range`, asking the plugin if need be.
    pub(super) async fn known_run(&self, range: ByteRange) -> Result<Run, Errno> {
        let run = self.map.run(range);
        if run.place != Place::Unknown {
            return Ok(run);
        }
        self.resolve(range).await
    }

    async fn resolve(&self, range: ByteRange) -> Result<Run, Errno> {
        let mut plugin = self.plugin.lock().await;
        // Someone else may have asked while we waited.
        let run = self.map.run(range);
        if run.place != Place::Unknown {
            return Ok(run);
        }
        // A trap is tried again inside `call`, a lie here.
        for _ in 0..2 {
            let extents = self
                .call(&mut plugin, |f| f.resolve(range))
                .await
                .map_err(|e| self.not_mapped(range, &e))?;
            match self.check_resolved(&plugin, range, self.map.near(range), &extents) {
                Ok(claims) => {
                    plugin.verifier.adopt(&Pending::default(), claims);
                    self.remember(&mut plugin, range, &extents);
                    let run = self.map.run(range);
                    return if run.place == Place::Unknown {
                        Err(Errno::Io)
                    } else {
                        Ok(run)
                    };
                }
                Err(fault) => {
                    let e = self.lie(&mut plugin, fault);
                    self.not_mapped(range, &e);
                }
            }
        }
        Err(Errno::Io)
    }

    pub(super) fn check_resolved(
        &self,
        plugin: &Plugin,
        range: ByteRange,
        near: ByteRange,
        extents: &[Extent],
    ) -> Result<Claims, Fault> {
        let reach = |slot| self.files.reach(slot);
        let verifier = &plugin.verifier;
        verifier.extents(range, extents, near, &Pending::default(), &reach)
    }

    pub(super) fn not_mapped(&self, range: ByteRange, e: &FormatError) -> Errno {
        tracing::warn!(
            node = self.files.node_name(),
            range = ?range,
            reason = %e,
            "an image could not be mapped"
        );
        e.errno()
    }

    /// A decoded unit, from the cache or the file.
    async fn decoded(&self, unit: Coded) -> Result<Arc<Vec<u8>>, Errno> {
        if let Some(data) = self.decoded.get(&unit) {
            return Ok(data);
        }
        // Those who want other parts of the unit wait instead of decoding too.
        let range = ByteRange::between(
            unit.unit_offset,
            unit.unit_offset + u64::from(unit.unit_len),
        );
        let _one = self.decoding.lock(range).await;
        if let Some(data) = self.decoded.get(&unit) {
            return Ok(data);
        }
        let node = self.files.node(unit.slot)?;
        let stored = Buf::zeroed(unit.stored_len as usize);
        node.read_as(Event::READ_COMPRESSED, unit.offset, stored.io())
            .await?;
        let data = codec::decode(unit.codec, stored.as_slice(), unit.unit_len as usize)?;
        let data = Arc::new(data);
        self.decoded.put(unit, data.clone());
        Ok(data)
    }

    /// What the map says of zeroes at the start of `range`.
    pub(crate) fn front(&self, range: ByteRange, ask: Ask) -> Front {
        if self.state() == ImageState::Failed {
            return Front::data(range.len());
        }
        let inside = range.end().min(self.size());
        if inside <= range.offset() {
            return Front::zero(range.len());
        }
        let run = self.map.run(ByteRange::between(range.offset(), inside));
        match run.place {
            Place::Zero | Place::Hole => Front::zero(run.len),
            // Space that was taken in advance and never written.
            Place::Raw { slot, offset, .. } if ask == Ask::FileSystem => {
                match self.files.node(slot) {
                    Ok(node) => node.front(ByteRange::between(offset, offset + run.len), ask),
                    Err(_) => Front::data(run.len),
                }
            }
            Place::Backing(offset) => {
                let Some(backing) = self.backing() else {
                    return Front::zero(run.len);
                };
                match backing.size().saturating_sub(offset).min(run.len) {
                    0 => Front::zero(run.len),
                    inside => backing.front(ByteRange::between(offset, offset + inside), ask),
                }
            }
            Place::Unknown => Front::nothing(run.len),
            Place::Raw { .. } | Place::Coded(_) | Place::Special(_) => Front::data(run.len),
        }
    }

    /// Asks for what the map does not know of `range`.
    pub(crate) async fn learn(&self, range: ByteRange) -> Result<(), Errno> {
        let _pass = self.gate.enter().await;
        let inside = range.end().min(self.size());
        let mut at = range.offset();
        while at < inside {
            let run = self.known_run(ByteRange::between(at, inside)).await?;
            if let (Place::Backing(offset), Some(backing)) = (run.place, self.backing()) {
                let below = ByteRange::between(offset, (offset + run.len).min(backing.size()));
                backing.learn(below).await?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// The first piece of `range`, as far as it is known without waiting.
    pub(crate) fn segment(&self, range: ByteRange) -> Segment {
        let inside = range.end().min(self.size());
        if inside <= range.offset() {
            return Segment::Zero { len: range.len() };
        }
        let range = ByteRange::between(range.offset(), inside);
        let run = self.map.run(range);
        let part = ByteRange::between(range.offset(), range.offset() + run.len);
        match run.place {
            Place::Raw { slot, offset, .. } => match self.files.node(slot) {
                Ok(node) => node.segment(ByteRange::between(offset, offset + part.len())),
                Err(_) => Segment::Unknown { len: part.len() },
            },
            Place::Zero | Place::Hole => Segment::Zero { len: part.len() },
            Place::Backing(offset) => match self.backing() {
                None => Segment::Zero { len: part.len() },
                Some(backing) => {
                    let inside = backing.size().saturating_sub(offset).min(part.len());
                    if inside == 0 {
                        return Segment::Zero { len: part.len() };
                    }
                    backing.segment(ByteRange::between(offset, offset + inside))
                }
            },
            Place::Unknown | Place::Coded(_) | Place::Special(_) => {
                Segment::Unknown { len: part.len() }
            }
        }
    }
}
