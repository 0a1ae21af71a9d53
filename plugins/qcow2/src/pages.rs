//! A bounded cache of metadata pages, and the table writes of the running call.
//!
//! Every table entry of the image is read and changed here. A change goes into
//! the cached page at once and is noted; [`Pages::emit`] queues all notes in the
//! transaction, neighbours as one write. The cache itself holds nothing that the
//! host does not have: dropping it is always right, except between a change and
//! its `emit`, and then the whole call fails with it.

use std::collections::HashMap;

use outport_sdk::{ByteRange, Error, Files, Result, Stage, Txn};

/// Slot of the image file; all metadata lives there.
pub(crate) const IMAGE: u32 = 0;

/// Table bytes that one metadata read fetches: 512 L2 entries.
const PAGE_BYTES_MAX: u64 = 4096;

/// Cached pages unless an option says otherwise: 1 MiB maps 8 GiB in clusters
/// of 64 KiB.
pub(crate) const CAPACITY_DEFAULT: usize = 256;
pub(crate) const CAPACITY_MIN: usize = 16;
/// 32 MiB, QEMU's own default maximum for its L2 cache.
pub(crate) const CAPACITY_MAX: usize = 8192;

/// Direct-mapped shortcuts in front of the hash map. A power of two.
const RECENT: usize = 16;

/// Unchanged bytes between two changes that are written along rather than paying
/// for a write of their own.
const GAP_MAX: u64 = 32;

const NOWHERE: u64 = u64::MAX;

#[derive(Debug)]
struct Page {
    at: u64,
    data: Box<[u8]>,
    /// Second chance: used since the hand came by.
    used: bool,
    /// Changed, and not queued yet: must stay.
    noted: bool,
}

/// A change that is not queued yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Note {
    stage: Stage,
    offset: u64,
    len: u64,
}

#[derive(Debug)]
pub(crate) struct Pages {
    page_bytes: u64,
    capacity: usize,
    slots: Vec<Page>,
    index: HashMap<u64, usize>,
    recent: [(u64, usize); RECENT],
    hand: usize,
    notes: Vec<Note>,
}

impl Pages {
    pub(crate) fn new(cluster_size: u64, capacity: usize) -> Self {
        Self {
            page_bytes: cluster_size.min(PAGE_BYTES_MAX),
            capacity: capacity.clamp(CAPACITY_MIN, CAPACITY_MAX),
            slots: Vec::new(),
            index: HashMap::new(),
            recent: [(NOWHERE, 0); RECENT],
            hand: 0,
            notes: Vec::new(),
        }
    }

    pub(crate) const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Forget everything, also changes that were not queued.
    pub(crate) fn clear(&mut self) {
        self.slots.clear();
        self.index.clear();
        self.recent = [(NOWHERE, 0); RECENT];
        self.hand = 0;
        self.notes.clear();
    }

    // === reading ===

    /// The page that holds byte `offset`, and where it starts.
    pub(crate) fn page(&mut self, files: &dyn Files, offset: u64) -> Result<(u64, &[u8])> {
        let slot = self.locate(files, offset)?;
        let page = &self.slots[slot];
        Ok((page.at, &page.data))
    }

    pub(crate) fn read_u64(&mut self, files: &dyn Files, offset: u64) -> Result<u64> {
        let mut out = [0; 8];
        let (at, data) = self.page(files, offset)?;
        let from = (offset - at) as usize;
        // Entries are aligned to their size, so they never cross a page.
        out.copy_from_slice(data.get(from..from + 8).ok_or_else(misaligned)?);
        Ok(u64::from_be_bytes(out))
    }

    fn locate(&mut self, files: &dyn Files, offset: u64) -> Result<usize> {
        let at = offset & !(self.page_bytes - 1);
        let way = (at / self.page_bytes) as usize % RECENT;
        if self.recent[way].0 == at {
            let slot = self.recent[way].1;
            self.slots[slot].used = true;
            return Ok(slot);
        }
        let slot = match self.index.get(&at) {
            Some(&slot) => slot,
            None => self.load(files, at)?,
        };
        self.slots[slot].used = true;
        self.recent[way] = (at, slot);
        Ok(slot)
    }

    fn load(&mut self, files: &dyn Files, at: u64) -> Result<usize> {
        if at
            .checked_add(self.page_bytes)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(Error::io(format!("A table would lie at offset {at:#x}")));
        }
        let slot = self.victim();
        match slot {
            Some(slot) => {
                self.forget(slot);
                files.read_into(IMAGE, at, &mut self.slots[slot].data)?;
                self.slots[slot].at = at;
                self.index.insert(at, slot);
                Ok(slot)
            }
            None => {
                let mut data = vec![0; self.page_bytes as usize].into_boxed_slice();
                files.read_into(IMAGE, at, &mut data)?;
                self.slots.push(Page {
                    at,
                    data,
                    used: true,
                    noted: false,
                });
                self.index.insert(at, self.slots.len() - 1);
                Ok(self.slots.len() - 1)
            }
        }
    }

    /// A page to replace; none while there is room, or while all are noted.
    fn victim(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        // Two rounds: the first takes every second chance away.
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let page = &mut self.slots[self.hand];
            if page.noted {
                continue;
            }
            if !page.used {
                return Some(self.hand);
            }
            page.used = false;
        }
        None
    }

    fn forget(&mut self, slot: usize) {
        let at = self.slots[slot].at;
        if at != NOWHERE {
            self.index.remove(&at);
            let way = (at / self.page_bytes) as usize % RECENT;
            if self.recent[way].0 == at {
                self.recent[way].0 = NOWHERE;
            }
            self.slots[slot].at = NOWHERE;
        }
        self.slots[slot].used = false;
        self.slots[slot].noted = false;
    }

    // === changing ===

    pub(crate) fn write_u64(
        &mut self,
        files: &dyn Files,
        stage: Stage,
        offset: u64,
        value: u64,
    ) -> Result<()> {
        self.change(files, stage, offset, 8, |bytes| {
            bytes.copy_from_slice(&value.to_be_bytes());
        })
    }

    /// Let `edit` change `len` bytes inside one page.
    pub(crate) fn change(
        &mut self,
        files: &dyn Files,
        stage: Stage,
        offset: u64,
        len: u64,
        edit: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let slot = self.locate(files, offset)?;
        let page = &mut self.slots[slot];
        let from = (offset - page.at) as usize;
        edit(
            page.data
                .get_mut(from..from + len as usize)
                .ok_or_else(misaligned)?,
        );
        page.noted = true;
        match self.notes.last_mut() {
            // The usual case: the next entry of the same table.
            Some(n) if n.stage == stage && n.offset <= offset && offset <= n.offset + n.len => {
                n.len = n.len.max(offset + len - n.offset);
            }
            _ => self.notes.push(Note { stage, offset, len }),
        }
        Ok(())
    }

    /// Queue `data` for a range whose old content does not matter.
    pub(crate) fn write_fresh(
        &mut self,
        txn: &mut dyn Txn,
        stage: Stage,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        self.drop_range(ByteRange::new(offset, data.len() as u64));
        for (i, chunk) in data.chunks(1 << 20).enumerate() {
            txn.write(IMAGE, stage, offset + ((i as u64) << 20), chunk)?;
        }
        Ok(())
    }

    /// The same for zeroes.
    pub(crate) fn zero_fresh(
        &mut self,
        txn: &mut dyn Txn,
        stage: Stage,
        range: ByteRange,
    ) -> Result<()> {
        self.drop_range(range);
        txn.zero(IMAGE, stage, range)
    }

    fn drop_range(&mut self, range: ByteRange) {
        let mut at = range.offset & !(self.page_bytes - 1);
        while at < range.end() {
            if let Some(&slot) = self.index.get(&at) {
                self.forget(slot);
            }
            at += self.page_bytes;
        }
        self.notes
            .retain(|n| n.offset >= range.end() || n.offset + n.len <= range.offset);
    }

    /// Queue every change.
    pub(crate) fn emit(&mut self, txn: &mut dyn Txn) -> Result<()> {
        if self.notes.is_empty() {
            return Ok(());
        }
        let mut notes = std::mem::take(&mut self.notes);
        notes.sort_unstable();
        let mut i = 0;
        while i < notes.len() {
            let first = notes[i];
            let page_end = (first.offset & !(self.page_bytes - 1)) + self.page_bytes;
            let mut end = first.offset + first.len;
            i += 1;
            while let Some(n) = notes.get(i) {
                if n.stage != first.stage || n.offset > end + GAP_MAX || n.offset >= page_end {
                    break;
                }
                end = end.max(n.offset + n.len);
                i += 1;
            }
            self.queue(txn, first.stage, first.offset, end)?;
        }
        notes.clear();
        self.notes = notes;
        self.shrink();
        Ok(())
    }

    /// Queue the bytes from `offset` to `end`, page by page.
    fn queue(&mut self, txn: &mut dyn Txn, stage: Stage, offset: u64, end: u64) -> Result<()> {
        let mut offset = offset;
        while offset < end {
            let at = offset & !(self.page_bytes - 1);
            let upto = end.min(at + self.page_bytes);
            let slot = *self.index.get(&at).ok_or_else(misaligned)?;
            let page = &mut self.slots[slot];
            page.noted = false;
            let bytes = &page.data[(offset - at) as usize..(upto - at) as usize];
            txn.write(IMAGE, stage, offset, bytes)?;
            offset = upto;
        }
        Ok(())
    }

    /// A call may have noted more pages than the cache holds.
    fn shrink(&mut self) {
        if self.slots.len() > self.capacity {
            self.clear();
        }
    }
}

fn misaligned() -> Error {
    Error::io("A table entry crosses a page: this is a bug of the plugin")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Host;

    #[test]
    fn neighbours_become_one_write_and_eviction_keeps_changes() {
        let mut host = Host::new(vec![vec![7; 1 << 20]]);
        let mut pages = Pages::new(65536, CAPACITY_MIN);
        for i in [3_u64, 1, 2, 0] {
            pages
                .write_u64(&host, Stage::Mapping, 4096 + i * 8, i)
                .unwrap();
        }
        for page in 2..100 {
            pages.read_u64(&host, page * 4096).unwrap();
        }
        assert_eq!(pages.slots.len(), CAPACITY_MIN);
        assert_eq!(pages.read_u64(&host, 4096 + 16).unwrap(), 2);
        pages.emit(&mut host).unwrap();
        assert_eq!(host.writes_queued(), 1);
        pages.clear();
        assert_eq!(pages.read_u64(&host, 4096 + 24).unwrap(), 3);
        assert_eq!(
            pages.read_u64(&host, 4096 + 32).unwrap(),
            0x0707_0707_0707_0707
        );
    }
}
