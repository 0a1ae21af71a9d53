//! Guest ranges to extents.

use outport_sdk::{ByteRange, Codec, Error, Extent, Files, Location, Result};

use crate::header::Compression;
use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::table::{Cluster, l1_decode};

/// Extents of one answer: what one page of L2 entries gives at most without
/// subclusters. Bounds an image whose subclusters alternate.
const EXTENTS_MAX: usize = 512;

/// Neighbouring extents that continue one another, as one.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    list: Vec<Extent>,
}

impl Extents {
    pub(crate) fn push(&mut self, range: ByteRange, at: Location) {
        if range.len == 0 {
            return;
        }
        if let Some(last) = self.list.last_mut()
            && last.range.end() == range.offset
            && continues(last.at, last.range.len, at)
        {
            last.range.len += range.len;
            return;
        }
        self.list.push(Extent { range, at });
    }

    /// The part of `extent` that lies in `within`.
    pub(crate) fn push_part(&mut self, extent: Extent, within: ByteRange) {
        let from = extent.range.offset.max(within.offset);
        let to = extent.range.end().min(within.end());
        if from >= to {
            return;
        }
        let skip = from - extent.range.offset;
        let at = match extent.at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => Location::Raw {
                slot,
                offset: offset + skip,
                in_place,
            },
            Location::Backing(offset) => Location::Backing(offset + skip),
            at => at,
        };
        self.push(ByteRange::new(from, to - from), at);
    }

    pub(crate) fn into_list(self) -> Vec<Extent> {
        self.list
    }
}

/// `next` is where the bytes after `len` bytes at `first` would be.
fn continues(first: Location, len: u64, next: Location) -> bool {
    match (first, next) {
        (
            Location::Raw {
                slot: a,
                offset,
                in_place: p,
            },
            Location::Raw {
                slot: b,
                offset: next,
                in_place: q,
            },
        ) => a == b && p == q && offset.checked_add(len) == Some(next),
        (Location::Backing(offset), Location::Backing(next)) => {
            offset.checked_add(len) == Some(next)
        }
        (Location::Zero, Location::Zero) | (Location::Hole, Location::Hole) => true,
        // The same unit, seen through two entries: never two units as one.
        (a @ Location::Coded { .. }, b @ Location::Coded { .. }) => a == b,
        _ => false,
    }
}

impl Qcow2 {
    pub(crate) fn resolve_range(
        &mut self,
        files: &dyn Files,
        range: ByteRange,
    ) -> Result<Vec<Extent>> {
        self.refresh(files)?;
        if range.offset >= self.header.size {
            return Err(Error::invalid(format!(
                "Offset {} is past the end of the image",
                range.offset
            )));
        }
        match self.l2_table(files, range.offset)? {
            None => self.resolve_unmapped(files, range.offset),
            Some(table) => self.resolve_page(files, table.offset, range.offset),
        }
    }

    /// No L2 table: nothing is mapped until the next L1 entry that has one.
    fn resolve_unmapped(&mut self, files: &dyn Files, guest: u64) -> Result<Vec<Extent>> {
        let span = self.header.l2_span();
        let start = guest - guest % span;
        let mut end = start.saturating_add(span);
        // As far as one page of the L1 table tells.
        let first = self.l1_entry_at(guest)?;
        let (at, page) = self.pages.page(files, first)?;
        for entry in page[(first - at) as usize..]
            .as_chunks::<8>()
            .0
            .iter()
            .skip(1)
        {
            let empty = matches!(
                l1_decode(u64::from_be_bytes(*entry), self.header.cluster_bits),
                Ok(None)
            );
            if !empty || end >= self.header.size {
                break;
            }
            end = end.saturating_add(span);
        }
        let mut extents = Extents::default();
        self.push_unallocated(&mut extents, start, end);
        Ok(extents.into_list())
    }

    /// All that one page of the L2 table at `table` says, around `guest`.
    fn resolve_page(&mut self, files: &dyn Files, table: u64, guest: u64) -> Result<Vec<Extent>> {
        let cluster_size = self.cluster_size();
        let entry_size = self.coding.entry_size();
        let file_end = files.size(self.data_slot)?;
        let wanted = self.l2_entry_at(table, guest);
        let (page_at, page) = self.pages.page(files, wanted)?;
        let page = page.to_vec();
        let wanted_index = (wanted - page_at) / entry_size;
        let first = (guest & !(cluster_size - 1)) - wanted_index * cluster_size;

        let mut extents = Extents::default();
        for (i, raw) in page.chunks_exact(entry_size as usize).enumerate() {
            let i = i as u64;
            let start = first + i * cluster_size;
            if start >= self.header.size {
                break;
            }
            if extents.list.len() >= EXTENTS_MAX {
                if i > wanted_index {
                    break;
                }
                extents.list.clear();
            }
            let (words, _) = raw.as_chunks::<8>();
            let word = |n: usize| words.get(n).map_or(0, |w| u64::from_be_bytes(*w));
            let pushed = match [word(0), word(1)] {
                [0, 0] => {
                    self.push_unallocated(&mut extents, start, start + cluster_size);
                    Ok(())
                }
                entry => self
                    .decode(entry, start)
                    .and_then(|c| self.push_cluster(&mut extents, start, c, file_end)),
            };
            match pushed {
                Ok(()) => {}
                // Damage elsewhere in the page is no concern of this request.
                Err(_) if i < wanted_index => extents.list.clear(),
                Err(_) if i > wanted_index => break,
                Err(message) => return Err(self.damaged(files, message, wanted, entry_size)),
            }
        }
        Ok(extents.into_list())
    }

    /// The extents of one guest cluster. `file_end`: length of the file that
    /// holds the data.
    pub(crate) fn push_cluster(
        &self,
        extents: &mut Extents,
        guest: u64,
        cluster: Cluster,
        file_end: u64,
    ) -> std::result::Result<(), String> {
        let cluster_size = self.cluster_size();
        let end = (guest + cluster_size).min(self.header.size);
        match cluster {
            Cluster::Compressed { offset, stored_len } => {
                if offset >= file_end {
                    return Err(format!(
                        "The compressed cluster of guest offset {guest:#x} lies outside of the \
                         file, at {offset:#x}"
                    ));
                }
                let at = Location::Coded {
                    slot: IMAGE,
                    offset,
                    stored_len,
                    codec: match self.header.compression {
                        Compression::Deflate => Codec::Deflate,
                        Compression::Zstd => Codec::Zstd,
                    },
                    unit_offset: guest,
                    unit_len: cluster_size as u32,
                };
                extents.push(ByteRange::new(guest, end - guest), at);
            }
            Cluster::Standard { host, sub } => {
                let unit = self.unit();
                for (first, count, bit) in runs(sub.allocated, sub.zero, self.coding.subclusters())
                {
                    let from = guest + u64::from(first) * unit;
                    let to = (from + u64::from(count) * unit).min(end);
                    if from >= to {
                        break;
                    }
                    match (bit, host) {
                        (Status::Zero, _) => {
                            extents.push(ByteRange::new(from, to - from), Location::Zero);
                        }
                        (Status::Allocated, Some(host)) => {
                            let offset = host.offset + u64::from(first) * unit;
                            let in_place = host.copied && self.writable;
                            self.push_raw(extents, from, to, offset, in_place, file_end);
                        }
                        _ => self.push_unallocated(extents, from, to),
                    }
                }
            }
        }
        Ok(())
    }

    /// Whole units past the end of the file were never written: they are zero,
    /// and a write gives them a new place.
    fn push_raw(
        &self,
        extents: &mut Extents,
        from: u64,
        to: u64,
        offset: u64,
        in_place: bool,
        file_end: u64,
    ) {
        let inside = file_end
            .saturating_sub(offset)
            .checked_next_multiple_of(self.unit());
        let inside = inside.unwrap_or(u64::MAX);
        let middle = to.min(from.saturating_add(inside));
        let at = Location::Raw {
            slot: self.data_slot,
            offset,
            in_place,
        };
        extents.push(ByteRange::new(from, middle - from), at);
        extents.push(ByteRange::new(middle, to - middle), Location::Zero);
    }

    /// The backing image as far as it goes, then nothing.
    pub(crate) fn push_unallocated(&self, extents: &mut Extents, from: u64, to: u64) {
        let to = to.min(self.header.size);
        let shown = self
            .backing_len
            .unwrap_or(0)
            .checked_next_multiple_of(self.unit());
        let middle = shown.unwrap_or(u64::MAX).clamp(from, to.max(from));
        extents.push(ByteRange::new(from, middle - from), Location::Backing(from));
        extents.push(
            ByteRange::new(middle, to.saturating_sub(middle)),
            Location::Hole,
        );
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Unallocated,
    Zero,
    Allocated,
}

/// Runs of equal subclusters: first, count, status.
fn runs(allocated: u32, zero: u32, count: u32) -> impl Iterator<Item = (u32, u32, Status)> {
    let status = move |i: u32| match (allocated >> i & 1, zero >> i & 1) {
        (1, _) => Status::Allocated,
        (_, 1) => Status::Zero,
        _ => Status::Unallocated,
    };
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = next;
        if first >= count {
            return None;
        }
        let what = status(first);
        while next < count && status(next) == what {
            next += 1;
        }
        Some((first, next - first, what))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_all_subclusters_in_order() {
        let all: Vec<_> = runs(0b0110, 0b1000, 32).collect();
        assert_eq!(
            all,
            [
                (0, 1, Status::Unallocated),
                (1, 2, Status::Allocated),
                (3, 1, Status::Zero),
                (4, 28, Status::Unallocated)
            ]
        );
        assert_eq!(
            runs(1, 0, 1).collect::<Vec<_>>(),
            [(0, 1, Status::Allocated)]
        );
    }
}
