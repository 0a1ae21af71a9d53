//! [`MemoryHost`]: the files of one image in memory, with the host's rules.
//!
//! ```text
//! plugin call -> queued ops --returned Ok--> prepare: to the file at once
//!                    |                       mapping: to the overlay
//!                    +------returned Err--> dropped                   |
//!                                                    flush: fsync, overlay to
//!                                                    the file, fsync, frees
//! ```
//!
//! What the daemon would punish as a broken contract is an error here, with a
//! sentence that begins "Broken contract".

mod calls;

use super::disk::Disk;
use super::ranges::RangeSet;
use super::trace::{Event, Trace};
use crate::{ByteRange, Errno, Error, LogLevel, Result, SlotRange, Stage};
use std::cell::RefCell;

/// The longest single metadata read or write (`host.wit`).
pub const TRANSFER_MAX: usize = 2 << 20;

/// The error of a plugin that does what the contract forbids.
pub(super) fn broken(what: impl Into<String>) -> Error {
    Error::io(format!("Broken contract: {}", what.into()))
}

/// Damage that a plugin reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What it said.
    pub message: String,
    /// Where.
    pub offset: Option<u64>,
    /// How much.
    pub size: Option<u64>,
    /// Whether the node must refuse writes from now on.
    pub fatal: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Write(u32, Stage, u64, Vec<u8>),
    Zero(u32, Stage, ByteRange),
    Grow(u32, u64),
    Free(u32, ByteRange),
    Truncate(u32, u64),
}

/// One file and what is pending for it.
#[derive(Clone, Debug, Default)]
pub(super) struct File {
    /// The child's id; `None` for the image.
    pub(super) id: Option<String>,
    pub(super) disk: Disk,
    /// Mapping writes that have not reached the file: where, and what.
    pending: RangeSet,
    overlay: Disk,
    /// Ranges that hold metadata: no extent may overlap them.
    pub(super) metadata: RangeSet,
    /// Freed, not yet reclaimed.
    pub(super) quarantine: RangeSet,
}

impl File {
    pub(super) fn new(id: Option<String>, disk: Disk) -> Self {
        Self {
            id,
            disk,
            ..Self::default()
        }
    }
}

/// The files of one image, in memory. Implements [`Files`](crate::Files)
/// and [`Txn`](crate::Txn); after a call that had it as `Txn`, [`MemoryHost::finish`] applies or
/// drops.
#[derive(Clone, Debug, Default)]
pub struct MemoryHost {
    pub(super) files: Vec<File>,
    pub(super) offered: Vec<(String, Disk)>,
    pub(super) backing: Option<Disk>,
    queued: Vec<Op>,
    freed: Vec<SlotRange>,
    truncated: Vec<(u32, u64)>,
    punch: bool,
    log: RefCell<Vec<(LogLevel, String)>>,
    corruptions: RefCell<Vec<Corruption>>,
    pub(super) trace: Option<Trace>,
}

impl MemoryHost {
    /// A host whose slot 0 holds `image`.
    pub fn new(image: impl Into<Disk>) -> Self {
        Self {
            files: vec![File::new(None, image.into())],
            ..Self::default()
        }
    }

    /// Grant `content` to the storage child `id`, if the image asks for it.
    #[must_use]
    pub fn with_storage(mut self, id: impl Into<String>, content: impl Into<Disk>) -> Self {
        self.offered.push((id.into(), content.into()));
        self
    }

    /// Grant `content` as the backing image.
    #[must_use]
    pub fn with_backing(mut self, content: impl Into<Disk>) -> Self {
        self.backing = Some(content.into());
        self
    }

    /// Zero freed ranges in the file before they are reclaimed, as an operator
    /// can ask the daemon to.
    #[must_use]
    pub fn with_punch(mut self) -> Self {
        self.punch = true;
        self
    }

    /// The content of a file as it is on disk: without what is pending.
    pub fn disk(&self, slot: u32) -> Option<&Disk> {
        Some(&self.file(slot).ok()?.disk)
    }

    /// The log lines so far.
    pub fn log_lines(&self) -> Vec<(LogLevel, String)> {
        self.log.borrow().clone()
    }

    /// The damage reported so far.
    pub fn corruptions(&self) -> Vec<Corruption> {
        self.corruptions.borrow().clone()
    }

    /// End of a call that could queue: apply what it queued if it returned
    /// `Ok`, else drop it.
    pub fn finish<T>(&mut self, returned: Result<T>) -> Result<T> {
        let queued = std::mem::take(&mut self.queued);
        let value = returned?;
        for op in queued {
            self.apply(op)?;
        }
        Ok(value)
    }

    /// The data barrier: everything but the overlay is durable, then the
    /// overlay, then truncations and punches. Returns what can be reclaimed.
    pub fn barrier(&mut self) -> Vec<SlotRange> {
        self.record(Event::Flush);
        let mut mapped = false;
        for (slot, file) in (0..).zip(&mut self.files) {
            for range in std::mem::take(&mut file.pending).iter() {
                mapped = true;
                for offset in (range.offset..range.end()).step_by(TRANSFER_MAX) {
                    let len = (range.end() - offset).min(TRANSFER_MAX as u64);
                    let data = file.overlay.read(offset, len as usize);
                    file.disk.write(offset, &data);
                    if let Some(trace) = &mut self.trace {
                        trace.push(Event::Write {
                            slot,
                            offset,
                            data: data.into(),
                        });
                    }
                }
            }
            file.overlay = Disk::default();
        }
        if mapped {
            self.record(Event::Flush);
        }
        for (slot, len) in std::mem::take(&mut self.truncated) {
            if let Ok(file) = self.file_mut(slot) {
                file.disk.set_len(len);
                self.record(Event::SetLen { slot, len });
            }
        }
        let freed = std::mem::take(&mut self.freed);
        for SlotRange { slot, range } in &freed {
            let punch = self.punch;
            let Ok(file) = self.file_mut(*slot) else {
                continue;
            };
            file.quarantine.remove(*range);
            file.metadata.remove(*range);
            let inside = range
                .end()
                .min(file.disk.len())
                .saturating_sub(range.offset);
            if punch && inside > 0 {
                let range = ByteRange::new(range.offset, inside);
                file.disk.zero(range);
                self.record(Event::Zero { slot: *slot, range });
            }
        }
        freed
    }

    /// Payload, straight to the file.
    pub(super) fn write_payload(&mut self, slot: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.file_mut(slot)?.disk.write(offset, data);
        self.record(Event::Write {
            slot,
            offset,
            data: data.into(),
        });
        Ok(())
    }

    /// Forget all of the last instance: the files are as after a power cut or a
    /// clean close, whichever happened.
    pub(super) fn detach(&mut self) {
        for file in self.files.drain(self.files.len().min(1)..) {
            self.offered.push((file.id.unwrap_or_default(), file.disk));
        }
        if let Some(image) = self.files.first_mut() {
            *image = File::new(None, std::mem::take(&mut image.disk));
        }
        self.queued.clear();
        self.freed.clear();
        self.truncated.clear();
    }

    /// Ranges freed by calls since the last barrier.
    pub(super) fn freed(&self) -> &[SlotRange] {
        &self.freed
    }

    pub(super) fn record(&mut self, event: Event) {
        if let Some(trace) = &mut self.trace {
            trace.push(event);
        }
    }

    pub(super) fn file(&self, slot: u32) -> Result<&File> {
        let file = usize::try_from(slot)
            .ok()
            .and_then(|slot| self.files.get(slot));
        file.ok_or_else(|| no_slot(slot))
    }

    fn file_mut(&mut self, slot: u32) -> Result<&mut File> {
        let file = usize::try_from(slot)
            .ok()
            .and_then(|slot| self.files.get_mut(slot));
        file.ok_or_else(|| no_slot(slot))
    }

    fn apply(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Write(slot, Stage::Prepare, offset, data) => {
                let file = self.file_mut(slot)?;
                file.metadata
                    .insert(ByteRange::new(offset, data.len() as u64));
                file.disk.write(offset, &data);
                self.record(Event::Write {
                    slot,
                    offset,
                    data: data.into(),
                });
            }
            Op::Write(slot, Stage::Mapping, offset, data) => {
                let file = self.file_mut(slot)?;
                let range = ByteRange::new(offset, data.len() as u64);
                file.metadata.insert(range);
                file.pending.insert(range);
                file.overlay.write(offset, &data);
            }
            Op::Zero(slot, Stage::Prepare, range) => {
                let file = self.file_mut(slot)?;
                file.metadata.insert(range);
                file.disk.zero(range);
                self.record(Event::Zero { slot, range });
            }
            Op::Zero(slot, Stage::Mapping, range) => {
                let file = self.file_mut(slot)?;
                file.metadata.insert(range);
                file.pending.insert(range);
                file.overlay.zero(range);
            }
            Op::Grow(slot, size) => {
                let disk = &mut self.file_mut(slot)?.disk;
                if size > disk.len() {
                    disk.set_len(size);
                    self.record(Event::SetLen { slot, len: size });
                }
            }
            Op::Free(slot, range) => {
                self.file_mut(slot)?.quarantine.insert(range);
                self.freed.push(SlotRange { slot, range });
            }
            Op::Truncate(slot, size) => self.truncated.push((slot, size)),
        }
        Ok(())
    }

    /// Refuse what no order of stages makes right.
    fn check_metadata(&self, slot: u32, stage: Stage, range: ByteRange) -> Result<()> {
        let file = self.file(slot)?;
        if file.quarantine.touches(range) {
            return Err(broken(format!(
                "metadata for {range:?}, which waits for reclaim"
            )));
        }
        if stage == Stage::Prepare && file.pending.touches(range) {
            return Err(broken(format!(
                "stage prepare for {range:?}, where a mapping write is pending and would win"
            )));
        }
        Ok(())
    }
}

fn no_slot(slot: u32) -> Error {
    Error::new(Errno::Eacces, format!("No file was granted as slot {slot}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Files, Txn};

    #[test]
    fn a_failed_call_writes_nothing() {
        let mut host = MemoryHost::new(vec![7; 16]);
        host.write(0, Stage::Prepare, 0, &[1]).unwrap();
        host.grow(0, 100).unwrap();
        assert_eq!(host.read(0, 0, 2).unwrap(), [1, 7]);
        assert_eq!(host.size(0).unwrap(), 100);
        assert!(host.finish::<()>(Err(Error::io("no"))).is_err());
        assert_eq!(host.read(0, 0, 2).unwrap(), [7, 7]);
        assert_eq!(host.size(0).unwrap(), 16);
    }

    #[test]
    fn mapping_waits_for_the_barrier_but_is_read_at_once() {
        let mut host = MemoryHost::new(vec![0; 16]);
        host.write(0, Stage::Mapping, 4, &[9]).unwrap();
        host.write(0, Stage::Prepare, 8, &[8]).unwrap();
        host.finish(Ok(())).unwrap();
        assert_eq!(host.read(0, 4, 5).unwrap(), [9, 0, 0, 0, 8]);
        assert_eq!(host.disk(0).unwrap().read(4, 5), [0, 0, 0, 0, 8]);
        assert!(host.barrier().is_empty());
        assert_eq!(host.disk(0).unwrap().read(4, 1), [9]);
    }

    #[test]
    fn freed_space_is_closed_until_the_barrier() {
        let mut host = MemoryHost::new(vec![1; 16]).with_punch();
        let range = ByteRange::new(8, 4);
        host.free(0, range).unwrap();
        host.finish(Ok(())).unwrap();
        let refused = host.write(0, Stage::Prepare, 8, &[2]).unwrap_err();
        assert!(refused.message.contains("waits for reclaim"), "{refused}");
        assert_eq!(host.barrier(), [SlotRange { slot: 0, range }]);
        assert_eq!(host.disk(0).unwrap().read(7, 6), [1, 0, 0, 0, 0, 1]);
        host.write(0, Stage::Prepare, 8, &[2]).unwrap();
    }

    #[test]
    fn a_slot_exists_only_when_granted() {
        let host = MemoryHost::new(vec![]).with_storage("data-file", vec![1]);
        assert_eq!(host.size(1).unwrap_err().code, Errno::Eacces);
    }
}
