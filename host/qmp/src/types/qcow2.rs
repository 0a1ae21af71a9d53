//! Options of the `qcow2` driver (part of QEMU's `block-core.json`).

use super::block_core::{BlockdevRef, BlockdevRefOrNull};

qapi! {
    /// How much an image's structures are checked against being overwritten.
    enum Qcow2OverlapCheckMode {
        /// Nothing.
        None = "none",
        /// What takes constant time and no I/O.
        Constant = "constant",
        /// And what needs only cached structures.
        Cached = "cached",
        /// Everything.
        All = "all",
    }

    /// The structures that are checked, one by one.
    struct Qcow2OverlapCheckFlags {
        /// What the others default to.
        template: Option<Qcow2OverlapCheckMode>,
        /// The header.
        main_header: Option<bool> = "main-header",
        /// The active L1 table.
        active_l1: Option<bool> = "active-l1",
        /// The active L2 tables.
        active_l2: Option<bool> = "active-l2",
        /// The refcount table.
        refcount_table: Option<bool> = "refcount-table",
        /// The refcount blocks.
        refcount_block: Option<bool> = "refcount-block",
        /// The snapshot table.
        snapshot_table: Option<bool> = "snapshot-table",
        /// The L1 tables of snapshots.
        inactive_l1: Option<bool> = "inactive-l1",
        /// The L2 tables of snapshots.
        inactive_l2: Option<bool> = "inactive-l2",
        /// The bitmap directory.
        bitmap_directory: Option<bool> = "bitmap-directory",
    }

    /// A mode, or the structures one by one.
    alternate Qcow2OverlapChecks {
        /// The structures one by one.
        Flags(Qcow2OverlapCheckFlags) = "<object>",
        /// A mode.
        Mode(Qcow2OverlapCheckMode) = "<string>",
    }

    /// Encryption methods of an image.
    enum BlockdevQcow2EncryptionFormat {
        /// The legacy method.
        Aes = "aes",
        /// LUKS.
        Luks = "luks",
    }

    /// Where the key of an encrypted image is.
    struct QCryptoBlockOptions {
        /// Id of the `secret` object.
        key_secret: Option<String> = "key-secret",
    }

    /// How an image is decrypted.
    union BlockdevQcow2Encryption /
        #[doc = "The methods of [`BlockdevQcow2Encryption`]."] BlockdevQcow2EncryptionBranch
        on "format": BlockdevQcow2EncryptionFormat {} {
        /// The legacy method.
        Aes(QCryptoBlockOptions) = "aes",
        /// LUKS.
        Luks(QCryptoBlockOptions) = "luks",
    }

    /// The members of a `qcow2` node.
    struct BlockdevOptionsQcow2 {
        /// The node that holds the image.
        file: BlockdevRef,
        /// The backing node; absent: what the image names; `null`: none.
        backing: Option<BlockdevRefOrNull>,
        /// Postpone refcount updates; only for images of version 3.
        lazy_refcounts: Option<bool> = "lazy-refcounts",
        /// Pass a guest's discards on to the file.
        pass_discard_request: Option<bool> = "pass-discard-request",
        /// Discard in the file what a deleted snapshot frees.
        pass_discard_snapshot: Option<bool> = "pass-discard-snapshot",
        /// Discard in the file what becomes free otherwise.
        pass_discard_other: Option<bool> = "pass-discard-other",
        /// Keep the mapping of discarded clusters, against fragmentation.
        discard_no_unref: Option<bool> = "discard-no-unref",
        /// Which structures are checked before each write.
        overlap_check: Option<Qcow2OverlapChecks> = "overlap-check",
        /// Bytes for cached L2 and refcount tables together.
        cache_size: Option<i64> = "cache-size",
        /// Bytes for cached L2 tables.
        l2_cache_size: Option<i64> = "l2-cache-size",
        /// Bytes of a cached part of an L2 table.
        l2_cache_entry_size: Option<i64> = "l2-cache-entry-size",
        /// Bytes for cached refcount blocks.
        refcount_cache_size: Option<i64> = "refcount-cache-size",
        /// Seconds after which unused cache entries are dropped; 0: never.
        cache_clean_interval: Option<u64> = "cache-clean-interval",
        /// How an encrypted image is decrypted.
        encrypt: Option<BlockdevQcow2Encryption>,
        /// The node that holds the data, for images with an external data file.
        data_file: Option<BlockdevRef> = "data-file",
    }
}
