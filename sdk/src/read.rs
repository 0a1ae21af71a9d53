//! Bounds-checked reading of headers and tables: no slice index can panic.

use crate::{Error, Result};

/// A cursor over bytes; every read says what it wanted when there is too little.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

macro_rules! integers {
    ($($be:ident $le:ident $t:ty),*) => {$(
        /// The next integer, big-endian.
        pub fn $be(&mut self) -> Result<$t> {
            Ok(<$t>::from_be_bytes(self.array()?))
        }
        /// The next integer, little-endian.
        pub fn $le(&mut self) -> Result<$t> {
            Ok(<$t>::from_le_bytes(self.array()?))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub const fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub const fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..len).ok_or_else(|| {
            Error::invalid(format!(
                "Expected {len} bytes at offset {}, found {}",
                self.at,
                rest.len()
            ))
        })?;
        self.at += len;
        Ok(taken)
    }

    /// Leave out `len` bytes.
    pub fn skip(&mut self, len: usize) -> Result<()> {
        self.take(len).map(|_| ())
    }

    /// The next `N` bytes by value.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    integers!(be_u16 le_u16 u16, be_u32 le_u32 u32, be_u64 le_u64 u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_byte_orders_and_stops_at_the_end() {
        let mut r = Reader::new(&[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(r.be_u16().unwrap(), 0x0102);
        assert_eq!(r.le_u32().unwrap(), 0x0605_0403);
        assert_eq!(r.u8().unwrap(), 7);
        assert!(r.u8().unwrap_err().message.contains("at offset 7"));
        assert_eq!(r.remaining(), 0);
    }
}
