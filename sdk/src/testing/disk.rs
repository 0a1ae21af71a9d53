//! Bytes of a file in memory: sparse, and cheap to clone, because the crash
//! checker makes thousands of copies that differ in a few pages.

use crate::ByteRange;
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE_LEN: usize = 4096;
type Page = [u8; PAGE_LEN];

/// A file's content. Pages that are missing read as zero.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Disk {
    /// `len` zero bytes.
    pub const fn new(len: u64) -> Self {
        Self {
            len,
            pages: BTreeMap::new(),
        }
    }

    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes at all.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cut or extend with zeroes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.clear(ByteRange::new(len, self.len - len));
        }
        self.len = len;
    }

    /// Fill `buf` from `offset`; past the end there are zeroes.
    pub fn read_into(&self, offset: u64, buf: &mut [u8]) {
        for (page, within, part) in pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(bytes) => buf[part.clone()].copy_from_slice(&bytes[within..][..part.len()]),
                None => buf[part].fill(0),
            }
        }
    }

    /// `len` bytes from `offset`.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.read_into(offset, &mut buf);
        buf
    }

    /// Store `data` at `offset`; the file grows as needed.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, part) in pieces(offset, data.len()) {
            let bytes = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE_LEN]));
            Arc::make_mut(bytes)[within..][..part.len()].copy_from_slice(&data[part]);
        }
        self.len = self.len.max(offset + data.len() as u64);
    }

    /// Zero `range`; the file grows as needed.
    pub fn zero(&mut self, range: ByteRange) {
        self.clear(range);
        self.len = self.len.max(range.end());
    }

    /// The next pages with data at or after `offset`, inside the file.
    pub fn next_data(&self, offset: u64) -> Option<ByteRange> {
        let first_page = offset / PAGE_LEN as u64;
        let mut pages = self.pages.range(first_page..).map(|(page, _)| *page);
        let first = pages.next()?;
        let last = pages.zip(first + 1..).take_while(|(a, b)| a == b).last();
        let end = (last.map_or(first, |(page, _)| page) + 1) * PAGE_LEN as u64;
        let start = offset.max(first * PAGE_LEN as u64);
        let end = end.min(self.len);
        (start < end).then(|| ByteRange::new(start, end - start))
    }

    /// Everything.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read(0, usize::try_from(self.len).unwrap_or(usize::MAX))
    }

    /// Whether the two differ anywhere in `range`; absent pages cost nothing.
    pub fn differs(&self, other: &Self, range: ByteRange) -> bool {
        let pages = range.offset / PAGE_LEN as u64..range.end().div_ceil(PAGE_LEN as u64);
        let present = self
            .pages
            .range(pages.clone())
            .chain(other.pages.range(pages));
        present.map(|(page, _)| *page).any(|page| {
            match (self.pages.get(&page), other.pages.get(&page)) {
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => return false,
                _ => {}
            }
            let start = range.offset.max(page * PAGE_LEN as u64);
            let end = range.end().min((page + 1) * PAGE_LEN as u64);
            let len = (end - start) as usize;
            self.read(start, len) != other.read(start, len)
        })
    }

    fn clear(&mut self, range: ByteRange) {
        let first_whole = range.offset.div_ceil(PAGE_LEN as u64);
        let end_whole = range.end() / PAGE_LEN as u64;
        if first_whole < end_whole {
            let mut tail = self.pages.split_off(&first_whole);
            self.pages.append(&mut tail.split_off(&end_whole));
        }
        for edge in [range.offset / PAGE_LEN as u64, end_whole] {
            if let Some(bytes) = self.pages.get_mut(&edge) {
                let base = edge * PAGE_LEN as u64;
                let from = range.offset.clamp(base, base + PAGE_LEN as u64) - base;
                let to = range.end().clamp(base, base + PAGE_LEN as u64) - base;
                Arc::make_mut(bytes)[from as usize..to as usize].fill(0);
            }
        }
    }
}

impl From<Vec<u8>> for Disk {
    fn from(bytes: Vec<u8>) -> Self {
        let mut disk = Self::new(bytes.len() as u64);
        for (index, page) in bytes.chunks(PAGE_LEN).enumerate() {
            if page.iter().any(|b| *b != 0) {
                disk.write((index * PAGE_LEN) as u64, page);
            }
        }
        disk
    }
}

/// The pages of `len` bytes from `offset`: page, start in it, part of the bytes.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % PAGE_LEN as u64) as usize;
        let part = done..len.min(done + PAGE_LEN - within);
        done = part.end;
        (!part.is_empty()).then_some((at / PAGE_LEN as u64, within, part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn behaves_like_a_vec() {
        let mut random = Random::new(1);
        let (mut disk, mut model) = (Disk::default(), Vec::new());
        for _ in 0..2000 {
            let (at, len) = (random.below(30_000), random.below(9000) as usize);
            match random.below(4) {
                0 => {
                    let range = ByteRange::new(at, len as u64);
                    disk.zero(range);
                    model.resize(model.len().max(range.end() as usize), 0);
                    model[at as usize..range.end() as usize].fill(0);
                }
                1 if random.one_in(4) => {
                    disk.set_len(at);
                    model.resize(at as usize, 0);
                }
                _ if len > 0 => {
                    let data = random.bytes(len);
                    disk.write(at, &data);
                    model.resize(model.len().max(at as usize + len), 0);
                    model[at as usize..][..len].copy_from_slice(&data);
                }
                _ => {}
            }
            assert_eq!(disk.len(), model.len() as u64);
        }
        assert_eq!(disk.to_vec(), model);
        assert!(!disk.differs(&Disk::from(model), ByteRange::new(0, disk.len())));
    }

    #[test]
    fn finds_data_between_holes() {
        let mut disk = Disk::new(100_000);
        disk.write(8192, &[1; 5000]);
        assert_eq!(disk.next_data(0), Some(ByteRange::new(8192, 8192)));
        assert_eq!(
            disk.next_data(9000),
            Some(ByteRange::new(9000, 16384 - 9000))
        );
        assert_eq!(disk.next_data(16384), None);
    }
}
