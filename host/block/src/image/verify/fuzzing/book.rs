//! The verifier's rules once more, in the plainest form: a list of who holds which bytes, looked
//! through from end to end.

use crate::ByteRange;
use crate::format::{Extent, Geometry, Location, Placement, TxnOp, WriteIntent, WriteKind};

/// What holds a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Metadata,
    /// Freed, not given back yet.
    Freed,
    /// In place for guest bytes; this minus the file offset stays the same along the range.
    Guest(u64),
}

/// File bytes in place for the guest bytes from an offset on.
pub(super) type Claim = (u32, ByteRange, u64);

/// What the host should know.
pub(super) struct Book {
    slots: u32,
    unit: u64,
    cluster: u64,
    pub(super) size: u64,
    held: Vec<(u32, ByteRange, Holder)>,
}

impl Book {
    pub(super) fn new(slots: u32, geometry: &Geometry) -> Self {
        Self {
            slots,
            unit: u64::from(geometry.unit),
            cluster: u64::from(geometry.cluster_size),
            size: geometry.size,
            held: Vec::new(),
        }
    }

    /// A geometry that the host serves leaves room for its own arithmetic.
    pub(super) fn assert_served(g: &Geometry) {
        assert!(g.unit.is_power_of_two() && g.unit >= 512 && g.unit <= 2 << 20);
        assert!(g.cluster_size.is_power_of_two() && g.cluster_size <= 256 << 20);
        assert!(g.cluster_size >= g.unit && g.size < 1 << 63);
    }

    // === what happens ===

    /// Cut `range` out of what `is` holds there.
    fn cut(&mut self, slot: u32, range: ByteRange, is: impl Fn(Holder) -> bool) {
        let mut left = Vec::new();
        for (s, held, holder) in self.held.drain(..) {
            if s != slot || !is(holder) || !held.overlaps(range) {
                left.push((s, held, holder));
                continue;
            }
            if held.offset() < range.offset() {
                left.push((s, ByteRange::between(held.offset(), range.offset()), holder));
            }
            if range.end() < held.end() {
                let skipped = range.end() - held.offset();
                let holder = match holder {
                    Holder::Guest(guest) => Holder::Guest(guest + skipped),
                    other => other,
                };
                left.push((s, ByteRange::between(range.end(), held.end()), holder));
            }
        }
        self.held = left;
    }

    fn add(&mut self, slot: u32, range: ByteRange, holder: Holder) {
        if slot < self.slots && !range.is_empty() {
            self.held.push((slot, range, holder));
        }
    }

    pub(super) fn freed(&mut self, slot: u32, range: ByteRange) {
        self.add(slot, range, Holder::Freed);
    }

    pub(super) fn released(&mut self, slot: u32, range: ByteRange) {
        self.cut(slot, range, |_| true);
    }

    pub(super) fn disown(&mut self, slot: u32, range: ByteRange) {
        self.cut(slot, range, |holder| matches!(holder, Holder::Guest(_)));
    }

    pub(super) fn evict(&mut self, guest: ByteRange) {
        for (slot, file, holder) in self.held.clone() {
            let Holder::Guest(from) = holder else {
                continue;
            };
            if let Some(part) = ByteRange::between(from, from + file.len()).intersect(guest) {
                let start = file.offset() + (part.offset() - from);
                self.disown(slot, ByteRange::between(start, start + part.len()));
            }
        }
    }

    pub(super) fn adopt_queued(&mut self, txn: &[TxnOp]) {
        for (slot, range) in written(txn) {
            self.add(slot, range, Holder::Metadata);
        }
    }

    pub(super) fn adopt_claims(&mut self, claims: &[Claim]) {
        for (slot, file, guest) in claims {
            self.disown(*slot, *file);
            self.add(*slot, *file, Holder::Guest(*guest));
        }
    }

    // === what was believed ===

    /// Metadata of granted files, on no guest data, and no more than fits in memory.
    pub(super) fn assert_queued(&self, txn: &[TxnOp]) {
        for (slot, range) in written(txn) {
            assert!(slot < self.slots, "{txn:?} writes a file it was not given");
            let on_data = self.held.iter().find(|(s, held, holder)| {
                *s == slot && held.overlaps(range) && matches!(holder, Holder::Guest(_))
            });
            assert_eq!(on_data, None, "{txn:?} overwrites guest data");
        }
    }

    /// These bytes are nobody's but, perhaps, the same guest bytes'.
    fn assert_free(&self, (slot, file, guest): Claim, txn: &[TxnOp]) {
        assert!(slot < self.slots, "slot {slot} was not granted");
        for (_, held, holder) in self.held.iter().filter(|(s, ..)| *s == slot) {
            let same = match holder {
                Holder::Guest(owner) => is_same((*held, *owner), (file, guest)),
                _ => false,
            };
            assert!(
                !held.overlaps(file) || same,
                "{file:?} for guest {guest:#x} lies on {holder:?} at {held:?}"
            );
        }
        for (s, range) in written(txn) {
            let on_metadata = s == slot && range.overlaps(file);
            assert!(!on_metadata, "{file:?} lies on metadata of the same call");
        }
    }

    /// No two of them share a byte, unless it is one guest byte's.
    fn assert_apart(claims: &[Claim]) {
        for (i, a) in claims.iter().enumerate() {
            for b in &claims[..i] {
                let shared = a.0 == b.0 && a.1.overlaps(b.1);
                assert!(!shared || is_same((a.1, a.2), (b.1, b.2)), "{a:?} on {b:?}");
            }
        }
    }

    /// An answer about `asked`; what of it is in place near enough to be remembered.
    pub(super) fn assert_extents(
        &self,
        asked: ByteRange,
        extents: &[Extent],
        near: ByteRange,
        txn: &[TxnOp],
        file_len: u64,
    ) -> Vec<Claim> {
        let whole = |at: u64| at.is_multiple_of(self.unit);
        assert!(extents[0].range.offset() <= asked.offset());
        assert!(extents[extents.len() - 1].range.end() > asked.offset());
        for pair in extents.windows(2) {
            assert_eq!(pair[0].range.end(), pair[1].range.offset(), "a gap");
        }
        let mut claims = Vec::new();
        for extent in extents {
            let range = extent.range;
            assert!(!range.is_empty() && whole(range.offset()), "{extent:?}");
            assert!(whole(range.end()) || range.end() == self.size, "{extent:?}");
            assert!(range.end() <= self.size, "{extent:?} is past {}", self.size);
            let (offset, len) = match extent.at {
                Location::Raw { offset, .. } => (offset, range.len()),
                Location::Coded(c) => {
                    let unit = ByteRange::new(c.unit_offset, u64::from(c.unit_len));
                    assert!(unit.is_some_and(|unit| unit.contains(range)));
                    assert!(c.unit_len <= 2 << 20 && c.stored_len <= 3 << 20);
                    (c.offset, 1)
                }
                Location::Backing(at) => {
                    assert!(at < 1 << 56 && range.len() < 1 << 56);
                    continue;
                }
                Location::Special(id) => {
                    assert!(id < 1 << 56);
                    continue;
                }
                Location::Zero | Location::Hole => continue,
            };
            // Begins in the file, or in the cluster that its end cuts; ends a cluster later.
            let end = file_len.min(1 << 63).next_multiple_of(self.cluster);
            assert!(offset < end.max(1), "{extent:?} begins past {file_len}");
            assert!(offset + len <= end + self.cluster && offset + len < 1 << 56);
            if let Location::Raw { slot, in_place, .. } = extent.at {
                assert!(slot < self.slots, "{extent:?}");
                if let Some(part) = range.intersect(near).filter(|_| in_place) {
                    let at = offset + (part.offset() - range.offset());
                    let file = ByteRange::between(at, at + part.len());
                    self.assert_free((slot, file, part.offset()), txn);
                    claims.push((slot, file, part.offset()));
                }
            }
        }
        Self::assert_apart(&claims);
        claims
    }

    /// Space for `intents`; what of it is in place from now on.
    pub(super) fn assert_placements(
        &self,
        intents: &[WriteIntent],
        placements: &[Placement],
        txn: &[TxnOp],
        taken: u64,
    ) -> Vec<Claim> {
        let mut claims = Vec::new();
        let mut packed = Vec::new();
        for (i, p) in placements.iter().enumerate() {
            let again = placements[..i].iter().any(|q| q.token == p.token);
            assert!(p.token != taken && !again, "token {} twice", p.token);
            let intent = intents[p.intent as usize];
            let start = intent.range.offset() / self.cluster * self.cluster;
            let end = intent.range.end().next_multiple_of(self.cluster);
            assert!(start <= p.covers.offset() && p.covers.end() <= end);
            assert!(p.covers.overlaps(intent.range), "{p:?} for {intent:?}");
            let len = match intent.kind {
                WriteKind::Data => p.covers.len(),
                WriteKind::Compressed => u64::from(intent.stored_len),
            };
            let file = ByteRange::new(p.offset, len).filter(|file| file.end() < 1 << 56);
            let file = file.unwrap_or_else(|| panic!("{p:?} overflows"));
            match intent.kind {
                WriteKind::Data => {
                    let (from, to) = (p.covers.offset(), p.covers.end());
                    assert!(from.is_multiple_of(self.unit), "{p:?}");
                    assert!(to.is_multiple_of(self.unit) || to == self.size, "{p:?}");
                    let claim = (p.slot, file, from);
                    self.assert_free(claim, txn);
                    claims.push(claim);
                }
                WriteKind::Compressed => {
                    // Nobody's at all: no guest byte is in place there.
                    let claim = (p.slot, file, u64::MAX);
                    self.assert_free(claim, txn);
                    packed.push((p.slot, file));
                }
            }
        }
        Self::assert_apart(&claims);
        for (i, (slot, file)) in packed.iter().enumerate() {
            let others = packed[..i].iter().copied();
            let mut others = others.chain(claims.iter().map(|(s, range, _)| (*s, *range)));
            let shared = others.find(|(s, range)| s == slot && range.overlaps(*file));
            assert_eq!(shared, None, "compressed data at {file:?} is not alone");
        }
        claims
    }
}

/// Metadata that a call queues, by file.
fn written(txn: &[TxnOp]) -> impl Iterator<Item = (u32, ByteRange)> {
    txn.iter().filter_map(|op| match op {
        TxnOp::Write {
            slot, offset, data, ..
        } => Some((*slot, ByteRange::new(*offset, data.len() as u64)?)),
        TxnOp::Zero { slot, range, .. } => Some((*slot, *range)),
        _ => None,
    })
}

/// Do two mappings have the same guest byte at each file byte?
fn is_same(a: (ByteRange, u64), b: (ByteRange, u64)) -> bool {
    a.1.wrapping_sub(a.0.offset()) == b.1.wrapping_sub(b.0.offset())
}
