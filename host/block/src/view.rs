//! What a provider of metadata contexts may see of a node: its length and what the host knows of
//! its ranges, never its data. In the words of `wit/metactx.wit`.
//!
//! Asked on the iothread whose client wants a block status.

use std::pin::Pin;
use std::sync::Arc;

use crate::bitmap::DirtyBitmap;
use crate::{ByteRange, Errno, Node};

/// A view that may wait for metadata.
pub type Viewing<'a, T> = Pin<Box<dyn Future<Output = Result<T, Errno>> + Send + 'a>>;

/// A run of bytes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// How many bytes.
    pub len: u64,
    /// They lie in a file.
    pub data: bool,
    /// They read as zeroes.
    pub zero: bool,
    /// The image of the chain that has them: 1 is the top one, 0 none.
    pub depth: u32,
}

/// Read-only looks at one node.
pub trait NodeView: Send + Sync {
    /// Its length in bytes.
    fn size(&self) -> u64;

    /// What is allocated in `range`, which is inside the node: runs without a gap from its start,
    /// at most `runs_max` of them. They may end before the range does.
    fn allocation(&self, range: ByteRange, runs_max: usize) -> Viewing<'_, Vec<Allocation>>;

    /// Its dirty bitmaps.
    fn bitmap_names(&self) -> Vec<String>;

    /// Bytes for each bit of a bitmap.
    ///
    /// # Errors
    /// There is none of this name.
    fn bitmap_granularity(&self, name: &str) -> Result<u32, Errno>;

    /// The bits of a bitmap for `range`, which is inside the node, lowest bit first.
    ///
    /// # Errors
    /// There is none of this name.
    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>, Errno>;
}

/// One node, seen so.
#[derive(Debug)]
pub struct Sight(Arc<Node>);

impl Sight {
    /// Of this node.
    #[must_use]
    pub const fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    fn bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>, Errno> {
        let bitmap = self.0.bitmaps().find(name).ok_or(Errno::NoEnt)?;
        // What was not kept up to date says nothing.
        if bitmap.is_inconsistent() {
            return Err(Errno::BadMsg);
        }
        Ok(bitmap)
    }
}

impl NodeView for Sight {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn allocation(&self, range: ByteRange, runs_max: usize) -> Viewing<'_, Vec<Allocation>> {
        Box::pin(async move {
            let mut runs: Vec<Allocation> = Vec::new();
            let mut at = range.offset();
            while at < range.end() {
                let rest = ByteRange::between(at, range.end());
                let status = self.0.status(rest).await?;
                let len = status.len.min(rest.len());
                at += len;
                let (data, zero, depth) = (status.data, status.zero, status.depth);
                let full = runs.len() >= runs_max;
                match runs.last_mut() {
                    Some(last) if (last.data, last.zero, last.depth) == (data, zero, depth) => {
                        last.len += len;
                    }
                    _ if full => break,
                    _ => runs.push(Allocation {
                        len,
                        data,
                        zero,
                        depth,
                    }),
                }
            }
            Ok(runs)
        })
    }

    fn bitmap_names(&self) -> Vec<String> {
        let bitmaps = self.0.bitmaps().all();
        bitmaps
            .iter()
            .map(|bitmap| bitmap.name().to_owned())
            .collect()
    }

    fn bitmap_granularity(&self, name: &str) -> Result<u32, Errno> {
        Ok(self.bitmap(name)?.granularity())
    }

    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>, Errno> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let bits = self.bitmap(name)?.bits();
        let first = range.offset() / bits.granularity();
        let count = range.end().div_ceil(bits.granularity()) - first;
        let bytes = usize::try_from(count.div_ceil(8)).map_err(|_| Errno::FBig)?;
        let mut packed = vec![0_u8; bytes];
        let mut rest = range;
        while let Some(dirty) = bits.next_dirty(rest) {
            let from = dirty.offset() / bits.granularity() - first;
            let to = dirty.end().div_ceil(bits.granularity()) - first;
            for bit in from..to {
                if let Some(byte) = packed.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
            rest = ByteRange::between(dirty.end(), range.end());
        }
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::node::Kind;

    #[test]
    fn bits_begin_at_the_granule_of_the_range_s_start() {
        let null = Kind::Null {
            size: AtomicU64::new(1 << 20),
            zeroes: true,
        };
        let node = Node::new("n", "null-co", false, null);
        let bitmap = DirtyBitmap::new("b", 4096, 1 << 20, true).unwrap();
        bitmap.bits().mark(ByteRange::between(8192, 8193));
        bitmap.bits().mark(ByteRange::between(40_960, 49_152));
        node.bitmaps().insert(bitmap);
        let sight = Sight::new(node);
        assert_eq!(sight.bitmap_names(), ["b"]);
        assert_eq!(sight.bitmap_granularity("b"), Ok(4096));
        let bits = |from, to| {
            sight
                .bitmap_bits("b", ByteRange::between(from, to))
                .unwrap()
        };
        // Granules 2, 10 and 11.
        assert_eq!(bits(0, 49_152), [0b0000_0100, 0b0000_1100]);
        assert_eq!(bits(9000, 45_000), [0b0000_0001, 0b0000_0001]);
        assert_eq!(bits(0, 8192), [0]);
        let whole = sight
            .bitmap_bits("b", ByteRange::between(0, 1 << 20))
            .unwrap();
        assert_eq!(whole.len(), 32);
        assert_eq!(
            sight.bitmap_bits("x", ByteRange::between(0, 1)),
            Err(Errno::NoEnt)
        );
    }
}
