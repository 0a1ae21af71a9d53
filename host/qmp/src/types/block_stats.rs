//! Statistics of nodes (QEMU's `block-core.json`), under QEMU's names.

qapi! {
    /// Arguments of `query-blockstats`.
    #[derive(Default)]
    struct QueryBlockstats {
        /// List nodes rather than guest devices, of which there are none.
        query_nodes: Option<bool> = "query-nodes",
    }

    /// What a node did. QEMU counts at guest devices; here the counts are those of the exports of
    /// the node, present and past, so that a node without an export has none.
    #[derive(Default)]
    struct BlockDeviceStats {
        /// Bytes read.
        rd_bytes: u64,
        /// Bytes written.
        wr_bytes: u64,
        /// Bytes appended to zones.
        zone_append_bytes: u64,
        /// Bytes discarded.
        unmap_bytes: u64,
        /// Reads.
        rd_operations: u64,
        /// Writes.
        wr_operations: u64,
        /// Zone appends.
        zone_append_operations: u64,
        /// Flushes.
        flush_operations: u64,
        /// Discards.
        unmap_operations: u64,
        /// Time of reads.
        rd_total_time_ns: u64,
        /// Time of writes.
        wr_total_time_ns: u64,
        /// Time of zone appends.
        zone_append_total_time_ns: u64,
        /// Time of flushes.
        flush_total_time_ns: u64,
        /// Time of discards.
        unmap_total_time_ns: u64,
        /// End of the last byte that was ever written.
        wr_highest_offset: u64,
        /// Reads merged into others.
        rd_merged: u64,
        /// Writes merged into others.
        wr_merged: u64,
        /// Zone appends merged into others.
        zone_append_merged: u64,
        /// Discards merged into others.
        unmap_merged: u64,
        /// Time since the last request; absent before the first one.
        idle_time_ns: Option<u64>,
        /// Failed reads.
        failed_rd_operations: u64,
        /// Failed writes.
        failed_wr_operations: u64,
        /// Failed zone appends.
        failed_zone_append_operations: u64,
        /// Failed flushes.
        failed_flush_operations: u64,
        /// Failed discards.
        failed_unmap_operations: u64,
        /// Invalid reads.
        invalid_rd_operations: u64,
        /// Invalid writes.
        invalid_wr_operations: u64,
        /// Invalid zone appends.
        invalid_zone_append_operations: u64,
        /// Invalid flushes.
        invalid_flush_operations: u64,
        /// Invalid discards.
        invalid_unmap_operations: u64,
        /// Invalid requests count as requests.
        account_invalid: bool,
        /// Failed requests count as requests.
        account_failed: bool,
        /// Statistics of intervals, of which there are none.
        timed_stats: Vec<BlockDeviceTimedStats>,
        /// Latencies of reads.
        rd_latency_histogram: Option<BlockLatencyHistogramInfo>,
        /// Latencies of writes.
        wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
        /// Latencies of zone appends.
        zone_append_latency_histogram: Option<BlockLatencyHistogramInfo>,
        /// Latencies of flushes.
        flush_latency_histogram: Option<BlockLatencyHistogramInfo>,
    }

    /// Statistics of an interval.
    struct BlockDeviceTimedStats {
        /// Seconds of the interval.
        interval_length: u64,
        /// Shortest read.
        min_rd_latency_ns: u64,
        /// Longest read.
        max_rd_latency_ns: u64,
        /// Average read.
        avg_rd_latency_ns: u64,
        /// Shortest write.
        min_wr_latency_ns: u64,
        /// Longest write.
        max_wr_latency_ns: u64,
        /// Average write.
        avg_wr_latency_ns: u64,
        /// Shortest zone append.
        min_zone_append_latency_ns: u64,
        /// Longest zone append.
        max_zone_append_latency_ns: u64,
        /// Average zone append.
        avg_zone_append_latency_ns: u64,
        /// Shortest flush.
        min_flush_latency_ns: u64,
        /// Longest flush.
        max_flush_latency_ns: u64,
        /// Average flush.
        avg_flush_latency_ns: u64,
    }

    /// A histogram of latencies.
    struct BlockLatencyHistogramInfo {
        /// Where one bin ends and the next begins, in nanoseconds.
        boundaries: Vec<u64>,
        /// Requests of each bin.
        bins: Vec<u64>,
    }

    /// Discards that a file was given.
    struct BlockStatsSpecificFile {
        /// Those that were carried out.
        discard_nb_ok: u64 = "discard-nb-ok",
        /// Those that failed.
        discard_nb_failed: u64 = "discard-nb-failed",
        /// Bytes of those that were carried out.
        discard_bytes_ok: u64 = "discard-bytes-ok",
    }

    /// Drivers with counts of their own.
    enum BlockStatsSpecificKind {
        /// A file.
        File = "file",
        /// A device of the host.
        HostDevice = "host_device",
    }

    /// What only one driver counts.
    union BlockStatsSpecific /
        #[doc = "The drivers of [`BlockStatsSpecific`]."] BlockStatsSpecificBranch
        on "driver": BlockStatsSpecificKind {} {
        /// A file.
        File(BlockStatsSpecificFile) = "file",
        /// A device of the host.
        HostDevice(BlockStatsSpecificFile) = "host_device",
    }

    /// An element of `query-blockstats`.
    struct BlockStats {
        /// A guest device, which a storage daemon does not have.
        device: Option<String>,
        /// The path of a guest device.
        qdev: Option<String>,
        /// The node.
        node_name: Option<String> = "node-name",
        /// Its counts.
        stats: BlockDeviceStats,
        /// What only its driver counts.
        driver_specific: Option<BlockStatsSpecific> = "driver-specific",
        /// The node that holds its bytes.
        parent: Option<Box<BlockStats>>,
        /// Its backing node.
        backing: Option<Box<BlockStats>>,
    }
}
