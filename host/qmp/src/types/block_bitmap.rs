//! Dirty bitmaps (part of QEMU's `block-core.json`).

pub use super::block_export::{BlockDirtyBitmap, BlockDirtyBitmapOrStr};

qapi! {
    /// Arguments of `block-dirty-bitmap-add`.
    struct BlockDirtyBitmapAdd {
        /// The node.
        node: String,
        /// The bitmap, new on that node.
        name: String,
        /// Bytes for each bit; the node's cluster size from 4 KiB to 64 KiB, or 64 KiB, if absent.
        granularity: Option<u32>,
        /// Whether it is kept in the image.
        persistent: Option<bool>,
        /// Whether it does not record writes yet.
        disabled: Option<bool>,
    }

    /// Arguments of `block-dirty-bitmap-merge`.
    struct BlockDirtyBitmapMerge {
        /// The node of the target.
        node: String,
        /// The bitmap that gets all dirty bits.
        target: String,
        /// Whose dirty bits, on the same node unless they say otherwise.
        bitmaps: Vec<BlockDirtyBitmapOrStr>,
    }

    /// The result of `x-debug-block-dirty-bitmap-sha256`.
    struct BlockDirtyBitmapSha256 {
        /// SHA-256 of the bits, in hexadecimal digits.
        sha256: String,
    }
}
