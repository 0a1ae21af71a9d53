//! The metadata overlay: what plugins queued and the file does not hold yet.
//!
//! Owned by the image; locked for a moment by plugin reads and by applying a
//! transaction, never while waiting. Two generations exist: `active` takes new
//! writes, `sealed` is being written out by the flush in progress. Invariants:
//! a sector is written out first without, then with its mapping-stage bytes,
//! and a flush of the file lies between; sectors that no plugin wrote are never
//! written, so payload that shares a page is safe.

use std::collections::BTreeMap;

use crate::ByteRange;
use crate::format::Stage;

/// Metadata and payload never share less than this: the smallest unit.
pub(crate) const SECTOR: u64 = 512;

/// Sectors are kept in pages.
pub(crate) const PAGE: u64 = 4096;

const SECTORS: usize = (PAGE / SECTOR) as usize;

/// Dirty bytes after which writers flush first: a bound on memory, and on what
/// a kill can lose.
pub(crate) const DIRTY_MAX: usize = 32 << 20;

/// One page of one file.
#[derive(Clone, Debug)]
struct Page {
    /// Newest content; only sectors in `dirty()` mean anything.
    data: Box<[u8; PAGE as usize]>,
    /// Content without the mapping stage, once one was queued.
    before_mapping: Option<Box<[u8; PAGE as usize]>>,
    /// Sectors with prepare-stage bytes.
    prepare: u8,
    /// Sectors with mapping-stage bytes.
    mapping: u8,
}

impl Page {
    fn dirty(&self) -> u8 {
        self.prepare | self.mapping
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
        self.active.pages.len() * PAGE as usize
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

    /// Which pages of a write need their old content first: a sector is written
    /// in part and is not here yet. Offsets of 4 KiB.
    pub(crate) fn needs(&self, slot: u32, range: ByteRange) -> Vec<u64> {
        pages(range)
            .filter(|&(page, from, to)| {
                let partial = partial_mask(from, to);
                partial & !self.known(slot, page) != 0
            })
            .map(|(page, ..)| page)
            .collect()
    }

    fn known(&self, slot: u32, page: u64) -> u8 {
        let mask = |g: &Generation| g.pages.get(&(slot, page)).map_or(0, Page::dirty);
        mask(&self.active) | mask(&self.sealed)
    }

    /// Queue bytes. `base(page)` gives the file's content of a page that
    /// [`Overlay::needs`] named.
    pub(crate) fn write(
        &mut self,
        slot: u32,
        stage: Stage,
        offset: u64,
        data: Bytes<'_>,
        base: &BTreeMap<u64, Vec<u8>>,
    ) {
        let range = ByteRange::between(offset, offset + data.len());
        for (page_at, from, to) in pages(range) {
            let (f, t) = (from as usize, to as usize);
            let at = page_at + from - offset;
            let page = self.page_for(slot, page_at, base.get(&page_at));
            let mask = sector_mask(from, to);
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
        self.active.pages.entry((slot, at)).or_insert_with(|| {
            let mut data = Box::new([0; PAGE as usize]);
            if let Some(base) = base {
                data.copy_from_slice(base);
            }
            if let Some(page) = sealed.pages.get(&(slot, at)) {
                let whole = ByteRange::between(at, at + PAGE);
                patch_page(at, page, whole, &mut data[..]);
            }
            Page {
                data,
                before_mapping: None,
                prepare: 0,
                mapping: 0,
            }
        })
    }

    /// The active generation is to be written out; a new one begins. The
    /// previous sealed one must have been [`Overlay::retire`]d.
    pub(crate) fn seal(&mut self) {
        debug_assert!(self.sealed.pages.is_empty(), "one flush at a time");
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

    /// The sealed generation is durable (or lost: the caller failed).
    pub(crate) fn retire(&mut self) {
        self.sealed = Generation::default();
    }

    /// The flush failed: what was sealed is dirty again, under what came since.
    pub(crate) fn unseal(&mut self) {
        let sealed = std::mem::take(&mut self.sealed);
        let newer = std::mem::replace(&mut self.active, sealed);
        for (key, page) in newer.pages {
            match self.active.pages.get_mut(&key) {
                None => {
                    self.active.pages.insert(key, page);
                }
                Some(old) => {
                    // `page` was made from `old`, so its content is complete
                    // for the sectors of both.
                    let mut before = old
                        .before_mapping
                        .clone()
                        .unwrap_or_else(|| old.data.clone());
                    for s in (0..SECTORS).filter(|s| page.prepare & (1 << s) != 0) {
                        let r = s * SECTOR as usize..(s + 1) * SECTOR as usize;
                        let newest = page.before_mapping.as_ref().unwrap_or(&page.data);
                        if old.mapping & (1 << s) == 0 {
                            before[r.clone()].copy_from_slice(&newest[r]);
                        }
                    }
                    let (prepare, mapping) =
                        (old.prepare | page.prepare, old.mapping | page.mapping);
                    let mut data = old.data.clone();
                    for s in (0..SECTORS).filter(|s| page.dirty() & (1 << s) != 0) {
                        let r = s * SECTOR as usize..(s + 1) * SECTOR as usize;
                        data[r.clone()].copy_from_slice(&page.data[r]);
                    }
                    *old = Page {
                        data,
                        before_mapping: Some(before),
                        prepare,
                        mapping,
                    };
                }
            }
        }
    }

    /// Forget everything of the range: it was freed and holds nothing.
    pub(crate) fn forget(&mut self, slot: u32, range: ByteRange) {
        for (page_at, from, to) in pages(range.align_in(SECTOR)) {
            if let Some(page) = self.active.pages.get_mut(&(slot, page_at)) {
                let mask = !sector_mask(from, to);
                page.prepare &= mask;
                page.mapping &= mask;
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
    fn len(self) -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> BTreeMap<u64, Vec<u8>> {
        BTreeMap::new()
    }

    fn outs(o: &Overlay, stage: Stage) -> Vec<(u64, Vec<u8>)> {
        o.write_out(stage)
            .into_iter()
            .map(|w| (w.offset, w.data))
            .collect()
    }

    #[test]
    fn reads_see_queued_bytes_and_only_those_sectors() {
        let mut o = Overlay::default();
        o.write(0, Stage::Prepare, 512, Bytes::Given(&[1; 512]), &none());
        let mut buf = vec![9; 2048];
        o.patch(0, 0, &mut buf);
        assert_eq!((buf[0], buf[512], buf[1023], buf[1024]), (9, 1, 1, 9));
        o.patch(1, 0, &mut buf[..512]);
        assert_eq!(buf[0], 9);
    }

    #[test]
    fn partial_sectors_need_their_base() {
        let mut o = Overlay::default();
        let r = ByteRange::between(4096 + 8, 4096 + 16);
        assert_eq!(o.needs(0, r), [4096]);
        assert!(o.needs(0, ByteRange::between(4096, 8192)).is_empty());
        let base = BTreeMap::from([(4096, vec![7; 4096])]);
        o.write(0, Stage::Mapping, 4096 + 8, Bytes::Given(&[1; 8]), &base);
        assert!(o.needs(0, r).is_empty());
        o.seal();
        let w = outs(&o, Stage::Mapping);
        assert_eq!(w.len(), 1);
        assert_eq!(
            (w[0].0, w[0].1.len(), w[0].1[0], w[0].1[8]),
            (4096, 512, 7, 1)
        );
    }

    #[test]
    fn prepare_is_written_without_the_mapping_of_the_same_sector() {
        let mut o = Overlay::default();
        o.write(0, Stage::Prepare, 0, Bytes::Zeroes(4096), &none());
        o.write(0, Stage::Mapping, 0, Bytes::Given(&[5; 8]), &none());
        o.write(0, Stage::Prepare, 8, Bytes::Given(&[6; 8]), &none());
        o.seal();
        let prepare = &outs(&o, Stage::Prepare)[0].1;
        assert_eq!((prepare[0], prepare[8]), (0, 6));
        let mapping = &outs(&o, Stage::Mapping)[0].1;
        assert_eq!((mapping[0], mapping[8]), (5, 6));
    }

    #[test]
    fn a_new_generation_starts_from_the_sealed_one() {
        let mut o = Overlay::default();
        o.write(0, Stage::Mapping, 0, Bytes::Given(&[1; 512]), &none());
        o.seal();
        assert!(o.needs(0, ByteRange::between(8, 16)).is_empty());
        o.write(0, Stage::Mapping, 8, Bytes::Given(&[2; 8]), &none());
        let mut buf = [0; 512];
        o.patch(0, 0, &mut buf);
        assert_eq!((buf[0], buf[8], buf[16]), (1, 2, 1));
        o.retire();
        let mut buf = [9; 512];
        o.patch(0, 0, &mut buf);
        assert_eq!(
            (buf[0], buf[8]),
            (1, 2),
            "the page kept what the sealed one wrote"
        );
    }

    #[test]
    fn a_failed_flush_loses_nothing() {
        let mut o = Overlay::default();
        o.write(0, Stage::Mapping, 0, Bytes::Given(&[1; 512]), &none());
        o.seal();
        o.write(0, Stage::Mapping, 512, Bytes::Given(&[2; 512]), &none());
        o.unseal();
        o.seal();
        let w = outs(&o, Stage::Mapping);
        assert_eq!((w[0].1.len(), w[0].1[0], w[0].1[512]), (1024, 1, 2));
    }
}
