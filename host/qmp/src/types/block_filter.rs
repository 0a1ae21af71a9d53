//! Filters: `throttle` with its groups, `compress`, `copy-on-read` (part of QEMU's
//! `block-core.json` and `qom.json`).

use super::block_core::BlockdevRef;

qapi! {
    /// Limits that nodes share. 0 or absent: none.
    #[derive(Default)]
    struct ThrottleLimits {
        /// Requests per second.
        iops_total: Option<i64> = "iops-total",
        /// Requests per second in a burst.
        iops_total_max: Option<i64> = "iops-total-max",
        /// Seconds that a burst may last; 1 if absent.
        iops_total_max_length: Option<i64> = "iops-total-max-length",
        /// Requests per second of reads.
        iops_read: Option<i64> = "iops-read",
        /// Requests per second of reads in a burst.
        iops_read_max: Option<i64> = "iops-read-max",
        /// Seconds that a burst of reads may last; 1 if absent.
        iops_read_max_length: Option<i64> = "iops-read-max-length",
        /// Requests per second of writes.
        iops_write: Option<i64> = "iops-write",
        /// Requests per second of writes in a burst.
        iops_write_max: Option<i64> = "iops-write-max",
        /// Seconds that a burst of writes may last; 1 if absent.
        iops_write_max_length: Option<i64> = "iops-write-max-length",
        /// Bytes per second.
        bps_total: Option<i64> = "bps-total",
        /// Bytes per second in a burst.
        bps_total_max: Option<i64> = "bps-total-max",
        /// Seconds that a burst may last; 1 if absent.
        bps_total_max_length: Option<i64> = "bps-total-max-length",
        /// Bytes per second of reads.
        bps_read: Option<i64> = "bps-read",
        /// Bytes per second of reads in a burst.
        bps_read_max: Option<i64> = "bps-read-max",
        /// Seconds that a burst of reads may last; 1 if absent.
        bps_read_max_length: Option<i64> = "bps-read-max-length",
        /// Bytes per second of writes.
        bps_write: Option<i64> = "bps-write",
        /// Bytes per second of writes in a burst.
        bps_write_max: Option<i64> = "bps-write-max",
        /// Seconds that a burst of writes may last; 1 if absent.
        bps_write_max_length: Option<i64> = "bps-write-max-length",
        /// A request counts once for each so many bytes.
        iops_size: Option<i64> = "iops-size",
    }

    /// The properties of a throttle group.
    #[derive(Default)]
    struct ThrottleGroupProperties {
        /// The limits.
        limits: Option<ThrottleLimits>,
        /// Requests per second.
        x_iops_total: Option<i64> = "x-iops-total" [unstable],
        /// Requests per second in a burst.
        x_iops_total_max: Option<i64> = "x-iops-total-max" [unstable],
        /// Seconds that a burst may last; 1 if absent.
        x_iops_total_max_length: Option<i64> = "x-iops-total-max-length" [unstable],
        /// Requests per second of reads.
        x_iops_read: Option<i64> = "x-iops-read" [unstable],
        /// Requests per second of reads in a burst.
        x_iops_read_max: Option<i64> = "x-iops-read-max" [unstable],
        /// Seconds that a burst of reads may last; 1 if absent.
        x_iops_read_max_length: Option<i64> = "x-iops-read-max-length" [unstable],
        /// Requests per second of writes.
        x_iops_write: Option<i64> = "x-iops-write" [unstable],
        /// Requests per second of writes in a burst.
        x_iops_write_max: Option<i64> = "x-iops-write-max" [unstable],
        /// Seconds that a burst of writes may last; 1 if absent.
        x_iops_write_max_length: Option<i64> = "x-iops-write-max-length" [unstable],
        /// Bytes per second.
        x_bps_total: Option<i64> = "x-bps-total" [unstable],
        /// Bytes per second in a burst.
        x_bps_total_max: Option<i64> = "x-bps-total-max" [unstable],
        /// Seconds that a burst may last; 1 if absent.
        x_bps_total_max_length: Option<i64> = "x-bps-total-max-length" [unstable],
        /// Bytes per second of reads.
        x_bps_read: Option<i64> = "x-bps-read" [unstable],
        /// Bytes per second of reads in a burst.
        x_bps_read_max: Option<i64> = "x-bps-read-max" [unstable],
        /// Seconds that a burst of reads may last; 1 if absent.
        x_bps_read_max_length: Option<i64> = "x-bps-read-max-length" [unstable],
        /// Bytes per second of writes.
        x_bps_write: Option<i64> = "x-bps-write" [unstable],
        /// Bytes per second of writes in a burst.
        x_bps_write_max: Option<i64> = "x-bps-write-max" [unstable],
        /// Seconds that a burst of writes may last; 1 if absent.
        x_bps_write_max_length: Option<i64> = "x-bps-write-max-length" [unstable],
        /// A request counts once for each so many bytes.
        x_iops_size: Option<i64> = "x-iops-size" [unstable],
    }

    /// The members of `throttle` nodes.
    struct BlockdevOptionsThrottle {
        /// Id of the throttle group.
        throttle_group: String = "throttle-group",
        /// The node that is limited.
        file: BlockdevRef,
    }

    /// The members of `compress` nodes.
    struct BlockdevOptionsGenericFormat {
        /// The node that is written compressed.
        file: BlockdevRef,
    }

    /// The members of `copy-on-read` nodes.
    struct BlockdevOptionsCor {
        /// The node that keeps what is read.
        file: BlockdevRef,
        /// The lowest node whose data is kept; any if absent.
        bottom: Option<String>,
    }
}
