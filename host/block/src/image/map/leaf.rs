//! One leaf of the extent map: entries that readers look at while a writer may
//! give the leaf to another part of the image.
//!
//! Writers are serialised by the plugin lock. A leaf is never freed, only given
//! away, and its tag says to whom; a reader that sees the same tag before and
//! after saw entries of that part only (a sequence lock whose sequence is the
//! tag).
//!
//! A leaf whose units all follow one another, as in an image that was written in
//! order, says so beside its tag (`line`): a look-up then touches one cache line
//! of the leaf, always the same, instead of two.

use crate::sync::{AtomicU64, Ordering, fence};

use super::{LEAF_UNITS, follower};

/// Low bits of a tag: the leaf's index plus one. The largest image has 2^63
/// bytes in units of 512, so 2^44 leaves. The bits above count how often the
/// leaf was given away.
const INDEX_BITS: u32 = 45;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// A leaf.
#[repr(C, align(64))]
pub(crate) struct Leaf {
    tag: AtomicU64,
    /// The first entry, if every other follows from it; otherwise 0. Cleared
    /// before an entry changes, set after the last one did.
    line: AtomicU64,
    entries: [AtomicU64; LEAF_UNITS as usize],
}

impl Default for Leaf {
    fn default() -> Self {
        Self {
            tag: AtomicU64::new(0),
            line: AtomicU64::new(0),
            entries: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// A look at a leaf; what it saw counts only if it [`Reading::is_whole`].
pub(crate) struct Reading<'a> {
    leaf: &'a Leaf,
    tag: u64,
    line: u64,
}

impl Leaf {
    /// Whose it is. Plugin lock.
    pub(crate) fn index(&self) -> Option<u64> {
        (self.tag.load(Ordering::Relaxed) & INDEX_MASK).checked_sub(1)
    }

    /// Give it to another part of the image, empty. Plugin lock.
    pub(crate) fn become_index(&self, index: u64) {
        let turn = (self.tag.load(Ordering::Relaxed) >> INDEX_BITS).wrapping_add(1) << INDEX_BITS;
        self.tag.store(turn, Ordering::Relaxed);
        // Whoever sees one of the stores below sees the tag change too.
        fence(Ordering::Release);
        self.line.store(0, Ordering::Relaxed);
        for entry in &self.entries {
            entry.store(0, Ordering::Relaxed);
        }
        self.tag.store(turn | (index + 1), Ordering::Release);
    }

    /// Set the units from `first` to before `last`; the first gets `entry`, each
    /// further one what follows it. Plugin lock.
    pub(crate) fn fill(&self, first: usize, last: usize, entry: u64, unit: u64) {
        let line = self.line.load(Ordering::Relaxed);
        if line != 0 && follower(line, first, unit) == entry {
            return;
        }
        self.line.store(0, Ordering::Release);
        for at in first..last {
            let entry = follower(entry, at - first, unit);
            self.entries[at].store(entry, Ordering::Release);
        }
        // Ends at the first unit that does not follow: soon, or just once.
        let line = self.entries[0].load(Ordering::Relaxed);
        let mut entries = self.entries.iter().enumerate();
        if entries.all(|(at, e)| e.load(Ordering::Relaxed) == follower(line, at, unit)) {
            self.line.store(line, Ordering::Release);
        }
    }

    /// Forget the units from `first` to before `last` that lie in this leaf.
    /// Plugin lock.
    pub(crate) fn forget(&self, first: u64, last: u64) {
        let Some(index) = self.index() else { return };
        let base = index * LEAF_UNITS;
        let from = first.max(base);
        let to = last.min(base + LEAF_UNITS);
        if from < to {
            self.fill((from - base) as usize, (to - base) as usize, 0, 0);
        }
    }

    /// Is one word enough to answer for it?
    #[cfg(test)]
    pub(crate) fn is_in_line(&self) -> bool {
        self.line.load(Ordering::Relaxed) != 0
    }

    /// All entries. Plugin lock.
    pub(crate) fn entries(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().map(|e| e.load(Ordering::Relaxed))
    }

    /// Look at it, if it belongs to `index`.
    pub(crate) fn read(&self, index: u64) -> Option<Reading<'_>> {
        let tag = self.tag.load(Ordering::Acquire);
        (tag & INDEX_MASK == index + 1).then(|| Reading {
            leaf: self,
            tag,
            line: self.line.load(Ordering::Acquire),
        })
    }
}

impl Reading<'_> {
    pub(crate) fn entry(&self, at: usize, unit: u64) -> u64 {
        if self.line == 0 {
            self.leaf.entries[at].load(Ordering::Acquire)
        } else {
            follower(self.line, at, unit)
        }
    }

    /// Did the leaf stay what it was all the time?
    pub(crate) fn is_whole(&self) -> bool {
        fence(Ordering::Acquire);
        self.leaf.tag.load(Ordering::Relaxed) == self.tag
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn readers_never_see_entries_of_another_part() {
        // Each part's entries hold its own number only. The writer goes on until the reader has
        // looked often enough, however the two threads are scheduled.
        let leaf = Leaf::default();
        let enough = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                for turn in 0.. {
                    let part = turn % 3;
                    leaf.become_index(part);
                    leaf.fill(0, 8, part + 1, 0);
                    if enough.load(Ordering::Relaxed) {
                        return;
                    }
                    if turn % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let mut whole = 0;
            for part in (0..3).cycle() {
                let Some(reading) = leaf.read(part) else {
                    continue;
                };
                let seen: Vec<u64> = (0..8).map(|at| reading.entry(at, 0)).collect();
                if reading.is_whole() {
                    whole += 1;
                    if seen.iter().any(|e| *e != 0 && *e != part + 1) {
                        enough.store(true, Ordering::Relaxed);
                        panic!("part {part} shows {seen:?}");
                    }
                }
                if whole == 10_000 {
                    break;
                }
            }
            enough.store(true, Ordering::Relaxed);
        });
    }
}
