//! The host believes no plugin: every extent is checked before it is used.
//!
//! Owned by the node's plugin lock. Knows which file ranges hold metadata (a
//! plugin wrote them) and which are mapped for writing in place, by guest
//! range. Invariant: no two guest ranges that the extent map holds are in place
//! on the same byte, and none of them touches metadata.

use std::collections::BTreeMap;

use crate::ByteRange;
use crate::format::{Child, Extent, Fault, FaultKind, Geometry, Location, Placement};

use super::map::SLOTS_MAX;

/// Children that an image may ask for.
pub(crate) const CHILDREN_MAX: usize = SLOTS_MAX as usize - 1;

/// A decoded unit is kept in memory, so it has a limit; qcow2's largest
/// cluster.
const UNIT_LEN_MAX: u32 = 2 << 20;

/// Stored bytes of a unit: incompressible data may grow a little.
const STORED_LEN_MAX: u32 = UNIT_LEN_MAX + (64 << 10);

/// Intervals by start, merged where neighbours touch.
#[derive(Debug, Default)]
struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    fn overlapping(&self, range: ByteRange) -> Option<ByteRange> {
        let (start, end) = self.0.range(..range.end()).next_back()?;
        let found = ByteRange::between(*start, *end);
        found.overlaps(range).then_some(found)
    }

    fn add(&mut self, range: ByteRange) {
        let (mut start, mut end) = (range.offset(), range.end());
        while let Some((s, e)) = self.0.range(..=end).next_back().map(|(s, e)| (*s, *e)) {
            if e < start {
                break;
            }
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }

    fn remove(&mut self, range: ByteRange) {
        while let Some(found) = self.overlapping(range) {
            self.0.remove(&found.offset());
            if found.offset() < range.offset() {
                self.0.insert(found.offset(), range.offset());
            }
            if range.end() < found.end() {
                self.0.insert(range.end(), found.end());
            }
        }
    }
}

/// File ranges mapped in place: start -> (end, guest offset of start).
#[derive(Debug, Default)]
struct Owners(BTreeMap<u64, (u64, u64)>);

impl Owners {
    fn overlapping(&self, range: ByteRange) -> Option<(ByteRange, u64)> {
        let (start, (end, guest)) = self.0.range(..range.end()).next_back()?;
        let found = ByteRange::between(*start, *end);
        found.overlaps(range).then_some((found, *guest))
    }

    /// The guest offset that owns a byte of `range` and is not `guest`'s.
    fn conflict(&self, range: ByteRange, guest: u64) -> Option<u64> {
        let mut at = range.end();
        while let Some((start, (end, owner))) = self.0.range(..at).next_back() {
            if *end <= range.offset() {
                break;
            }
            // The same guest bytes again: equal distance of guest and file.
            if owner.wrapping_sub(*start) != guest.wrapping_sub(range.offset()) {
                return Some(*owner);
            }
            at = *start;
        }
        None
    }

    fn add(&mut self, range: ByteRange, guest: u64) {
        self.remove(range);
        let (mut start, mut end, mut guest) = (range.offset(), range.end(), guest);
        let distance = guest.wrapping_sub(start);
        if let Some((s, (e, g))) = self.0.range(..start).next_back().map(|(s, v)| (*s, *v))
            && e == start
            && g.wrapping_sub(s) == distance
        {
            self.0.remove(&s);
            (start, guest) = (s, g);
        }
        if let Some((e, g)) = self.0.get(&end).copied()
            && g.wrapping_sub(end) == distance
        {
            self.0.remove(&end);
            end = e;
        }
        self.0.insert(start, (end, guest));
    }

    fn remove(&mut self, range: ByteRange) {
        while let Some((found, guest)) = self.overlapping(range) {
            self.0.remove(&found.offset());
            if found.offset() < range.offset() {
                self.0.insert(found.offset(), (range.offset(), guest));
            }
            if range.end() < found.end() {
                let guest = guest + (range.end() - found.offset());
                self.0.insert(range.end(), (found.end(), guest));
            }
        }
    }
}

/// What is known of one file.
#[derive(Debug, Default)]
struct SlotFacts {
    metadata: Intervals,
    owners: Owners,
}

/// The verifier of one image.
#[derive(Debug)]
pub(crate) struct Verifier {
    slots: Vec<SlotFacts>,
    unit: u64,
    cluster: u64,
    size: u64,
}

fn bad(message: String) -> Fault {
    Fault {
        kind: FaultKind::BadExtent,
        message,
    }
}

/// Is this geometry one that the host can serve?
pub(crate) fn geometry(g: &Geometry) -> Result<(), Fault> {
    let power = |n: u32| n.is_power_of_two() && (512..=(2 << 20)).contains(&n);
    let optional = |n: u32| n == 0 || (n.is_power_of_two() && n >= g.unit);
    if g.size > ByteRange::END_MAX - (4 << 20) {
        return Err(bad(format!("the size {} is too large", g.size)));
    }
    if !power(g.unit) || !g.cluster_size.is_power_of_two() || g.cluster_size < g.unit {
        return Err(bad(format!(
            "unit {} and cluster size {} are not powers of two from 512 to 2 MiB",
            g.unit, g.cluster_size
        )));
    }
    if !optional(g.zero_granularity) || !optional(g.discard_granularity) {
        return Err(bad(
            "a zero or discard granularity is no power of two".to_owned()
        ));
    }
    Ok(())
}

/// Are these children ones that the host can grant?
pub(crate) fn children(list: &[Child]) -> Result<(), Fault> {
    if list.len() > CHILDREN_MAX {
        return Err(bad(format!(
            "{} children, at most {CHILDREN_MAX} are possible",
            list.len()
        )));
    }
    Ok(())
}

impl Verifier {
    /// For `slots` files and a verified geometry.
    pub(crate) fn new(slots: usize, g: &Geometry) -> Self {
        Self {
            slots: (0..slots).map(|_| SlotFacts::default()).collect(),
            unit: u64::from(g.unit),
            cluster: u64::from(g.cluster_size),
            size: g.size,
        }
    }

    /// The image has another length now.
    pub(crate) fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// A plugin writes metadata here.
    pub(crate) fn metadata(&mut self, slot: u32, range: ByteRange) -> Result<(), Fault> {
        let facts = self.slot(slot)?;
        if let Some((at, guest)) = facts.owners.overlapping(range) {
            return Err(bad(format!(
                "metadata written at {range:?} of slot {slot} overlaps guest data at {at:?} \
                 (guest offset {guest:#x})"
            )));
        }
        facts.metadata.add(range);
        Ok(())
    }

    /// The range holds nothing any more.
    pub(crate) fn released(&mut self, slot: u32, range: ByteRange) {
        if let Some(facts) = self.slots.get_mut(slot as usize) {
            facts.metadata.remove(range);
            facts.owners.remove(range);
        }
    }

    /// The extent map forgot in-place extents at this file range.
    pub(crate) fn disown(&mut self, slot: u32, range: ByteRange) {
        if let Some(facts) = self.slots.get_mut(slot as usize) {
            facts.owners.remove(range);
        }
    }

    /// The extent map evicted everything of this guest range.
    pub(crate) fn evict(&mut self, guest: ByteRange) {
        for facts in &mut self.slots {
            let gone: Vec<ByteRange> = facts
                .owners
                .0
                .iter()
                .filter_map(|(start, (end, owner))| {
                    let mapped = ByteRange::between(*owner, owner + (end - start));
                    let part = mapped.intersect(guest)?;
                    let at = start + (part.offset() - owner);
                    ByteRange::new(at, part.len())
                })
                .collect();
            for range in gone {
                facts.owners.remove(range);
            }
        }
    }

    fn slot(&mut self, slot: u32) -> Result<&mut SlotFacts, Fault> {
        let count = self.slots.len();
        self.slots
            .get_mut(slot as usize)
            .ok_or_else(|| bad(format!("slot {slot} was not granted, there are {count}")))
    }

    /// Check an answer about `asked`: contiguous, aligned, covering its first
    /// unit, inside the files of `lens` bytes. In-place extents become owned.
    pub(crate) fn extents(
        &mut self,
        asked: ByteRange,
        extents: &[Extent],
        lens: &dyn Fn(u32) -> u64,
    ) -> Result<(), Fault> {
        let Some(first) = extents.first() else {
            return Err(bad(format!("no extent for {asked:?}")));
        };
        if first.range.offset() > asked.offset() {
            return Err(bad(format!(
                "the answer for {asked:?} starts at {:?}",
                first.range
            )));
        }
        let mut at = first.range.offset();
        for extent in extents {
            if extent.range.offset() != at || extent.range.is_empty() {
                return Err(bad(format!(
                    "extent {:?} does not follow {at:#x}",
                    extent.range
                )));
            }
            at = extent.range.end();
            let end_aligned = at.is_multiple_of(self.unit) || at == self.size;
            if !extent.range.offset().is_multiple_of(self.unit) || !end_aligned {
                return Err(bad(format!(
                    "extent {:?} is not aligned to {} bytes",
                    extent.range, self.unit
                )));
            }
            self.location(extent, lens)?;
        }
        if at <= asked.offset() {
            return Err(bad(format!("the answer for {asked:?} ends at {at:#x}")));
        }
        Ok(())
    }

    fn location(&mut self, extent: &Extent, lens: &dyn Fn(u32) -> u64) -> Result<(), Fault> {
        match extent.at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => {
                let Some(file) = ByteRange::new(offset, extent.range.len()) else {
                    return Err(bad(format!("file offset {offset:#x} overflows")));
                };
                self.inside(slot, file, lens(slot))?;
                if in_place {
                    self.own(slot, file, extent.range.offset())?;
                }
                Ok(())
            }
            Location::Coded(c) => {
                let Some(file) = ByteRange::new(c.offset, 1) else {
                    return Err(bad(format!("file offset {:#x} overflows", c.offset)));
                };
                self.inside(c.slot, file, lens(c.slot))?;
                let unit = ByteRange::new(c.unit_offset, u64::from(c.unit_len));
                if c.unit_len > UNIT_LEN_MAX
                    || c.stored_len > STORED_LEN_MAX
                    || c.unit_offset >= 1 << 56
                    || !unit.is_some_and(|u| u.contains(extent.range))
                {
                    return Err(bad(format!("compressed unit {c:?} cannot hold {extent:?}")));
                }
                Ok(())
            }
            Location::Special(id) if id >= 1 << 56 => {
                Err(bad(format!("special id {id:#x} is larger than 56 bits")))
            }
            Location::Backing(offset) => match ByteRange::new(offset, extent.range.len()) {
                Some(r) if r.end() < 1 << 56 => Ok(()),
                _ => Err(bad(format!("backing offset {offset:#x} overflows"))),
            },
            Location::Special(_) | Location::Zero | Location::Hole => Ok(()),
        }
    }

    /// An extent must begin inside the file; a cluster at its end may be partly
    /// written only.
    fn inside(&mut self, slot: u32, file: ByteRange, len: u64) -> Result<(), Fault> {
        let reach = len
            .next_multiple_of(self.cluster)
            .saturating_add(self.cluster);
        self.slot(slot)?;
        if file.end() > reach || file.offset() >= len.next_multiple_of(self.cluster).max(1) {
            return Err(bad(format!(
                "{file:?} is outside of slot {slot}, which has {len} bytes"
            )));
        }
        if file.end() >= 1 << 56 {
            return Err(bad(format!(
                "file offset {:#x} is larger than 56 bits",
                file.end()
            )));
        }
        Ok(())
    }

    fn own(&mut self, slot: u32, file: ByteRange, guest: u64) -> Result<(), Fault> {
        let facts = self.slot(slot)?;
        if let Some(at) = facts.metadata.overlapping(file) {
            return Err(bad(format!(
                "guest data at {file:?} of slot {slot} overlaps metadata at {at:?}"
            )));
        }
        if let Some(owner) = facts.owners.conflict(file, guest) {
            return Err(bad(format!(
                "{file:?} of slot {slot} is mapped for guest offset {guest:#x} and for {owner:#x}"
            )));
        }
        facts.owners.add(file, guest);
        Ok(())
    }

    /// Check space offered for a write; it becomes owned by its guest range.
    pub(crate) fn placement(&mut self, p: &Placement) -> Result<(), Fault> {
        let aligned = p.covers.offset().is_multiple_of(self.unit)
            && (p.covers.end().is_multiple_of(self.unit) || p.covers.end() == self.size);
        let file = ByteRange::new(p.offset, p.covers.len()).filter(|f| f.end() < 1 << 56);
        let Some(file) = file.filter(|_| aligned && !p.covers.is_empty()) else {
            return Err(bad(format!("placement {p:?} is not aligned or overflows")));
        };
        self.own(p.slot, file, p.covers.offset())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        size: 1 << 20,
        unit: 4096,
        cluster_size: 65536,
        zero_granularity: 0,
        discard_granularity: 0,
    };

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    fn raw(guest: u64, len: u64, offset: u64, in_place: bool) -> Extent {
        Extent {
            range: range(guest, len),
            at: Location::Raw {
                slot: 0,
                offset,
                in_place,
            },
        }
    }

    fn check(v: &mut Verifier, extents: &[Extent]) -> Result<(), Fault> {
        v.extents(range(0, 4096), extents, &|_| 1 << 20)
    }

    #[test]
    fn honest_answers_pass_again_and_again() {
        let mut v = Verifier::new(1, &GEOMETRY);
        let e = [raw(0, 65536, 65536, true), raw(65536, 65536, 131_072, true)];
        check(&mut v, &e).unwrap();
        check(&mut v, &e).unwrap();
        check(&mut v, &e[..1]).unwrap();
    }

    #[test]
    fn two_guest_ranges_on_the_same_bytes_are_a_lie() {
        let mut v = Verifier::new(1, &GEOMETRY);
        check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
        let lie = [raw(0, 65536, 65536, true), raw(65536, 4096, 69632, true)];
        let fault = check(&mut v, &lie).unwrap_err();
        assert!(
            fault.message.contains("is mapped for guest offset 0x10000"),
            "{fault}"
        );
        // Reading the same bytes twice is allowed: snapshots share clusters.
        check(&mut v, &[raw(0, 4096, 65536, false)]).unwrap();
    }

    #[test]
    fn data_over_metadata_is_a_lie_both_ways() {
        let mut v = Verifier::new(1, &GEOMETRY);
        v.metadata(0, range(65536, 512)).unwrap();
        assert!(check(&mut v, &[raw(0, 65536, 65536, true)]).is_err());
        v.released(0, range(65536, 65536));
        check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
        assert!(v.metadata(0, range(65536 + 512, 512)).is_err());
    }

    #[test]
    fn gaps_misalignment_and_ends_are_checked() {
        let mut v = Verifier::new(1, &GEOMETRY);
        assert!(check(&mut v, &[]).is_err());
        assert!(check(&mut v, &[raw(4096, 4096, 0, false)]).is_err());
        assert!(check(&mut v, &[raw(0, 4096, 0, false), raw(8192, 4096, 0, false)]).is_err());
        assert!(check(&mut v, &[raw(0, 100, 0, false)]).is_err());
        assert!(check(&mut v, &[raw(0, 4096, 2 << 20, false)]).is_err());
        let other = Extent {
            range: range(0, 4096),
            at: Location::Raw {
                slot: 3,
                offset: 0,
                in_place: false,
            },
        };
        assert!(check(&mut v, &[other]).is_err());
    }

    #[test]
    fn evicted_and_disowned_ranges_can_be_owned_again() {
        let mut v = Verifier::new(1, &GEOMETRY);
        check(&mut v, &[raw(0, 131_072, 65536, true)]).unwrap();
        v.evict(range(65536, 65536));
        check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
        let moved = [
            raw(0, 65536, 65536, true),
            raw(65536, 4096, 131_072 + 8192, true),
        ];
        check(&mut v, &moved).unwrap();
        v.disown(0, range(65536, 65536));
        check(&mut v, &[raw(0, 4096, 4096, true)]).unwrap();
    }

    #[test]
    fn intervals_merge_and_split() {
        let mut i = Intervals::default();
        i.add(range(0, 10));
        i.add(range(20, 10));
        i.add(range(10, 10));
        assert_eq!(i.0.len(), 1);
        i.remove(range(5, 10));
        assert_eq!(i.overlapping(range(5, 10)), None);
        assert_eq!(i.overlapping(range(0, 6)), Some(range(0, 5)));
        assert_eq!(i.overlapping(range(14, 2)), Some(range(15, 15)));
    }
}
