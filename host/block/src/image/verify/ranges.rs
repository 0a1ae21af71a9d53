//! Sets of byte ranges, and ranges with an owner.

use std::collections::BTreeMap;

use crate::ByteRange;

/// Intervals by start, merged where neighbours touch.
#[derive(Debug, Default)]
pub(crate) struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    pub(super) fn overlapping(&self, range: ByteRange) -> Option<ByteRange> {
        let (start, end) = self.0.range(..range.end()).next_back()?;
        let found = ByteRange::between(*start, *end);
        found.overlaps(range).then_some(found)
    }

    /// How many there are: what they cost.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.0.iter().map(|(s, e)| ByteRange::between(*s, *e))
    }

    /// The parts of `range` that are not in the set.
    pub(crate) fn gaps(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut gaps = Vec::new();
        let mut at = range.offset();
        while let Some(found) = self.first_from(at).filter(|it| it.offset() < range.end()) {
            if at < found.offset() {
                gaps.push(ByteRange::between(at, found.offset()));
            }
            at = found.end();
        }
        if at < range.end() {
            gaps.push(ByteRange::between(at, range.end()));
        }
        gaps
    }

    /// The first interval with bytes at or after `at`.
    fn first_from(&self, at: u64) -> Option<ByteRange> {
        let before = self
            .0
            .range(..=at)
            .next_back()
            .filter(|(_, end)| **end > at);
        let found = before.or_else(|| self.0.range(at..).next());
        found.map(|(start, end)| ByteRange::between(*start, *end))
    }

    pub(crate) fn add(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
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

    pub(crate) fn remove(&mut self, range: ByteRange) {
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
pub(super) struct Owners(BTreeMap<u64, (u64, u64)>);

impl Owners {
    pub(super) fn overlapping(&self, range: ByteRange) -> Option<(ByteRange, u64)> {
        let (start, (end, guest)) = self.0.range(..range.end()).next_back()?;
        let found = ByteRange::between(*start, *end);
        found.overlaps(range).then_some((found, *guest))
    }

    /// The guest offset that owns a byte of `range` and is not `guest`'s.
    pub(super) fn conflict(&self, range: ByteRange, guest: u64) -> Option<u64> {
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

    pub(super) fn add(&mut self, range: ByteRange, guest: u64) {
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

    pub(super) fn remove(&mut self, range: ByteRange) {
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

    /// Forget what `guest` owns; looks at all.
    pub(super) fn evict(&mut self, guest: ByteRange) {
        let gone: Vec<ByteRange> = self
            .0
            .iter()
            .filter_map(|(start, (end, owner))| {
                let mapped = ByteRange::between(*owner, owner + (end - start));
                let part = mapped.intersect(guest)?;
                ByteRange::new(start + (part.offset() - owner), part.len())
            })
            .collect();
        for range in gone {
            self.remove(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
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

    #[test]
    fn gaps_are_what_is_not_in_the_set() {
        let mut i = Intervals::default();
        assert_eq!(i.gaps(range(3, 4)), [range(3, 4)]);
        i.add(range(10, 10));
        i.add(range(30, 10));
        assert_eq!(i.gaps(range(10, 10)), []);
        assert_eq!(i.gaps(range(12, 20)), [range(20, 10)]);
        assert_eq!(
            i.gaps(range(0, 50)),
            [range(0, 10), range(20, 10), range(40, 10)]
        );
        assert_eq!(i.gaps(range(39, 2)), [range(40, 1)]);
    }
}
