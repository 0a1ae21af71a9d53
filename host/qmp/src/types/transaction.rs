//! Several changes that happen all or not at all (QEMU's `transaction.json`).

use super::Empty;
use super::block_bitmap::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge};

qapi! {
    /// Changes that the daemon can make so.
    enum TransactionActionKind {
        /// Fail: for tests of what comes before it.
        Abort = "abort",
        /// Adds a dirty bitmap.
        BlockDirtyBitmapAdd = "block-dirty-bitmap-add",
        /// Removes a dirty bitmap.
        BlockDirtyBitmapRemove = "block-dirty-bitmap-remove",
        /// Makes all of a bitmap clean.
        BlockDirtyBitmapClear = "block-dirty-bitmap-clear",
        /// Lets a bitmap record writes.
        BlockDirtyBitmapEnable = "block-dirty-bitmap-enable",
        /// Lets a bitmap record no writes.
        BlockDirtyBitmapDisable = "block-dirty-bitmap-disable",
        /// Makes dirty what is dirty in others.
        BlockDirtyBitmapMerge = "block-dirty-bitmap-merge",
    }

    /// A change without options, under `data`.
    struct AbortWrapper {
        /// Nothing.
        data: Empty,
    }

    /// A new bitmap, under `data`.
    struct BlockDirtyBitmapAddWrapper {
        /// The bitmap.
        data: BlockDirtyBitmapAdd,
    }

    /// Which bitmap, under `data`.
    struct BlockDirtyBitmapWrapper {
        /// The bitmap.
        data: BlockDirtyBitmap,
    }

    /// What is merged, under `data`.
    struct BlockDirtyBitmapMergeWrapper {
        /// The bitmaps.
        data: BlockDirtyBitmapMerge,
    }

    /// A change.
    union TransactionAction / #[doc = "Kinds of change, with their options."]
        TransactionActionBranch on "type": TransactionActionKind {} {
        /// Fail.
        Abort(AbortWrapper) = "abort",
        /// Adds a dirty bitmap.
        BlockDirtyBitmapAdd(BlockDirtyBitmapAddWrapper) = "block-dirty-bitmap-add",
        /// Removes a dirty bitmap.
        BlockDirtyBitmapRemove(BlockDirtyBitmapWrapper) = "block-dirty-bitmap-remove",
        /// Makes all of a bitmap clean.
        BlockDirtyBitmapClear(BlockDirtyBitmapWrapper) = "block-dirty-bitmap-clear",
        /// Lets a bitmap record writes.
        BlockDirtyBitmapEnable(BlockDirtyBitmapWrapper) = "block-dirty-bitmap-enable",
        /// Lets a bitmap record no writes.
        BlockDirtyBitmapDisable(BlockDirtyBitmapWrapper) = "block-dirty-bitmap-disable",
        /// Makes dirty what is dirty in others.
        BlockDirtyBitmapMerge(BlockDirtyBitmapMergeWrapper) = "block-dirty-bitmap-merge",
    }

    /// What happens to the jobs of a transaction when one of them fails.
    enum ActionCompletionMode {
        /// Nothing.
        Individual = "individual",
        /// They are cancelled.
        Grouped = "grouped",
    }

    /// What holds for all changes.
    #[derive(Default)]
    struct TransactionProperties {
        /// What happens to jobs; `individual` if absent.
        completion_mode: Option<ActionCompletionMode> = "completion-mode",
    }

    /// Arguments of `transaction`.
    struct Transaction {
        /// The changes, in order.
        actions: Vec<TransactionAction>,
        /// What holds for all of them.
        properties: Option<TransactionProperties>,
    }
}
