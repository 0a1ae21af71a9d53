//! Room for metadata that waits: what a flush still has to write has its place in the file already.
//!
//! Part of an image's files. Before a transaction enters the overlay, the file system is asked for
//! the blocks below every byte that the transaction queues, so that a full disk refuses the write
//! that caused the transaction, and never the flush that has to keep the promise. Reserving runs
//! under the plugin lock; a flush that gives space back forgets it here first. Invariant: a range
//! in [`Room`] has blocks of its own in its file, and the overlay holds no byte outside of them.
//!
//! ```text
//!   transaction -> gaps in what is known -> fallocate (regular files)
//!                                        -> or: the present bytes, written back where they are
//! ```
//! Where the storage cannot reserve (devices, servers, images, file systems without fallocate) the
//! present content is written to its own place. A file system that copies on write promises nothing
//! by either, nor does a device that finds out what it lacks only when its cache is written back.

use std::collections::BTreeMap;

use crate::engine::buffer::Buf;
use crate::{ByteRange, Errno};

use super::files::ImageFiles;
use super::overlay::{PAGE, SECTOR};
use super::verify::Intervals;

/// Ranges that are remembered per file; past it nothing new is, and is reserved each time. Metadata
/// lies in few runs: 2 TiB of a qcow2 image with clusters of 64 KiB have 4096 tables.
const RANGES_MAX: usize = 65_536;

/// Bytes that are written back to their own place at a time.
const REWRITE_MAX: u64 = 256 << 10;

/// What has its room, by slot.
#[derive(Debug, Default)]
pub(super) struct Room(BTreeMap<u32, Intervals>);

impl Room {
    fn gaps(&self, slot: u32, range: ByteRange) -> Vec<ByteRange> {
        match self.0.get(&slot) {
            Some(known) => known.gaps(range),
            None => vec![range],
        }
    }

    fn add(&mut self, slot: u32, range: ByteRange) {
        let known = self.0.entry(slot).or_default();
        if known.count() < RANGES_MAX {
            known.add(range);
        }
    }

    /// The range is given back to the storage: its room is gone.
    pub(super) fn forget(&mut self, slot: u32, range: ByteRange) {
        if let Some(known) = self.0.get_mut(&slot) {
            known.remove(range.align_out(PAGE));
        }
    }
}

impl ImageFiles {
    /// Makes sure that these bytes can be written later without new space. Plugin lock.
    ///
    /// # Errors
    /// `NoSpc`: there is none. What was reserved before stays so: it is where the next attempt
    /// of the format will ask for it again.
    pub(super) async fn reserve(
        &self,
        ranges: impl Iterator<Item = (u32, ByteRange)>,
    ) -> Result<(), Errno> {
        for (slot, range) in ranges {
            let sectors = range.align_out(SECTOR);
            let gaps = self.room_known().gaps(slot, sectors);
            for gap in gaps {
                let reserved = self.reserve_gap(slot, gap).await?;
                self.room_known().add(slot, reserved);
            }
        }
        Ok(())
    }

    /// Whole sectors that nothing is known of; answers what was reserved.
    async fn reserve_gap(&self, slot: u32, gap: ByteRange) -> Result<ByteRange, Errno> {
        let node = self.node(slot)?;
        let end = node.len_max().unwrap_or(ByteRange::END_MAX);
        let pages = gap.align_out(PAGE);
        let pages = ByteRange::between(pages.offset(), pages.end().min(end));
        match node.reserve(pages).await {
            Ok(()) => {
                // Space behind the end of a file goes with the first cut of anything behind it,
                // such as the padding of a direct write. The file grows to no more than was asked
                // for: a format may look for its footer at the end.
                node.grow_to(gap.end()).await?;
                let end = pages.end().min(node.len_bytes().max(gap.end()));
                return Ok(ByteRange::between(pages.offset(), end));
            }
            // Some file systems want more than they take: writing tells.
            Err(Errno::NotSup | Errno::NoSpc) => {}
            Err(e) => return Err(e),
        }
        for piece in gap.cut_at(REWRITE_MAX) {
            self.rewrite(slot, piece).await?;
        }
        Ok(gap)
    }

    /// Writes what is there to where it is. Metadata shares no sector with payload, and a flush
    /// that runs meanwhile writes only sectors that are dirty: those are left out, they were
    /// reserved when they were queued.
    async fn rewrite(&self, slot: u32, range: ByteRange) -> Result<(), Errno> {
        let node = self.node(slot)?;
        let clean = self.overlay().clean_sectors(slot, range);
        for part in clean {
            let buf = Buf::zeroed(part.len() as usize);
            if part.offset() < self.reach(slot) {
                node.read_mem(part.offset(), buf.io()).await?;
            }
            node.write_mem(part.offset(), buf.io(), false).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    #[test]
    fn what_was_given_back_has_no_room() {
        let mut room = Room::default();
        assert_eq!(room.gaps(0, range(0, 8192)), [range(0, 8192)]);
        room.add(0, range(0, 65536));
        assert_eq!(room.gaps(0, range(0, 8192)), []);
        assert_eq!(room.gaps(1, range(0, 512)), [range(0, 512)]);
        room.forget(0, range(4097, 10));
        assert_eq!(room.gaps(0, range(0, 65536)), [range(4096, 4096)]);
    }

    #[test]
    fn what_is_not_remembered_is_asked_for_again() {
        let mut room = Room::default();
        for at in 0..=RANGES_MAX as u64 {
            room.add(0, range(at * 1024, 512));
        }
        let last = range(RANGES_MAX as u64 * 1024, 512);
        assert_eq!(room.gaps(0, last), [last]);
        assert_eq!(room.gaps(0, range(0, 512)), []);
    }
}
