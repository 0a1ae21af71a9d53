//! `ByteRange`: the only way offsets and lengths travel together.

use std::fmt;

/// `len` bytes from `offset`. Invariant: `offset + len <= i64::MAX`, so that
/// no sum of the two overflows and every file offset fits `off_t`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// The largest end that a range may have.
    pub const END_MAX: u64 = i64::MAX as u64;

    /// `None` when the end would pass [`ByteRange::END_MAX`].
    #[must_use]
    pub const fn new(offset: u64, len: u64) -> Option<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= Self::END_MAX => Some(Self { offset, len }),
            _ => None,
        }
    }

    /// From `start` to (not including) `end`; empty if `end < start`.
    #[must_use]
    pub const fn between(start: u64, end: u64) -> Self {
        let end = if end > Self::END_MAX {
            Self::END_MAX
        } else {
            end
        };
        let start = if start > end { end } else { start };
        Self {
            offset: start,
            len: end - start,
        }
    }

    /// First byte.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// No bytes at all.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// What both have in common, if anything.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::between(start, end))
    }

    /// Do they share a byte?
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end() && self.len > 0 && other.len > 0
    }

    /// Is `other` wholly inside?
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// Widened to multiples of `unit` (a power of two).
    #[must_use]
    pub const fn align_out(self, unit: u64) -> Self {
        let start = self.offset & !(unit - 1);
        let end = match self.end().checked_next_multiple_of(unit) {
            Some(end) => end,
            None => Self::END_MAX,
        };
        Self::between(start, end)
    }

    /// Narrowed to multiples of `unit` (a power of two); may become empty, and
    /// then lies anywhere.
    #[must_use]
    pub const fn align_in(self, unit: u64) -> Self {
        let start = match self.offset.checked_next_multiple_of(unit) {
            Some(start) => start,
            None => Self::END_MAX,
        };
        Self::between(start, self.end() & !(unit - 1))
    }

    /// Cut wherever a multiple of `unit` (a power of two) lies inside.
    pub fn cut_at(self, unit: u64) -> impl Iterator<Item = Self> {
        let mut at = self.offset;
        std::iter::from_fn(move || {
            let next = (at & !(unit - 1)).saturating_add(unit).min(self.end());
            let piece = (at < self.end()).then(|| Self::between(at, next));
            at = next;
            piece
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_never_overflows() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(ByteRange::END_MAX, 1).is_none());
        assert!(ByteRange::new(ByteRange::END_MAX, 0).is_some());
    }

    #[test]
    fn alignment_goes_both_ways() {
        let r = ByteRange::between(100, 1500);
        assert_eq!(r.align_out(512), ByteRange::between(0, 1536));
        assert_eq!(r.align_in(512), ByteRange::between(512, 1024));
        assert!(ByteRange::between(1, 511).align_in(512).is_empty());
    }

    #[test]
    fn cutting_leaves_nothing_out() {
        let cut = |start, end| -> Vec<_> {
            let pieces = ByteRange::between(start, end).cut_at(512);
            pieces.map(|r| (r.offset(), r.end())).collect()
        };
        assert_eq!(cut(100, 1500), [(100, 512), (512, 1024), (1024, 1500)]);
        assert_eq!(cut(512, 1024), [(512, 1024)]);
        assert_eq!(cut(7, 8), [(7, 8)]);
        assert_eq!(cut(7, 7), []);
        assert_eq!(cut(u64::MAX, u64::MAX), []);
        let far = ByteRange::END_MAX;
        assert_eq!(cut(far - 1, far), [(far - 1, far)]);
    }

    #[test]
    fn intersection() {
        let a = ByteRange::between(0, 10);
        assert_eq!(
            a.intersect(ByteRange::between(5, 20)),
            Some(ByteRange::between(5, 10))
        );
        assert_eq!(a.intersect(ByteRange::between(10, 20)), None);
        assert!(!a.overlaps(ByteRange::between(10, 20)));
    }
}
