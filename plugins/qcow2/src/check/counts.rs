//! References counted so far, for one window of host clusters: two bytes each,
//! and a map for the few clusters that have very many.

use std::collections::BTreeMap;

use crate::refcount;

/// Clusters whose references are counted at a time: 32 MiB of memory, 1 TiB in
/// clusters of 64 KiB. A multiple of what any refcount block holds.
pub(super) const WINDOW_CLUSTERS: u64 = 16 << 20;

/// A count in the upper 13 bits, kinds in the lower 3.
const KIND_BITS: u32 = 3;
const SMALL_MAX: u64 = (1 << (16 - KIND_BITS)) - 1;

/// What a cluster is used for; one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data = 1,
    L2Table = 2,
    Other = 4,
}

/// The uses of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kinds(u16);

impl Kinds {
    /// Metadata lies on top of guest data, or of other metadata.
    pub(super) const fn mixed(self) -> bool {
        self.0.count_ones() > 1
    }

    /// An L2 table, which shares its cluster with something else.
    pub(super) const fn shared_table(self) -> bool {
        self.0 & Kind::L2Table as u16 != 0 && self.mixed()
    }
}

#[derive(Debug)]
pub(super) struct Counts {
    first: u64,
    small: Vec<u16>,
    /// Counts of `SMALL_MAX` and more.
    large: BTreeMap<u64, u64>,
    /// What an entry of the image can hold.
    max: u64,
}

impl Counts {
    /// Clusters from `first`, none from `end`, and never more than a window.
    pub(super) fn new(first: u64, end: u64, refcount_order: u32) -> Self {
        let len = end.saturating_sub(first).min(WINDOW_CLUSTERS);
        Self {
            first,
            small: vec![0; usize::try_from(len).unwrap_or(0)],
            large: BTreeMap::new(),
            max: refcount::max(refcount_order),
        }
    }

    pub(super) const fn first(&self) -> u64 {
        self.first
    }

    /// One past the last cluster of the window.
    pub(super) fn end(&self) -> u64 {
        self.first.saturating_add(self.small.len() as u64)
    }

    fn index(&self, cluster: u64) -> Option<usize> {
        usize::try_from(cluster.checked_sub(self.first)?).ok()
    }

    /// One more reference; outside the window nothing happens. `false`: there
    /// are more than a refcount entry can hold, and this one is not counted.
    pub(super) fn add(&mut self, cluster: u64, kind: Kind) -> bool {
        let Some(at) = self.index(cluster) else {
            return true;
        };
        let Some(small) = self.small.get_mut(at) else {
            return true;
        };
        *small |= kind as u16;
        let count = match u64::from(*small >> KIND_BITS) {
            SMALL_MAX => self.large.entry(cluster).or_insert(SMALL_MAX),
            count if count >= self.max => return false,
            _ => {
                *small += 1 << KIND_BITS;
                return true;
            }
        };
        if *count >= self.max {
            return false;
        }
        *count += 1;
        true
    }

    pub(super) fn get(&self, cluster: u64) -> u64 {
        let small = self
            .index(cluster)
            .and_then(|at| self.small.get(at))
            .copied()
            .unwrap_or(0);
        match u64::from(small >> KIND_BITS) {
            SMALL_MAX => self.large.get(&cluster).copied().unwrap_or(SMALL_MAX),
            count => count,
        }
    }

    pub(super) fn kinds(&self, cluster: u64) -> Kinds {
        let small = self
            .index(cluster)
            .and_then(|at| self.small.get(at))
            .copied()
            .unwrap_or(0);
        Kinds(small & ((1 << KIND_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_beyond_the_small_ones() {
        let mut counts = Counts::new(100, 110, 4);
        for _ in 0..70_000 {
            counts.add(101, Kind::Data);
        }
        assert_eq!(counts.get(101), 65_535);
        assert!(!counts.add(101, Kind::Data));
        assert!(counts.add(99, Kind::Data) && counts.add(110, Kind::Data));
        assert_eq!(
            (counts.get(99), counts.get(100), counts.get(110)),
            (0, 0, 0)
        );
        let mut wide = Counts::new(0, 1, 6);
        for _ in 0..70_000 {
            assert!(wide.add(0, Kind::Other));
        }
        assert_eq!(wide.get(0), 70_000);
    }

    #[test]
    fn narrow_counts_say_when_they_are_full() {
        let mut counts = Counts::new(0, 4, 0);
        assert!(counts.add(2, Kind::Data));
        assert!(!counts.add(2, Kind::L2Table));
        assert_eq!(counts.get(2), 1);
        assert!(counts.kinds(2).shared_table());
        assert!(!counts.kinds(1).mixed());
    }
}
