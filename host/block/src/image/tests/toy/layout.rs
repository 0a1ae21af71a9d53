//! Where the toy's metadata lies.

/// Entry flag: reads as zeroes.
pub(in super::super) const ZERO: u64 = 1;
/// Entry flag: compressed.
pub(in super::super) const PACKED: u64 = 2;
const FLAGS: u64 = 511;

const MAGIC: u64 = 0x3130_474d_4959_4f54;

/// The header, which says where the rest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Header {
    pub(in super::super) bits: u32,
    pub(in super::super) size: u64,
    /// Guest clusters that the table has room for.
    pub(in super::super) entries: u64,
    /// File clusters that there may be.
    pub(in super::super) capacity: u64,
    pub(in super::super) dirty: bool,
}

impl Header {
    pub(in super::super) fn cluster(&self) -> u64 {
        1 << self.bits
    }

    pub(in super::super) fn table(&self) -> u64 {
        512
    }

    /// Beside the table, in the same sector if that is not full.
    pub(in super::super) fn counts(&self) -> u64 {
        self.table() + self.entries * 8
    }

    pub(in super::super) fn first_data(&self) -> u64 {
        (self.counts() + self.capacity).div_ceil(self.cluster())
    }

    pub(in super::super) fn entry_at(&self, guest: u64) -> u64 {
        self.table() + (guest >> self.bits) * 8
    }

    pub(in super::super) fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_le_bytes().to_vec();
        for word in [
            u64::from(self.bits),
            self.size,
            self.entries,
            self.capacity,
            u64::from(self.dirty),
        ] {
            out.extend(word.to_le_bytes());
        }
        out
    }

    pub(in super::super) fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |i: usize| {
            let bytes = bytes.get(i * 8..i * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        (word(0)? == MAGIC).then_some(())?;
        Some(Self {
            bits: u32::try_from(word(1)?).ok()?,
            size: word(2)?,
            entries: word(3)?,
            capacity: word(4)?,
            dirty: word(5)? != 0,
        })
    }
}

/// The offset in an entry.
pub(super) fn offset_of(entry: u64) -> u64 {
    entry & !FLAGS
}
