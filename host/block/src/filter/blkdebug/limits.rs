//! How a `blkdebug` node cuts requests up, as QEMU documents its options.
//!
//! Pure. Bytes are passed on unpadded; rules see the sectors that a padded request would touch.

use crate::ByteRange;

/// The limits; 0: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Requests are padded to multiples of this; a power of two.
    pub align: u64,
    /// Longest read or write.
    pub max_transfer: u64,
    /// Zeroes of which a part is not a multiple of this are written.
    pub opt_write_zero: u64,
    /// Longest request to write zeroes.
    pub max_write_zero: u64,
    /// Parts of discards that are not a multiple of this are dropped.
    pub opt_discard: u64,
    /// Longest discard.
    pub max_discard: u64,
}

impl Limits {
    pub(super) const fn are_none(&self) -> bool {
        self.align <= 1
            && self.max_transfer == 0
            && self.opt_write_zero <= 1
            && self.max_write_zero == 0
            && self.opt_discard <= 1
            && self.max_discard == 0
    }

    fn unit(&self) -> u64 {
        self.align.max(1)
    }

    /// What a padded request touches.
    pub(super) fn padded(&self, range: ByteRange) -> ByteRange {
        range.align_out(self.unit())
    }

    /// Are head and tail of the range to be padded?
    pub(super) fn cuts(&self, range: ByteRange) -> (bool, bool) {
        let unit = self.unit();
        let head = !range.offset().is_multiple_of(unit);
        let tail = !range.end().is_multiple_of(unit);
        (head, tail)
    }

    /// A read or write in pieces.
    pub(super) fn transfers(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        pieces(range, self.max_transfer)
    }

    /// A discard in pieces, without the edges that are too small to discard.
    pub(super) fn discards(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let unit = self.opt_discard.max(self.unit());
        let start = range.offset().next_multiple_of(unit);
        let end = range.end() / unit * unit;
        pieces(ByteRange::between(start, end), self.max_discard)
    }

    /// Can zeroes be written without bytes, or are there edges?
    pub(super) fn zeroes_fit(&self, range: ByteRange) -> bool {
        let unit = self.opt_write_zero.max(self.unit());
        range.offset().is_multiple_of(unit) && range.end().is_multiple_of(unit)
    }

    /// A request to write zeroes in pieces.
    pub(super) fn zeroes(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        pieces(range, self.max_write_zero)
    }
}

/// The range in pieces of at most `max`, 0: in one piece. Nothing of an empty range.
fn pieces(range: ByteRange, max: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = range.offset();
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        let end = match max {
            0 => range.end(),
            max => range.end().min(at.saturating_add(max)),
        };
        let piece = ByteRange::between(at, end);
        at = end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_and_edges_are_dropped() {
        let limits = Limits {
            align: 512,
            max_transfer: 1024,
            opt_write_zero: 4096,
            opt_discard: 4096,
            max_discard: 8192,
            ..Limits::default()
        };
        let range = ByteRange::between(100, 2300);
        let parts: Vec<_> = limits.transfers(range).map(|p| p.len()).collect();
        assert_eq!(parts, [1024, 1024, 152]);
        assert_eq!(limits.padded(range), ByteRange::between(0, 2560));
        assert_eq!(limits.cuts(ByteRange::between(512, 600)), (false, true));
        let parts: Vec<_> = limits.discards(ByteRange::between(1, 20480)).collect();
        let want = [
            ByteRange::between(4096, 12288),
            ByteRange::between(12288, 20480),
        ];
        assert_eq!(parts, want);
        assert_eq!(limits.discards(range).count(), 0);
        assert!(!limits.zeroes_fit(ByteRange::between(0, 512)));
        assert!(limits.zeroes_fit(ByteRange::between(4096, 8192)));
        assert!(!limits.are_none());
        assert!(Limits::default().are_none());
    }
}
