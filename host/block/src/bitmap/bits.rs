//! The bits of a dirty bitmap: one per granule, set by writers without a lock.
//!
//! Any thread sets and reads; nothing here waits. Invariant: a bit of a [`Bits`] is never reset.
//! To clear or to cut a bitmap is to give it other bits, so writers need no say in it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::ByteRange;

/// Words of a leaf: 4 KiB, which with granules of 64 KiB stand for 2 GiB.
const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = LEAF_WORDS as u64 * 64;

/// Granules of a bitmap: 2 PiB of 64 KiB, 16 TiB of 512 bytes. Its directory takes 16 MiB then,
/// and its leaves up to 4 GiB.
const GRANULES_MAX: u64 = 1 << 35;

/// Orders marks with exchanges of what is marked (`set.rs`), hence the strongest.
const ORDER: Ordering = Ordering::SeqCst;

struct Leaf([AtomicU64; LEAF_WORDS]);

impl Leaf {
    fn empty() -> Arc<Self> {
        Arc::new(Self([const { AtomicU64::new(0) }; _]))
    }
}

/// The bits.
pub struct Bits {
    /// Bytes per bit, as a power of two.
    shift: u32,
    /// Bytes that there are bits for; grows when somebody writes behind them.
    size: AtomicU64,
    leaves: Box<[OnceLock<Arc<Leaf>>]>,
    /// One bit per leaf: all of it is set, whatever it holds.
    full: Box<[AtomicU64]>,
}

impl Bits {
    /// Clean bits for `size` bytes; `granularity` is a power of two. `None`: too many.
    #[must_use]
    pub fn new(size: u64, granularity: u32) -> Option<Self> {
        let shift = granularity.trailing_zeros();
        let granules = size.div_ceil(1 << shift).max(1);
        if granules > GRANULES_MAX {
            return None;
        }
        let leaves = granules.div_ceil(LEAF_BITS);
        Some(Self {
            shift,
            size: AtomicU64::new(size),
            leaves: (0..leaves).map(|_| OnceLock::new()).collect(),
            full: (0..leaves.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        })
    }

    /// Bytes that there are bits for.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(ORDER)
    }

    /// Bytes per bit.
    #[must_use]
    pub const fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// How many bits there are.
    #[must_use]
    pub fn granules(&self) -> u64 {
        let size = self.size();
        (size >> self.shift) + u64::from(size & (self.granularity() - 1) != 0)
    }

    /// Bits for which there is room without [`Bits::resized`].
    fn capacity(&self) -> u64 {
        self.leaves.len() as u64 * LEAF_BITS
    }

    // === setting ===

    /// Sets the bits of all granules that the range touches. `false`: it reaches further than
    /// there are bits; what there are is set.
    pub fn mark(&self, range: ByteRange) -> bool {
        if range.is_empty() {
            return true;
        }
        let end = ((range.end() - 1) >> self.shift) + 1;
        if range.end() > self.size.load(Ordering::Relaxed) {
            let reached = self.capacity() << self.shift;
            self.size.fetch_max(range.end().min(reached), ORDER);
        }
        self.set(range.offset() >> self.shift, end.min(self.capacity()));
        end <= self.capacity()
    }

    /// Sets the bits from `first` to before `end`, which are inside the capacity.
    fn set(&self, mut first: u64, end: u64) {
        while first < end {
            let leaf = (first / LEAF_BITS) as usize;
            let last = end.min((leaf as u64 + 1) * LEAF_BITS);
            if last - first == LEAF_BITS {
                set_bits(&self.full[leaf / 64], 1 << (leaf % 64));
            } else if !self.is_full(leaf) {
                let words = &self.leaves[leaf].get_or_init(Leaf::empty).0;
                set_words(words, first % LEAF_BITS, last - first);
            }
            first = last;
        }
    }

    /// Sets the bits of a stretch that begins with bit `first`, a multiple of 64; bits behind the
    /// last granule are passed over.
    pub(crate) fn set_stretch(&self, first: u64, bytes: &[u8]) {
        let granules = self.granules();
        let mut ones = None;
        let words = bytes.chunks(8).zip((first..granules).step_by(64));
        for (word, at) in words {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            let rest = granules - at;
            let mask = if rest < 64 { (1 << rest) - 1 } else { u64::MAX };
            match u64::from_le_bytes(padded) & mask {
                u64::MAX => {
                    ones.get_or_insert(at);
                    continue;
                }
                0 => {}
                some => {
                    let leaf = (at / LEAF_BITS) as usize;
                    if !self.is_full(leaf) {
                        let words = &self.leaves[leaf].get_or_init(Leaf::empty).0;
                        set_bits(&words[(at % LEAF_BITS / 64) as usize], some);
                    }
                }
            }
            if let Some(from) = ones.take() {
                self.set(from, at);
            }
        }
        if let Some(from) = ones {
            let end = first.saturating_add(bytes.len() as u64 * 8);
            self.set(from, end.min(granules));
        }
    }

    fn is_full(&self, leaf: usize) -> bool {
        self.full[leaf / 64].load(ORDER) >> (leaf % 64) & 1 == 1
    }

    /// Nothing was ever set in this leaf.
    fn is_blank(&self, leaf: usize) -> bool {
        leaf < self.leaves.len() && !self.is_full(leaf) && self.leaves[leaf].get().is_none()
    }

    /// Sets the bits of whatever is dirty in `other`, which may have other granules.
    pub fn merge(&self, other: &Self) {
        let mut at = 0;
        while let Some(dirty) = other.next_dirty(ByteRange::between(at, other.size())) {
            self.mark(dirty);
            at = dirty.end();
        }
    }

    // === reading ===

    /// One word of bits, the lowest one first.
    #[must_use]
    pub fn word(&self, at: u64) -> u64 {
        let (leaf, word) = ((at * 64 / LEAF_BITS) as usize, at as usize % LEAF_WORDS);
        if leaf >= self.leaves.len() {
            return 0;
        }
        let all = if self.is_full(leaf) {
            u64::MAX
        } else {
            let leaf = self.leaves[leaf].get();
            leaf.map_or(0, |leaf| leaf.0[word].load(ORDER))
        };
        // A leaf that is full says nothing of where the bits end.
        match self.granules().saturating_sub(at * 64) {
            0 => 0,
            rest if rest < 64 => all & ((1 << rest) - 1),
            _ => all,
        }
    }

    /// At most `len` bytes of bits from bit `first` on, a multiple of 64, up to the last granule.
    pub(crate) fn stretch(&self, first: u64, len: usize) -> Vec<u8> {
        let rest = self.granules().saturating_sub(first).div_ceil(8);
        let len = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
        for at in (first / 64..).take(len.div_ceil(8)) {
            bytes.extend(self.word(at).to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// The first bit at or after `from` that is set.
    pub(crate) fn next_set(&self, from: u64) -> Option<u64> {
        self.find(true, from, self.granules())
    }

    /// Number of words with bits, at least one.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.granules().div_ceil(64).max(1)
    }

    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        let leaves = 0..self.leaves.len();
        let used = leaves.filter(|leaf| self.is_full(*leaf) || self.leaves[*leaf].get().is_some());
        let words = used.flat_map(|leaf| {
            let first = leaf as u64 * LEAF_WORDS as u64;
            first..first + LEAF_WORDS as u64
        });
        words.map(|at| u64::from(self.word(at).count_ones())).sum()
    }

    /// How far from `range.offset()` on bytes are all dirty or all clean: the run's length, cut
    /// to the range, and which of the two. The range is not empty.
    #[must_use]
    pub fn run(&self, range: ByteRange) -> (u64, bool) {
        let first = range.offset() >> self.shift;
        let dirty = self.word(first / 64) >> (first % 64) & 1 == 1;
        let end = ((range.end() - 1) >> self.shift) + 1;
        let until = self.find(!dirty, first + 1, end);
        let until = until.map_or(range.end(), |bit| bit << self.shift);
        (until.min(range.end()) - range.offset(), dirty)
    }

    /// Tells what [`Bits::run`] would, run after run to the end of the range, as long as `more`
    /// wants it. Looks at each word once.
    pub fn runs(&self, range: ByteRange, mut more: impl FnMut(u64, bool) -> bool) {
        if range.is_empty() {
            return;
        }
        let (mut from, mut at) = (range.offset(), range.offset() >> self.shift);
        let end = ((range.end() - 1) >> self.shift) + 1;
        // Each word is read once: others may set bits meanwhile.
        let word = self.word(at / 64);
        let mut dirty = word >> (at % 64) & 1 == 1;
        // Where a bit is another one than the bit before it, from the second bit on.
        let mut edges = (word ^ word << 1) & (u64::MAX << (at % 64)) & !(1 << (at % 64));
        loop {
            while edges != 0 {
                let bit = at / 64 * 64 + u64::from(edges.trailing_zeros());
                if bit >= end {
                    break;
                }
                let here = bit << self.shift;
                if !more(here - from, dirty) {
                    return;
                }
                (from, dirty) = (here, !dirty);
                edges &= edges - 1;
            }
            at = (at / 64 + 1) * 64;
            while at < end && !dirty && self.is_blank((at / LEAF_BITS) as usize) {
                at = (at / LEAF_BITS + 1) * LEAF_BITS;
            }
            if at >= end {
                break;
            }
            let word = self.word(at / 64);
            edges = word ^ (word << 1 | u64::from(dirty));
        }
        more(range.end() - from, dirty);
    }

    /// The first dirty run of the range.
    #[must_use]
    pub fn next_dirty(&self, range: ByteRange) -> Option<ByteRange> {
        let mut rest = range;
        while !rest.is_empty() {
            let (len, dirty) = self.run(rest);
            if dirty {
                return Some(ByteRange::between(rest.offset(), rest.offset() + len));
            }
            rest = ByteRange::between(rest.offset() + len, range.end());
        }
        None
    }

    /// The first bit from `from` to before `end` that is set, or is not.
    fn find(&self, set: bool, from: u64, end: u64) -> Option<u64> {
        let mut at = from;
        while at < end {
            let leaf = (at / LEAF_BITS) as usize;
            if self.is_blank(leaf) {
                if !set {
                    return Some(at);
                }
                at = (leaf as u64 + 1) * LEAF_BITS;
                continue;
            }
            let word = self.word(at / 64);
            let wanted = if set { word } else { !word } & (u64::MAX << (at % 64));
            if wanted != 0 {
                let bit = at / 64 * 64 + u64::from(wanted.trailing_zeros());
                return (bit < end).then_some(bit);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    // === other bits ===

    /// Clean ones for as many bytes.
    #[must_use]
    pub fn cleaned(&self) -> Self {
        self.sized(self.size(), 0)
    }

    /// The same bits for another length: what is behind its end is forgotten, what is new is clean.
    #[must_use]
    pub fn resized(&self, size: u64) -> Self {
        let bits = self.sized(size, 0);
        let kept = size.min(self.size());
        let whole = (kept >> self.shift) / LEAF_BITS;
        for leaf in 0..whole as usize {
            if self.is_full(leaf) {
                set_bits(&bits.full[leaf / 64], 1 << (leaf % 64));
            } else if let Some(words) = self.leaves[leaf].get() {
                // The first to come: nobody else has these bits.
                let _ = bits.leaves[leaf].set(words.clone());
            }
        }
        let mut rest = ByteRange::between((whole * LEAF_BITS) << self.shift, kept);
        while let Some(dirty) = self.next_dirty(rest) {
            bits.mark(dirty);
            rest = ByteRange::between(dirty.end(), kept);
        }
        bits
    }

    /// Marks what was marked in `old` since these bits were copied from it, as far as they reach.
    pub(super) fn catch_up(&self, old: &Self) {
        let mut rest = ByteRange::between(0, self.size().min(old.size()));
        let end = rest.end();
        while let Some(dirty) = old.next_dirty(rest) {
            self.mark(dirty);
            rest = ByteRange::between(dirty.end(), end);
        }
    }

    /// Room for `end` bytes and as much again, so that growing step by step stays cheap.
    #[must_use]
    pub(super) fn with_room(&self, end: u64) -> Self {
        let room = (end >> self.shift).div_ceil(LEAF_BITS);
        let bits = self.sized(self.size(), room.saturating_mul(2));
        let full = self.full.iter().zip(&bits.full);
        full.for_each(|(from, to)| to.store(from.load(ORDER), ORDER));
        for (from, to) in self.leaves.iter().zip(&bits.leaves) {
            if let Some(words) = from.get() {
                let _ = to.set(words.clone());
            }
        }
        bits
    }

    pub(super) fn has_room_for(&self, end: u64) -> bool {
        end.div_ceil(self.granularity()) <= self.capacity()
    }

    pub(super) fn has_more_room_than(&self, other: &Self) -> bool {
        self.capacity() > other.capacity()
    }

    /// Can there be bits for so many bytes?
    pub(super) fn can_cover(&self, size: u64) -> bool {
        size.div_ceil(self.granularity()) <= GRANULES_MAX
    }

    /// Clean bits, and room for at least so many leaves if that is not too many.
    fn sized(&self, size: u64, leaves_min: u64) -> Self {
        let needed = (size.div_ceil(self.granularity()).max(1)).div_ceil(LEAF_BITS);
        let leaves = leaves_min.max(needed).min(GRANULES_MAX / LEAF_BITS);
        Self {
            shift: self.shift,
            size: AtomicU64::new(size.min((leaves * LEAF_BITS) << self.shift)),
            leaves: (0..leaves).map(|_| OnceLock::new()).collect(),
            full: (0..leaves.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bits")
            .field("size", &self.size())
            .field("granularity", &self.granularity())
            .finish_non_exhaustive()
    }
}

/// Bits that are set already cost a load: rewritten granules are no contended cache lines.
#[inline]
fn set_bits(word: &AtomicU64, mask: u64) {
    if word.load(ORDER) & mask != mask {
        word.fetch_or(mask, ORDER);
    }
}

/// Sets `len` bits from `first` on, of one leaf.
fn set_words(words: &[AtomicU64; LEAF_WORDS], first: u64, len: u64) {
    let (mut at, end) = (first, first + len);
    while at < end {
        let next = end.min((at / 64 + 1) * 64);
        let mask = u64::MAX >> (64 - (next - at)) << (at % 64);
        set_bits(&words[(at / 64) as usize], mask);
        at = next;
    }
}
