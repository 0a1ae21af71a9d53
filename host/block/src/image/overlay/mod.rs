//! The metadata overlay: what plugins queued and the file does not hold yet.
//!
//! Owned by the image; locked for a moment by plugin reads and by applying a
//! transaction, never while waiting. Two generations exist: `active` takes new
//! writes, `sealed` is being written out by the flush in progress, or waits to be
//! written again after one that failed. Invariants: a sector is written out
//! first without, then with its mapping-stage bytes, and a flush of the file
//! lies between; sectors that no plugin wrote are never written, so payload that
//! shares a page is safe; what the file lacks of the plugin's writes is here, so
//! file content that was read before and after the same [`Overlay::retired`] and
//! then patched is what the plugin wrote.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::ByteRange;
use crate::format::Stage;

/// Metadata and payload never share less than this: the smallest unit.
pub(crate) const SECTOR: u64 = 512;

/// Sectors are kept in pages.
pub(crate) const PAGE: u64 = 4096;

/// A page in memory, with its content before the mapping stage.
const PAGE_COST: usize = 2 * PAGE as usize;

const SECTORS: usize = (PAGE / SECTOR) as usize;

/// Dirty bytes after which writers flush first: a bound on memory, and on what
/// a kill can lose.
pub(crate) const DIRTY_MAX: usize = 32 << 20;

/// One page of one file.
#[derive(Clone, Debug)]
struct Page {
    /// Newest content; only sectors in `valid` mean anything.
    data: Box<[u8; PAGE as usize]>,
    /// Content without the mapping stage, once one was queued.
    before_mapping: Option<Box<[u8; PAGE as usize]>>,
    /// Sectors with prepare-stage bytes.
    prepare: u8,
    /// Sectors with mapping-stage bytes.
    mapping: u8,
    /// Sectors whose content is known: dirty here, dirty in the sealed
    /// generation when the page was made, or read from the file.
    valid: u8,
}

impl Page {
    fn dirty(&self) -> u8 {
        self.prepare | self.mapping
    }

    /// The file's content, for sectors that nothing is known of.
    fn fill_in(&mut self, base: &[u8]) {
        for sector in (0..SECTORS).filter(|s| self.valid & (1 << s) == 0) {
            let bytes = sector * SECTOR as usize..(sector + 1) * SECTOR as usize;
            self.data[bytes.clone()].copy_from_slice(&base[bytes.clone()]);
            if let Some(before) = &mut self.before_mapping {
                before[bytes.clone()].copy_from_slice(&base[bytes]);
            }
        }
        self.valid = u8::MAX;
    }
}

#[derive(Debug, Default)]
struct Generation {
    pages: BTreeMap<(u32, u64), Page>,
}

/// The overlay of one image.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    active: Generation,
    sealed: Generation,
    retired: u64,
}

/// Bytes to be written to a file.
#[derive(Debug)]
pub(crate) struct WriteOut {
    pub(crate) slot: u32,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

/// Sectors touched by bytes `[from, to)` of a page.
fn sector_mask(from: u64, to: u64) -> u8 {
    let first = from / SECTOR;
    let last = to.div_ceil(SECTOR);
    (((1u16 << (last - first)) - 1) << first) as u8
}

/// Sectors of which `[from, to)` covers only a part.
fn partial_mask(from: u64, to: u64) -> u8 {
    let mut mask = 0;
    if !from.is_multiple_of(SECTOR) {
        mask |= sector_mask(from, from + 1);
    }
    if !to.is_multiple_of(SECTOR) {
        mask |= sector_mask(to - 1, to);
    }
    mask
}

/// A range cut into pages: (page offset, from, to) within the page.
fn pages(range: ByteRange) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = range.offset();
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        let page = at & !(PAGE - 1);
        let (from, to) = (at - page, (range.end() - page).min(PAGE));
        at = page + to;
        Some((page, from, to))
    })
}

impl Overlay {
    /// Nothing to write out?
    pub(crate) fn is_clean(&self) -> bool {
        self.active.pages.is_empty() && self.sealed.pages.is_empty()
    }

    /// Bytes held in the active generation.
    pub(crate) fn active_bytes(&self) -> usize {
        self.active.pages.len() * PAGE_COST
    }

    /// Replace in `buf` (file content from `offset`) what is newer here.
    pub(crate) fn patch(&self, slot: u32, offset: u64, buf: &mut [u8]) {
        if self.is_clean() {
            return;
        }
        let range = ByteRange::between(offset, offset + buf.len() as u64);
        for generation in [&self.sealed, &self.active] {
            let first = (slot, range.offset() & !(PAGE - 1));
            for (&(_, page_at), page) in generation.pages.range(first..(slot, range.end())) {
                patch_page(page_at, page, range, buf);
            }
        }
    }

    /// How many sealed generations reached their files.
    pub(crate) fn retired(&self) -> u64 {
        self.retired
    }

    /// Which pages of a write need their old content first: a sector is written
    /// in part and is not here yet. Offsets of 4 KiB.
    pub(crate) fn needs(&self, slot: u32, range: ByteRange) -> impl Iterator<Item = u64> {
        pages(range)
            .filter(move |&(page, from, to)| {
                let partial = partial_mask(from, to);
                partial & !self.known(slot, page) != 0
            })
            .map(|(page, ..)| page)
    }

    fn known(&self, slot: u32, page: u64) -> u8 {
        let sealed = || self.sealed.pages.get(&(slot, page)).map_or(0, Page::dirty);
        let active = self.active.pages.get(&(slot, page));
        active.map_or_else(sealed, |p| p.valid)
    }

    /// Queue bytes. `base` has the file's content of each page that
    /// [`Overlay::needs`] named, read since the last [`Overlay::retire`].
    pub(crate) fn write(
        &mut self,
        slot: u32,
        stage: Stage,
        offset: u64,
        data: Bytes<'_>,
        base: &BTreeMap<(u32, u64), Vec<u8>>,
    ) {
        let range = ByteRange::between(offset, offset + data.len());
        for (page_at, from, to) in pages(range) {
            let (f, t) = (from as usize, to as usize);
            let at = page_at + from - offset;
            let page = self.page_for(slot, page_at, base.get(&(slot, page_at)));
            let mask = sector_mask(from, to);
            page.valid |= mask;
            match stage {
                Stage::Prepare => {
                    data.copy_to(at, &mut page.data[f..t]);
                    if let Some(before) = &mut page.before_mapping {
                        data.copy_to(at, &mut before[f..t]);
                    }
                    page.prepare |= mask;
                }
                Stage::Mapping => {
                    if page.before_mapping.is_none() {
                        page.before_mapping = Some(page.data.clone());
                    }
                    data.copy_to(at, &mut page.data[f..t]);
                    page.mapping |= mask;
                }
            }
        }
    }

    fn page_for(&mut self, slot: u32, at: u64, base: Option<&Vec<u8>>) -> &mut Page {
        let sealed = &self.sealed;
        let page = self.active.pages.entry((slot, at)).or_insert_with(|| {
            let mut page = Page {
                data: Box::new([0; PAGE as usize]),
                before_mapping: None,
                prepare: 0,
                mapping: 0,
                valid: 0,
            };
            if let Some(older) = sealed.pages.get(&(slot, at)) {
                let whole = ByteRange::between(at, at + PAGE);
                patch_page(at, older, whole, &mut page.data[..]);
                page.valid = older.dirty();
            }
            page
        });
        if let Some(base) = base {
            page.fill_in(base);
        }
        page
    }

    /// The active generation is to be written out; a new one begins. The
    /// previous sealed one must have been [`Overlay::retire`]d.
    pub(crate) fn seal(&mut self) {
        assert!(self.sealed.pages.is_empty(), "one flush at a time");
        self.sealed = std::mem::take(&mut self.active);
    }

    /// What the sealed generation writes in this stage, neighbours joined.
    pub(crate) fn write_out(&self, stage: Stage) -> Vec<WriteOut> {
        let mut out: Vec<WriteOut> = Vec::new();
        for (&(slot, page_at), page) in &self.sealed.pages {
            let (mask, data) = match stage {
                Stage::Prepare => (
                    page.prepare,
                    page.before_mapping.as_ref().unwrap_or(&page.data),
                ),
                Stage::Mapping => (page.mapping, &page.data),
            };
            for sector in (0..SECTORS).filter(|s| mask & (1 << s) != 0) {
                let from = sector * SECTOR as usize;
                let bytes = &data[from..from + SECTOR as usize];
                let offset = page_at + from as u64;
                match out.last_mut() {
                    Some(w) if w.slot == slot && w.offset + w.data.len() as u64 == offset => {
                        w.data.extend_from_slice(bytes);
                    }
                    _ => out.push(WriteOut {
                        slot,
                        offset,
                        data: bytes.to_vec(),
                    }),
                }
            }
        }
        out
    }

    /// A generation waits to be written out, for the first time or again.
    pub(crate) fn is_sealed(&self) -> bool {
        !self.sealed.pages.is_empty()
    }

    /// The sealed generation is durable.
    pub(crate) fn retire(&mut self) {
        if self.is_sealed() {
            self.sealed = Generation::default();
            self.retired += 1;
        }
    }

    /// The first page at or after `offset` that the file lacks something of.
    pub(crate) fn next_dirty(&self, slot: u32, offset: u64) -> Option<ByteRange> {
        let first = (slot, offset & !(PAGE - 1));
        let next = |g: &Generation| g.pages.range(first..).next().map(|(key, _)| *key);
        let pages = [next(&self.sealed), next(&self.active)];
        let (_, at) = pages.into_iter().flatten().filter(|k| k.0 == slot).min()?;
        Some(ByteRange::between(at.max(offset), at + PAGE))
    }

    /// Pages of the range that the sealed generation is about to write.
    pub(crate) fn sealed_within(&self, slot: u32, range: ByteRange) -> Vec<ByteRange> {
        let first = (slot, range.offset() & !(PAGE - 1));
        self.sealed
            .pages
            .range(first..(slot, range.end()))
            .filter_map(|(&(_, at), _)| ByteRange::between(at, at + PAGE).intersect(range))
            .collect()
    }

    /// The sectors of the range, which is made of whole ones, that nothing is to be written to.
    pub(crate) fn clean_sectors(&self, slot: u32, range: ByteRange) -> Vec<ByteRange> {
        let mut clean: Vec<ByteRange> = Vec::new();
        for (page_at, from, to) in pages(range) {
            let of = |g: &Generation| g.pages.get(&(slot, page_at)).map_or(0, Page::dirty);
            let dirty = of(&self.sealed) | of(&self.active);
            for sector in (from / SECTOR..to / SECTOR).filter(|s| dirty & (1 << s) == 0) {
                let at = page_at + sector * SECTOR;
                match clean.last_mut() {
                    Some(last) if last.end() == at => {
                        *last = ByteRange::between(last.offset(), at + SECTOR);
                    }
                    _ => clean.push(ByteRange::between(at, at + SECTOR)),
                }
            }
        }
        clean
    }

    /// Forget everything of the range: it was freed and holds nothing.
    pub(crate) fn forget(&mut self, slot: u32, range: ByteRange) {
        for (page_at, from, to) in pages(range.align_in(SECTOR)) {
            if let Some(page) = self.active.pages.get_mut(&(slot, page_at)) {
                let mask = !sector_mask(from, to);
                page.prepare &= mask;
                page.mapping &= mask;
                page.valid &= mask;
                if page.dirty() == 0 {
                    self.active.pages.remove(&(slot, page_at));
                }
            }
        }
    }
}

fn patch_page(page_at: u64, page: &Page, range: ByteRange, buf: &mut [u8]) {
    for sector in (0..SECTORS).filter(|s| page.dirty() & (1 << s) != 0) {
        let at = page_at + sector as u64 * SECTOR;
        let Some(part) = ByteRange::between(at, at + SECTOR).intersect(range) else {
            continue;
        };
        let from = (part.offset() - page_at) as usize;
        let into = (part.offset() - range.offset()) as usize;
        let len = part.len() as usize;
        buf[into..into + len].copy_from_slice(&page.data[from..from + len]);
    }
}

/// Bytes to queue: given, or zeroes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bytes<'a> {
    Given(&'a [u8]),
    Zeroes(u64),
}

impl Bytes<'_> {
    pub(crate) fn len(self) -> u64 {
        match self {
            Self::Given(b) => b.len() as u64,
            Self::Zeroes(n) => n,
        }
    }

    fn copy_to(self, at: u64, out: &mut [u8]) {
        match self {
            Self::Given(b) => out.copy_from_slice(&b[at as usize..at as usize + out.len()]),
            Self::Zeroes(_) => out.fill(0),
        }
    }
}
