//! A set of byte ranges: what is metadata, what waits to be written, what is in
//! quarantine.

use crate::ByteRange;
use std::collections::BTreeMap;

/// Disjoint, joined ranges.
#[derive(Clone, Debug, Default)]
pub(super) struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    pub(super) fn insert(&mut self, range: ByteRange) {
        if range.len == 0 {
            return;
        }
        let (mut start, mut end) = (range.offset, range.end());
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=end)
            .rev()
            .map(|(s, e)| (*s, *e))
            .take_while(|r| r.1 >= start)
            .collect();
        for (s, e) in touching {
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    pub(super) fn remove(&mut self, range: ByteRange) {
        for hit in self.overlaps(range) {
            let Some((&start, &end)) = self.0.range(..=hit.offset).next_back() else {
                continue;
            };
            self.0.remove(&start);
            if start < hit.offset {
                self.0.insert(start, hit.offset);
            }
            if hit.end() < end {
                self.0.insert(hit.end(), end);
            }
        }
    }

    /// The parts of `range` that are in the set.
    pub(super) fn overlaps(&self, range: ByteRange) -> Vec<ByteRange> {
        let before = self
            .0
            .range(..range.end())
            .rev()
            .take_while(|(_, e)| **e > range.offset);
        let before = before.filter(|_| range.len > 0);
        let mut hits: Vec<ByteRange> = before
            .map(|(s, e)| {
                let start = (*s).max(range.offset);
                ByteRange::new(start, (*e).min(range.end()) - start)
            })
            .collect();
        hits.reverse();
        hits
    }

    pub(super) fn touches(&self, range: ByteRange) -> bool {
        !self.overlaps(range).is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.0.iter().map(|(s, e)| ByteRange::new(*s, e - s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn behaves_like_a_set_of_bytes() {
        let mut random = Random::new(2);
        let (mut set, mut model) = (RangeSet::default(), [false; 200]);
        for _ in 0..5000 {
            let at = random.below(180);
            let range = ByteRange::new(at, random.below(20));
            let bytes = range.offset as usize..range.end() as usize;
            let hits: u64 = set.overlaps(range).iter().map(|r| r.len).sum();
            assert_eq!(
                hits,
                model[bytes.clone()].iter().filter(|b| **b).count() as u64
            );
            if random.one_in(2) {
                set.insert(range);
                model[bytes].fill(true);
            } else {
                set.remove(range);
                model[bytes].fill(false);
            }
            let runs = model.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
            assert_eq!(set.iter().count(), runs);
        }
    }
}
