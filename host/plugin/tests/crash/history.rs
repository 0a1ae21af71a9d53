//! What each sector held, and how much of that may be forgotten at each mark.
//!
//! Values of a sector are numbers in the order they were written: a stamp, or one of the three
//! below. After a power cut a sector may hold any value that is not older than the newest one
//! that a flush has covered.

use outport_block::ByteRange;
use outport_block::trace::Trace;

/// Bytes per sector.
pub(crate) const SECTOR: u64 = 512;

/// Zeroes.
pub(crate) const ZERO: u64 = 0;

/// The image ends before.
pub(crate) const ABSENT: u64 = u64::MAX;

/// What the backing file has in this sector.
pub(crate) const fn backing_stamp(sector: u64) -> u64 {
    0xbac_0000_0000_0000 | sector
}

/// The content of sectors with these values.
pub(crate) fn content(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values
        .flat_map(|value| value.to_le_bytes().repeat(SECTOR as usize / 8))
        .collect()
}

/// All that was written to one image.
#[derive(Debug)]
pub(crate) struct History {
    /// By sector, oldest first.
    values: Vec<Vec<u64>>,
    /// By mark and sector: how many of its values are forgotten.
    durable: Vec<Vec<usize>>,
}

impl History {
    /// An image that holds `first`; nothing older is known.
    pub(crate) fn new(first: impl Iterator<Item = u64>) -> Self {
        let values: Vec<_> = first.map(|value| vec![value]).collect();
        let durable = vec![vec![0; values.len()]];
        Self { values, durable }
    }

    /// Sectors that hold something else than at first.
    pub(crate) fn changed(&self, guest: &[u8]) -> impl Iterator<Item = usize> {
        let now = guest.chunks(SECTOR as usize).map(value_of);
        let pairs = self.values.iter().zip(now).enumerate();
        pairs.filter_map(|(i, (values, now))| (values.first() != now.as_ref()).then_some(i))
    }

    /// The newest value of each sector, while the image lasts.
    pub(crate) fn now(&self) -> impl Iterator<Item = u64> {
        let last = |values: &Vec<u64>| values.last().copied().unwrap_or(ABSENT);
        self.values.iter().map(last).take_while(|v| *v != ABSENT)
    }

    /// The sectors of a range.
    pub(crate) fn sectors(range: ByteRange) -> std::ops::Range<usize> {
        (range.offset() / SECTOR) as usize..(range.end() / SECTOR) as usize
    }

    /// These sectors hold this from now on, or will.
    pub(crate) fn wrote(&mut self, range: ByteRange, value: u64) {
        for sector in Self::sectors(range) {
            self.at(sector, value);
        }
    }

    /// This one sector holds this from now on, or will.
    pub(crate) fn at(&mut self, sector: usize, value: u64) {
        self.values[sector].push(value);
    }

    /// One sector was seen to hold this: what was there, zeroes, or the backing file's.
    pub(crate) fn saw(&mut self, sector: usize, value: u64, has_backing: bool) {
        let values = &mut self.values[sector];
        let backing = has_backing && value == backing_stamp(sector as u64);
        let known = value == ZERO || backing || values.last() == Some(&value);
        assert!(known, "sector {sector} reads {value:#x} of {values:x?}");
        values.push(value);
    }

    /// What a flush that is issued now will cover; the number marks its end.
    pub(crate) fn flush_issued(&mut self) -> u64 {
        let all = self.values.iter().map(|values| values.len() - 1).collect();
        self.durable.push(all);
        self.durable.len() as u64 - 1
    }

    /// A write of these sectors that was durable when it was answered.
    pub(crate) fn keep(&mut self, range: ByteRange, trace: &Trace) {
        let mut durable = self.durable.last().cloned().unwrap_or_default();
        for sector in Self::sectors(range) {
            durable[sector] = self.values[sector].len() - 1;
        }
        self.durable.push(durable);
        trace.mark(self.durable.len() as u64 - 1);
    }

    /// Is `guest` what may be found when these marks were passed?
    pub(crate) fn judge(&self, guest: &[u8], marks: &[u64]) -> Result<(), String> {
        let mark = marks.last().map_or(0, |mark| *mark as usize);
        let sectors = guest.chunks(SECTOR as usize).map(Some);
        let sectors = sectors.chain(std::iter::repeat(None));
        for (i, (values, sector)) in self.values.iter().zip(sectors).enumerate() {
            let found = match sector {
                None => ABSENT,
                Some(sector) => value_of(sector).ok_or(format!("sector {i} is a mixture"))?,
            };
            let allowed = &values[self.durable[mark][i]..];
            if !allowed.contains(&found) {
                return Err(format!(
                    "sector {i} has {found:#x}, allowed are {allowed:x?} (mark {mark})"
                ));
            }
        }
        Ok(())
    }
}

/// The value that a sector is filled with.
pub(crate) fn value_of(sector: &[u8]) -> Option<u64> {
    let (words, _) = sector.as_chunks::<8>();
    let first = words.first()?;
    words
        .iter()
        .all(|word| word == first)
        .then(|| u64::from_le_bytes(*first))
}
