//! `blkdebug`: injected errors and held requests (part of QEMU's `block-core.json`).

use super::block_core::BlockdevRef;

qapi! {
    /// Places in the life of a request. Rules may name all of them; those that only QEMU has never
    /// come.
    enum BlkdebugEvent {
        /// A place that only QEMU has.
        L1Update = "l1_update",
        /// A place that only QEMU has.
        L1GrowAllocTable = "l1_grow_alloc_table",
        /// A place that only QEMU has.
        L1GrowWriteTable = "l1_grow_write_table",
        /// A place that only QEMU has.
        L1GrowActivateTable = "l1_grow_activate_table",
        /// A place that only QEMU has.
        L2Load = "l2_load",
        /// Metadata that makes data reachable is written.
        L2Update = "l2_update",
        /// A place that only QEMU has.
        L2UpdateCompressed = "l2_update_compressed",
        /// A place that only QEMU has.
        L2AllocCowRead = "l2_alloc_cow_read",
        /// A place that only QEMU has.
        L2AllocWrite = "l2_alloc_write",
        /// Data is read.
        ReadAio = "read_aio",
        /// A place that only QEMU has.
        ReadBackingAio = "read_backing_aio",
        /// Compressed data is read.
        ReadCompressed = "read_compressed",
        /// Data is written.
        WriteAio = "write_aio",
        /// Compressed data is written.
        WriteCompressed = "write_compressed",
        /// A place that only QEMU has.
        VmstateLoad = "vmstate_load",
        /// A place that only QEMU has.
        VmstateSave = "vmstate_save",
        /// A place that only QEMU has.
        CowRead = "cow_read",
        /// The rest of a new cluster is copied.
        CowWrite = "cow_write",
        /// A place that only QEMU has.
        ReftableLoad = "reftable_load",
        /// A place that only QEMU has.
        ReftableGrow = "reftable_grow",
        /// A place that only QEMU has.
        ReftableUpdate = "reftable_update",
        /// A place that only QEMU has.
        RefblockLoad = "refblock_load",
        /// Metadata that nothing refers to yet is written.
        RefblockUpdate = "refblock_update",
        /// A place that only QEMU has.
        RefblockUpdatePart = "refblock_update_part",
        /// A place that only QEMU has.
        RefblockAlloc = "refblock_alloc",
        /// A place that only QEMU has.
        RefblockAllocHookup = "refblock_alloc_hookup",
        /// A place that only QEMU has.
        RefblockAllocWrite = "refblock_alloc_write",
        /// A place that only QEMU has.
        RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
        /// A place that only QEMU has.
        RefblockAllocWriteTable = "refblock_alloc_write_table",
        /// A place that only QEMU has.
        RefblockAllocSwitchTable = "refblock_alloc_switch_table",
        /// A place that only QEMU has.
        ClusterAlloc = "cluster_alloc",
        /// A place that only QEMU has.
        ClusterAllocBytes = "cluster_alloc_bytes",
        /// A place that only QEMU has.
        ClusterFree = "cluster_free",
        /// A flush begins.
        FlushToOs = "flush_to_os",
        /// A flush makes things durable.
        FlushToDisk = "flush_to_disk",
        /// A write that is not aligned begins.
        PwritevRmwHead = "pwritev_rmw_head",
        /// Its head was read.
        PwritevRmwAfterHead = "pwritev_rmw_after_head",
        /// The end of a write is not aligned.
        PwritevRmwTail = "pwritev_rmw_tail",
        /// Its tail was read.
        PwritevRmwAfterTail = "pwritev_rmw_after_tail",
        /// A write.
        Pwritev = "pwritev",
        /// A request to write zeroes.
        PwritevZero = "pwritev_zero",
        /// A write ends.
        PwritevDone = "pwritev_done",
        /// A place that only QEMU has.
        EmptyImagePrepare = "empty_image_prepare",
        /// A place that only QEMU has.
        L1ShrinkWriteTable = "l1_shrink_write_table",
        /// A place that only QEMU has.
        L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
        /// A place that only QEMU has.
        CorWrite = "cor_write",
        /// A place that only QEMU has.
        ClusterAllocSpace = "cluster_alloc_space",
        /// Once, when the node is made.
        None = "none",
    }

    /// Kinds of request.
    enum BlkdebugIOType {
        /// Reads.
        Read = "read",
        /// Writes.
        Write = "write",
        /// Requests to write zeroes.
        WriteZeroes = "write-zeroes",
        /// Discards.
        Discard = "discard",
        /// Flushes.
        Flush = "flush",
        /// Questions for the allocation status.
        BlockStatus = "block-status",
    }

    /// What a user of a node may do.
    enum BlockPermission {
        /// Read what was written.
        ConsistentRead = "consistent-read",
        /// Write.
        Write = "write",
        /// Write what is there already.
        WriteUnchanged = "write-unchanged",
        /// Change the length.
        Resize = "resize",
    }

    /// A rule that makes requests fail.
    struct BlkdebugInjectErrorOptions {
        /// What arms the rule.
        event: BlkdebugEvent,
        /// The state in which it does; any if absent.
        state: Option<i64>,
        /// Which requests fail; all but `block-status` if absent.
        iotype: Option<BlkdebugIOType>,
        /// With which error; 5 (`EIO`) if absent.
        errno: Option<i64>,
        /// Only requests that touch this sector; any if absent.
        sector: Option<i64>,
        /// Only one request.
        once: Option<bool>,
        /// Before other requests get their turn.
        immediately: Option<bool>,
    }

    /// A rule that moves the state.
    struct BlkdebugSetStateOptions {
        /// What triggers it.
        event: BlkdebugEvent,
        /// The state in which it does; any if absent.
        state: Option<i64>,
        /// The state afterwards.
        new_state: i64,
    }

    /// The members of `blkdebug` nodes.
    struct BlockdevOptionsBlkdebug {
        /// The node that is debugged.
        image: BlockdevRef,
        /// A file with rules.
        config: Option<String>,
        /// Requests are padded to multiples of this; a power of two.
        align: Option<i64>,
        /// Longest read or write, in bytes.
        max_transfer: Option<i32> = "max-transfer",
        /// Unit of zeroes that need not be written.
        opt_write_zero: Option<i32> = "opt-write-zero",
        /// Longest request to write zeroes, in bytes.
        max_write_zero: Option<i32> = "max-write-zero",
        /// Unit of discards.
        opt_discard: Option<i32> = "opt-discard",
        /// Longest discard, in bytes.
        max_discard: Option<i32> = "max-discard",
        /// Rules that make requests fail.
        inject_error: Option<Vec<BlkdebugInjectErrorOptions>> = "inject-error",
        /// Rules that move the state.
        set_state: Option<Vec<BlkdebugSetStateOptions>> = "set-state",
        /// What the node does to its child beyond what is done to it.
        take_child_perms: Option<Vec<BlockPermission>> = "take-child-perms",
        /// What the node lets nobody else do to its child.
        unshare_child_perms: Option<Vec<BlockPermission>> = "unshare-child-perms",
    }

    /// Arguments of `x-blkdebug-break` (ours; qemu-io's `break`).
    struct BlkdebugBreak {
        /// A `blkdebug` node.
        node_name: String = "node-name",
        /// Where the next request that comes there is held up.
        event: BlkdebugEvent,
        /// A name for it.
        tag: String,
    }

    /// Arguments of `x-blkdebug-remove-break` (ours; qemu-io's `remove_break`).
    struct BlkdebugRemoveBreak {
        /// A `blkdebug` node.
        node_name: String = "node-name",
        /// The name of breaks that nobody came to yet.
        tag: String,
    }

    /// Arguments of `x-blkdebug-resume` (ours; qemu-io's `resume`).
    struct BlkdebugResume {
        /// A `blkdebug` node.
        node_name: String = "node-name",
        /// Which requests go on; all if absent.
        tag: Option<String>,
    }

    /// Arguments of `x-query-blkdebug` (ours).
    struct QueryBlkdebug {
        /// A `blkdebug` node.
        node_name: String = "node-name",
    }

    /// The result of `x-query-blkdebug` (ours).
    struct BlkdebugInfo {
        /// The state that the rules are in.
        state: i64,
        /// Tags of the requests that are held up, the oldest first.
        suspended: Vec<String>,
    }
}
