//! The extent map: what the host knows of where a node's bytes lie.
//!
//! Read by every iothread without a lock; changed only under the node's plugin
//! lock, by `resolve` answers, commits and invalidations. Invariant: an entry
//! was verified against the file it names.
//!
//! It is a direct-mapped cache of leaves. A leaf holds one 64-bit entry for
//! each of 1024 units, so memory is bounded whatever the image claims, and an
//! image whose leaves all fit never evicts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;

use crate::ByteRange;
use crate::format::{Coded, Extent, Location};

/// Units per leaf: 8 KiB of entries, which with 64 KiB clusters map 64 MiB.
const LEAF_UNITS: u64 = 1024;

/// Leaves per node at most: 32 MiB of entries, which with 64 KiB clusters map
/// 256 GiB without ever asking the plugin again.
const LEAVES_MAX: u64 = 4096;

/// Entries that one `resolve` answer may fill around a request: a far-reaching
/// answer would only evict what others need.
const INSERT_UNITS_MAX: u64 = 64 * LEAF_UNITS;

/// Compressed units remembered; beyond it all are forgotten and asked again.
const CODED_MAX: usize = 1 << 16;

const KIND_SHIFT: u32 = 61;
const SLOT_SHIFT: u32 = 56;
const SLOT_MASK: u64 = 0x1f;
const OFFSET_MASK: u64 = (1 << SLOT_SHIFT) - 1;

/// Slots that an entry can name.
pub(crate) const SLOTS_MAX: u32 = 32;

const UNKNOWN: u64 = 0;
const RAW: u64 = 1;
const IN_PLACE: u64 = 2;
const ZERO: u64 = 3;
const HOLE: u64 = 4;
const BACKING: u64 = 5;
const CODED: u64 = 6;
const SPECIAL: u64 = 7;

/// Where a run of guest bytes is, as far as the map knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Ask the plugin.
    Unknown,
    /// In a file.
    Raw {
        slot: u32,
        offset: u64,
        in_place: bool,
    },
    /// Reads as zeroes by the image's word.
    Zero,
    /// Reads as zeroes because nothing is there.
    Hole,
    /// In the backing node at this offset.
    Backing(u64),
    /// Inside a compressed unit.
    Coded(Coded),
    /// The plugin makes the bytes.
    Special(u64),
}

/// The longest run with one answer, from the asked offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) place: Place,
    pub(crate) len: u64,
}

struct Leaf {
    index: u64,
    entries: [AtomicU64; LEAF_UNITS as usize],
}

/// The map of one node.
pub(crate) struct ExtentMap {
    unit_shift: u32,
    leaves: Box<[ArcSwapOption<Leaf>]>,
    coded: Mutex<HashMap<u64, Coded>>,
}

impl ExtentMap {
    /// For an image of `size` bytes mapped in `unit`s.
    pub(crate) fn new(size: u64, unit: u32) -> Self {
        let unit_shift = unit.trailing_zeros();
        let count = (size >> unit_shift)
            .div_ceil(LEAF_UNITS)
            .clamp(1, LEAVES_MAX);
        let leaves = (0..count).map(|_| ArcSwapOption::empty()).collect();
        Self {
            unit_shift,
            leaves,
            coded: Mutex::default(),
        }
    }

    fn unit(&self) -> u64 {
        1 << self.unit_shift
    }

    /// What is known of `range` from its start; at least one byte.
    pub(crate) fn run(&self, range: ByteRange) -> Run {
        let unit_index = range.offset() >> self.unit_shift;
        let within = range.offset() & (self.unit() - 1);
        let leaf_index = unit_index / LEAF_UNITS;
        let slot = &self.leaves[(leaf_index % self.leaves.len() as u64) as usize];
        let guard = slot.load();
        let unknown = Run {
            place: Place::Unknown,
            len: range.len().min(self.unit() - within),
        };
        let Some(leaf) = guard.as_ref().filter(|l| l.index == leaf_index) else {
            return unknown;
        };
        let first = (unit_index % LEAF_UNITS) as usize;
        let entry = leaf.entries[first].load(Ordering::Acquire);
        let kind = entry >> KIND_SHIFT;
        // Contiguous neighbours differ by one unit in the offset field.
        let step = if matches!(kind, RAW | IN_PLACE | BACKING) {
            self.unit()
        } else {
            0
        };
        let mut len = self.unit() - within;
        let mut expected = entry;
        let mut next = first + 1;
        while len < range.len() && next < LEAF_UNITS as usize {
            expected = expected.wrapping_add(step);
            if leaf.entries[next].load(Ordering::Acquire) != expected {
                break;
            }
            len += self.unit();
            next += 1;
        }
        let len = len.min(range.len());
        let offset = entry & OFFSET_MASK;
        let slot = ((entry >> SLOT_SHIFT) & SLOT_MASK) as u32;
        let place = match kind {
            RAW => Place::Raw {
                slot,
                offset: offset + within,
                in_place: false,
            },
            IN_PLACE => Place::Raw {
                slot,
                offset: offset + within,
                in_place: true,
            },
            ZERO => Place::Zero,
            HOLE => Place::Hole,
            BACKING => Place::Backing(offset + within),
            CODED => {
                let coded = self.coded.lock().unwrap_or_else(PoisonError::into_inner);
                match coded.get(&offset) {
                    Some(c) => Place::Coded(*c),
                    None => return unknown,
                }
            }
            SPECIAL => Place::Special(offset),
            _ => Place::Unknown,
        };
        Run { place, len }
    }

    /// Remember verified extents, those near `around` at least. Plugin lock.
    ///
    /// `evicted` is called with the guest range of every leaf that had to go.
    pub(crate) fn insert(
        &self,
        extents: &[Extent],
        around: ByteRange,
        mut evicted: impl FnMut(ByteRange),
    ) {
        let window = INSERT_UNITS_MAX << self.unit_shift;
        let near = ByteRange::between(
            around.offset().saturating_sub(self.unit()),
            around.end().saturating_add(window),
        );
        for extent in extents {
            let Some(part) = extent.range.intersect(near) else {
                continue;
            };
            let skipped = part.offset() - extent.range.offset();
            let (entry, step) = self.encode(extent, skipped);
            self.fill(part, entry, step, &mut evicted);
        }
    }

    /// Forget what is known of `range`. Plugin lock.
    pub(crate) fn invalidate(&self, range: ByteRange) {
        let first = range.offset() >> self.unit_shift;
        let last = (range.end().saturating_add(self.unit() - 1)) >> self.unit_shift;
        for slot in &self.leaves {
            let guard = slot.load();
            let Some(leaf) = guard.as_ref() else { continue };
            let base = leaf.index * LEAF_UNITS;
            let from = first.max(base);
            let to = last.min(base + LEAF_UNITS);
            for unit in from..to {
                leaf.entries[(unit - base) as usize]
                    .store(UNKNOWN << KIND_SHIFT, Ordering::Release);
            }
        }
    }

    fn encode(&self, extent: &Extent, skipped: u64) -> (u64, u64) {
        let unit = self.unit();
        let word = |kind: u64, slot: u32, offset: u64| {
            (kind << KIND_SHIFT) | (u64::from(slot) << SLOT_SHIFT) | (offset & OFFSET_MASK)
        };
        match extent.at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => {
                let kind = if in_place { IN_PLACE } else { RAW };
                (word(kind, slot, offset + skipped), unit)
            }
            Location::Zero => (word(ZERO, 0, 0), 0),
            Location::Hole => (word(HOLE, 0, 0), 0),
            Location::Backing(offset) => (word(BACKING, 0, offset + skipped), unit),
            Location::Coded(coded) => {
                let mut table = self.coded.lock().unwrap_or_else(PoisonError::into_inner);
                if table.len() >= CODED_MAX {
                    table.clear();
                }
                table.insert(coded.unit_offset, coded);
                (word(CODED, 0, coded.unit_offset), 0)
            }
            Location::Special(id) => (word(SPECIAL, 0, id), 0),
        }
    }

    fn fill(
        &self,
        range: ByteRange,
        mut entry: u64,
        step: u64,
        evicted: &mut impl FnMut(ByteRange),
    ) {
        let mut unit_index = range.offset() >> self.unit_shift;
        let last = range.end().saturating_add(self.unit() - 1) >> self.unit_shift;
        while unit_index < last {
            let leaf_index = unit_index / LEAF_UNITS;
            let leaf = self.leaf_for(leaf_index, evicted);
            let end = last.min((leaf_index + 1) * LEAF_UNITS);
            while unit_index < end {
                let at = (unit_index % LEAF_UNITS) as usize;
                leaf.entries[at].store(entry, Ordering::Release);
                entry = entry.wrapping_add(step);
                unit_index += 1;
            }
        }
    }

    fn leaf_for(&self, index: u64, evicted: &mut impl FnMut(ByteRange)) -> Arc<Leaf> {
        let slot = &self.leaves[(index % self.leaves.len() as u64) as usize];
        if let Some(leaf) = slot.load_full() {
            if leaf.index == index {
                return leaf;
            }
            let span = LEAF_UNITS << self.unit_shift;
            evicted(ByteRange::between(
                leaf.index * span,
                (leaf.index + 1) * span,
            ));
        }
        let leaf = Arc::new(Leaf {
            index,
            entries: [const { AtomicU64::new(0) }; _],
        });
        slot.store(Some(leaf.clone()));
        leaf
    }
}

impl std::fmt::Debug for ExtentMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtentMap")
            .field("unit", &self.unit())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    fn raw(guest: u64, len: u64, offset: u64) -> Extent {
        Extent {
            range: range(guest, len),
            at: Location::Raw {
                slot: 1,
                offset,
                in_place: true,
            },
        }
    }

    #[test]
    fn contiguous_units_are_one_run() {
        let map = ExtentMap::new(1 << 30, 65536);
        let all = range(0, 1 << 20);
        map.insert(&[raw(0, 1 << 20, 1 << 24)], all, |_| {});
        assert_eq!(
            map.run(range(100, 200_000)),
            Run {
                place: Place::Raw {
                    slot: 1,
                    offset: (1 << 24) + 100,
                    in_place: true
                },
                len: 200_000
            }
        );
        map.invalidate(range(65536, 1));
        assert_eq!(map.run(range(100, 200_000)).len, 65436);
        assert_eq!(map.run(range(65536, 10)).place, Place::Unknown);
    }

    #[test]
    fn eviction_names_the_guest_range() {
        let size = (LEAVES_MAX + 1) * LEAF_UNITS * 512;
        let map = ExtentMap::new(size, 512);
        map.insert(&[raw(0, 512, 0)], range(0, 512), |_| {
            panic!("nothing to evict")
        });
        let far = LEAVES_MAX * LEAF_UNITS * 512;
        let mut gone = Vec::new();
        map.insert(&[raw(far, 512, 512)], range(far, 512), |r| gone.push(r));
        assert_eq!(gone, [range(0, LEAF_UNITS * 512)]);
        assert_eq!(map.run(range(0, 1)).place, Place::Unknown);
    }

    #[test]
    fn a_sub_extent_keeps_its_offset() {
        let map = ExtentMap::new(1 << 40, 512);
        // An answer that starts far before the request: only what is near counts.
        let extent = raw(0, 1 << 36, 4096);
        let ask = range(1 << 35, 512);
        map.insert(&[extent], ask, |_| {});
        let run = map.run(ask);
        assert_eq!(
            run.place,
            Place::Raw {
                slot: 1,
                offset: 4096 + (1 << 35),
                in_place: true
            }
        );
    }
}
