//! For formats whose whole mapping is read when an image is opened.

use crate::{ByteRange, Error, Extent, Location, Result};

/// The extents of an image in guest order, without gaps.
#[derive(Clone, Debug, Default)]
pub struct ExtentList(Vec<Extent>);

impl ExtentList {
    /// No extents: an image of no bytes.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Guest bytes so far.
    pub fn size(&self) -> u64 {
        self.0.last().map_or(0, |extent| extent.range.end())
    }

    /// The next `len` guest bytes are there; nothing happens if that is 0.
    ///
    /// # Errors
    /// `einval`: the image would be larger than 2^63 - 1 bytes.
    pub fn push(&mut self, len: u64, at: Location) -> Result<()> {
        let range = ByteRange::new(self.size(), len);
        if range
            .offset
            .checked_add(len)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(Error::invalid("The image is larger than 2^63 bytes"));
        }
        if len > 0 {
            self.0.push(Extent { range, at });
        }
        Ok(())
    }

    /// What [`Format::resolve`](crate::Format::resolve) answers: the extent that holds the first
    /// byte of `range` and those after it, enough of them that a scan asks rarely.
    pub fn resolve(&self, range: ByteRange) -> Vec<Extent> {
        /// A longer answer costs more than the question that it saves.
        const EXTENTS_MAX: usize = 64;
        let first = self.0.partition_point(|e| e.range.end() <= range.offset);
        self.0[first..].iter().take(EXTENTS_MAX).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_follow_each_other_and_are_found() {
        let mut list = ExtentList::new();
        for len in [512, 0, 1024, 512] {
            list.push(len, Location::Hole).unwrap();
        }
        assert_eq!(list.size(), 2048);
        let found = |at| list.resolve(ByteRange::new(at, 1)).len();
        assert_eq!(
            [found(0), found(511), found(512), found(2047)],
            [3, 3, 2, 1]
        );
        assert_eq!(found(2048), 0);
        assert!(list.push(i64::MAX as u64, Location::Zero).is_err());
    }
}
