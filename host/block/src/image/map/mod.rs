//! The extent map: what the host knows of where a node's bytes lie.
//!
//! Read by every iothread without a lock; changed only under the node's plugin
//! lock, by `resolve` answers, commits and invalidations. Invariant: an entry
//! was verified against the file it names.
//!
//! It is a direct-mapped cache of leaves (`leaf`). A leaf holds one 64-bit
//! entry for each of 1024 units, so memory is bounded whatever the image
//! claims, and an image whose leaves all fit never evicts.
//!
//! ```text
//!   entry:  63..61 kind | 60..56 slot | 55..0 offset, unit offset or id
//! ```

mod leaf;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::ByteRange;
use crate::format::{Coded, Extent, Location};

use leaf::Leaf;

/// Units per leaf: 8 KiB of entries, which with 64 KiB clusters map 64 MiB.
const LEAF_UNITS: u64 = 1024;

/// Leaves per node at most: 32 MiB of entries, which with 64 KiB clusters map
/// 256 GiB without ever asking the plugin again. A power of two: finding the
/// leaf is then a mask.
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

/// The entry of the unit `distance` after that of `entry`, if both lie in one run:
/// places in a file differ by the distance, other answers are equal.
fn follower(entry: u64, distance: usize, unit: u64) -> u64 {
    match entry >> KIND_SHIFT {
        RAW | IN_PLACE | BACKING => entry.wrapping_add(distance as u64 * unit),
        _ => entry,
    }
}

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

/// Forgotten by the map: bytes of a file that it held in place.
pub(crate) type Evicted<'a> = &'a mut dyn FnMut(u32, ByteRange);

/// The map of one node.
pub(crate) struct ExtentMap {
    unit_shift: u32,
    leaves: Box<[OnceLock<Box<Leaf>>]>,
    coded: Mutex<HashMap<u64, Coded>>,
}

impl ExtentMap {
    /// For an image mapped in `unit`s.
    pub(crate) fn new(unit: u32) -> Self {
        Self {
            unit_shift: unit.trailing_zeros(),
            leaves: (0..LEAVES_MAX).map(|_| OnceLock::new()).collect(),
            coded: Mutex::default(),
        }
    }

    fn unit(&self) -> u64 {
        1 << self.unit_shift
    }

    fn slot(&self, leaf_index: u64) -> &OnceLock<Box<Leaf>> {
        &self.leaves[(leaf_index % LEAVES_MAX) as usize]
    }

    /// What is known of `range` from its start; at least one byte.
    pub(crate) fn run(&self, range: ByteRange) -> Run {
        let unit = self.unit();
        let unit_index = range.offset() >> self.unit_shift;
        let within = range.offset() & (unit - 1);
        let unknown = Run {
            place: Place::Unknown,
            len: range.len().min(unit - within),
        };
        let leaf_index = unit_index / LEAF_UNITS;
        let Some(leaf) = self.slot(leaf_index).get() else {
            return unknown;
        };
        let Some(reading) = leaf.read(leaf_index) else {
            return unknown;
        };
        let first = (unit_index % LEAF_UNITS) as usize;
        let entry = reading.entry(first, unit);
        let mut len = unit - within;
        let mut next = first + 1;
        while len < range.len() && next < LEAF_UNITS as usize {
            if reading.entry(next, unit) != follower(entry, next - first, unit) {
                break;
            }
            len += unit;
            next += 1;
        }
        if !reading.is_whole() {
            return unknown;
        }
        let len = len.min(range.len());
        match self.place(entry, within) {
            Place::Coded(c) => self.coded_run(c, range.offset(), len).unwrap_or(unknown),
            place => Run { place, len },
        }
    }

    fn place(&self, entry: u64, within: u64) -> Place {
        let offset = entry & OFFSET_MASK;
        let slot = ((entry >> SLOT_SHIFT) & SLOT_MASK) as u32;
        match entry >> KIND_SHIFT {
            kind @ (RAW | IN_PLACE) => Place::Raw {
                slot,
                offset: offset + within,
                in_place: kind == IN_PLACE,
            },
            ZERO => Place::Zero,
            HOLE => Place::Hole,
            BACKING => Place::Backing(offset + within),
            CODED => {
                let coded = self.coded.lock().unwrap_or_else(PoisonError::into_inner);
                coded
                    .get(&offset)
                    .map_or(Place::Unknown, |c| Place::Coded(*c))
            }
            SPECIAL => Place::Special(offset),
            _ => Place::Unknown,
        }
    }

    /// The unit may be another than when the entry was made: it must hold what
    /// is asked of it.
    fn coded_run(&self, unit: Coded, from: u64, len: u64) -> Option<Run> {
        let end = unit.unit_offset + u64::from(unit.unit_len);
        if from < unit.unit_offset || from >= end {
            return None;
        }
        Some(Run {
            place: Place::Coded(unit),
            len: len.min(end - from),
        })
    }

    /// The part of an answer about `around` that is worth remembering.
    pub(crate) fn near(&self, around: ByteRange) -> ByteRange {
        let window = INSERT_UNITS_MAX << self.unit_shift;
        ByteRange::between(
            around.offset().saturating_sub(self.unit()),
            around.end().saturating_add(window),
        )
        .align_out(self.unit())
    }

    /// Remember verified extents, those [`ExtentMap::near`] `around`. Plugin
    /// lock.
    pub(crate) fn insert(&self, extents: &[Extent], around: ByteRange, evicted: Evicted<'_>) {
        let near = self.near(around);
        let near = extents
            .iter()
            .filter_map(|e| Some((e, e.range.intersect(near)?)));
        self.make_room_for_coded(near.clone().map(|(e, _)| e));
        for (extent, part) in near {
            let skipped = part.offset() - extent.range.offset();
            let entry = self.encode(extent, skipped);
            self.fill(part, entry, evicted);
        }
    }

    /// All of one answer must fit, or its own units would push each other out.
    fn make_room_for_coded<'a>(&self, extents: impl Iterator<Item = &'a Extent>) {
        let coming = extents
            .filter(|e| matches!(e.at, Location::Coded(_)))
            .count();
        if coming > 0 {
            let mut table = self.coded.lock().unwrap_or_else(PoisonError::into_inner);
            if table.len() + coming > CODED_MAX {
                table.clear();
            }
        }
    }

    /// Forget what is known of `range`. Plugin lock.
    pub(crate) fn invalidate(&self, range: ByteRange) {
        let first = range.offset() >> self.unit_shift;
        let last = range.end().saturating_add(self.unit() - 1) >> self.unit_shift;
        if first == last {
            return;
        }
        let (first_leaf, last_leaf) = (first / LEAF_UNITS, (last - 1) / LEAF_UNITS);
        if last_leaf - first_leaf < LEAVES_MAX {
            for index in first_leaf..=last_leaf {
                if let Some(leaf) = self.slot(index).get()
                    && leaf.index() == Some(index)
                {
                    leaf.forget(first, last);
                }
            }
        } else {
            for leaf in self.leaves.iter().filter_map(OnceLock::get) {
                leaf.forget(first, last);
            }
        }
    }

    fn encode(&self, extent: &Extent, skipped: u64) -> u64 {
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
                word(kind, slot, offset + skipped)
            }
            Location::Zero => word(ZERO, 0, 0),
            Location::Hole => word(HOLE, 0, 0),
            Location::Backing(offset) => word(BACKING, 0, offset + skipped),
            Location::Coded(coded) => {
                let mut table = self.coded.lock().unwrap_or_else(PoisonError::into_inner);
                if table.len() >= CODED_MAX && !table.contains_key(&coded.unit_offset) {
                    return word(UNKNOWN, 0, 0);
                }
                table.insert(coded.unit_offset, coded);
                word(CODED, 0, coded.unit_offset)
            }
            Location::Special(id) => word(SPECIAL, 0, id),
        }
    }

    fn fill(&self, range: ByteRange, mut entry: u64, evicted: Evicted<'_>) {
        let mut unit_index = range.offset() >> self.unit_shift;
        let last = range.end().saturating_add(self.unit() - 1) >> self.unit_shift;
        while unit_index < last {
            let leaf_index = unit_index / LEAF_UNITS;
            let leaf = self.leaf_for(leaf_index, evicted);
            let end = last.min((leaf_index + 1) * LEAF_UNITS);
            let first = (unit_index % LEAF_UNITS) as usize;
            let units = (end - unit_index) as usize;
            leaf.fill(first, first + units, entry, self.unit());
            entry = follower(entry, units, self.unit());
            unit_index = end;
        }
    }

    fn leaf_for(&self, index: u64, evicted: Evicted<'_>) -> &Leaf {
        let leaf = self.slot(index).get_or_init(Box::default);
        if leaf.index() != Some(index) {
            self.in_place_of(leaf, evicted);
            leaf.become_index(index);
        }
        leaf
    }

    /// Tell what the leaf holds in place, neighbours joined.
    fn in_place_of(&self, leaf: &Leaf, evicted: Evicted<'_>) {
        let mut run: Option<(u32, ByteRange)> = None;
        for entry in leaf.entries() {
            let Place::Raw {
                slot,
                offset,
                in_place: true,
            } = self.place_of_file(entry)
            else {
                continue;
            };
            let here = ByteRange::between(offset, offset + self.unit());
            run = match run {
                Some((s, r)) if s == slot && r.end() == offset => {
                    Some((s, ByteRange::between(r.offset(), here.end())))
                }
                Some((s, r)) => {
                    evicted(s, r);
                    Some((slot, here))
                }
                None => Some((slot, here)),
            };
        }
        if let Some((slot, range)) = run {
            evicted(slot, range);
        }
    }

    #[cfg(test)]
    fn leaf_in_line(&self, index: u64) -> bool {
        self.slot(index).get().is_some_and(|leaf| leaf.is_in_line())
    }

    fn place_of_file(&self, entry: u64) -> Place {
        match entry >> KIND_SHIFT {
            RAW | IN_PLACE => self.place(entry, 0),
            _ => Place::Unknown,
        }
    }
}

impl std::fmt::Debug for ExtentMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtentMap")
            .field("unit", &self.unit())
            .finish_non_exhaustive()
    }
}
