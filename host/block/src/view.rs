//! What a provider of metadata contexts may see of a node: its length and what the host knows of
//! its ranges, never its data. In the words of `wit/metactx.wit`.
//!
//! Asked on the iothread whose client wants a block status.

use std::pin::Pin;

use crate::{ByteRange, Errno};

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
