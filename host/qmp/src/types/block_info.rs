//! What nodes look like: the results of `query-named-block-nodes` and `query-block` (part of
//! QEMU's `block-core.json`). Some member names have underscores because QEMU's have.

use super::block_core::BlockdevDetectZeroesOptions;
use super::block_create::Qcow2CompressionType;

qapi! {
    /// How a node uses the host's page cache.
    struct BlockdevCacheInfo {
        /// Writes are acknowledged before they are durable.
        writeback: bool,
        /// The page cache is bypassed.
        direct: bool,
        /// Flush requests are ignored.
        no_flush: bool = "no-flush",
    }

    /// A child of a node (since 10.1).
    struct BlockdevChild {
        /// The role, e.g. `file` or `backing`.
        child: String,
        /// The child's node name.
        node_name: String = "node-name",
    }

    /// What requests a node takes best (since 10.2). Absent: no particular limit.
    struct BlockLimitsInfo {
        /// Offsets and lengths must be multiples of this many bytes.
        request_alignment: i64 = "request-alignment",
        /// Longest discard in bytes.
        max_discard: Option<i64> = "max-discard",
        /// Alignment of discards in bytes that frees most.
        discard_alignment: Option<i64> = "discard-alignment",
        /// Longest write of zeroes in bytes.
        max_write_zeroes: Option<i64> = "max-write-zeroes",
        /// Alignment of writes of zeroes in bytes that is fastest.
        write_zeroes_alignment: Option<i64> = "write-zeroes-alignment",
        /// Length in bytes that is fastest.
        opt_transfer: Option<i64> = "opt-transfer",
        /// Longest request in bytes.
        max_transfer: Option<i64> = "max-transfer",
        /// Longest request of the hardware in bytes.
        max_hw_transfer: Option<i64> = "max-hw-transfer",
        /// Most buffers of one request.
        max_iov: i64 = "max-iov",
        /// Most buffers of one request of the hardware.
        max_hw_iov: Option<i64> = "max-hw-iov",
        /// Buffers must be aligned to this many bytes.
        min_mem_alignment: i64 = "min-mem-alignment",
        /// Buffers should be aligned to this many bytes.
        opt_mem_alignment: i64 = "opt-mem-alignment",
    }

    /// A bitmap stored in an image.
    struct Qcow2BitmapInfo {
        /// Its name.
        name: String,
        /// Bytes for each bit.
        granularity: u32,
        /// Its state.
        flags: Vec<Qcow2BitmapInfoFlags>,
    }

    /// State of a bitmap stored in an image.
    enum Qcow2BitmapInfoFlags {
        /// Not saved properly, or in use.
        InUse = "in-use",
        /// It records writes.
        Auto = "auto",
    }

    /// What qcow2 images have that others do not.
    struct ImageInfoSpecificQCow2 {
        /// `0.10` or `1.1`.
        compat: String,
        /// Name of the external data file.
        data_file: Option<String> = "data-file",
        /// The data file is a raw image by itself.
        data_file_raw: Option<bool> = "data-file-raw",
        /// Subclusters.
        extended_l2: Option<bool> = "extended-l2",
        /// Refcount updates are postponed.
        lazy_refcounts: Option<bool> = "lazy-refcounts",
        /// The image is marked corrupt.
        corrupt: Option<bool>,
        /// Width of a refcount.
        refcount_bits: i64 = "refcount-bits",
        /// Stored bitmaps.
        bitmaps: Option<Vec<Qcow2BitmapInfo>>,
        /// How clusters are compressed.
        compression_type: Qcow2CompressionType = "compression-type",
    }

    /// [`ImageInfoSpecificQCow2`] under `data`.
    struct ImageInfoSpecificQCow2Wrapper {
        /// The information.
        data: ImageInfoSpecificQCow2,
    }

    /// What files have that others do not.
    struct ImageInfoSpecificFile {
        /// Bytes that the file system allocates at once.
        extent_size_hint: Option<u64> = "extent-size-hint",
    }

    /// [`ImageInfoSpecificFile`] under `data`.
    struct ImageInfoSpecificFileWrapper {
        /// The information.
        data: ImageInfoSpecificFile,
    }

    /// Formats with information of their own.
    enum ImageInfoSpecificKind {
        /// The format of QEMU's images.
        Qcow2 = "qcow2",
        /// A file.
        File = "file",
    }

    /// Information that only one format has.
    union ImageInfoSpecific /
        #[doc = "The formats of [`ImageInfoSpecific`]."] ImageInfoSpecificBranch
        on "type": ImageInfoSpecificKind {} {
        /// A qcow2 image.
        Qcow2(ImageInfoSpecificQCow2Wrapper) = "qcow2",
        /// A file.
        File(ImageInfoSpecificFileWrapper) = "file",
    }

    /// An image.
    struct ImageInfo {
        /// Its name, as QEMU prints it.
        filename: String,
        /// Its format.
        format: String,
        /// It was not closed cleanly.
        dirty_flag: Option<bool> = "dirty-flag",
        /// Bytes that it takes on the host.
        actual_size: Option<i64> = "actual-size",
        /// Length of the disk in bytes.
        virtual_size: i64 = "virtual-size",
        /// Bytes of a cluster.
        cluster_size: Option<i64> = "cluster-size",
        /// It is encrypted.
        encrypted: Option<bool>,
        /// It is compressed.
        compressed: Option<bool>,
        /// Name of the backing file as recorded.
        backing_filename: Option<String> = "backing-filename",
        /// Name of the backing file as resolved.
        full_backing_filename: Option<String> = "full-backing-filename",
        /// Format of the backing file as recorded.
        backing_filename_format: Option<String> = "backing-filename-format",
        /// Information that only its format has.
        format_specific: Option<ImageInfoSpecific> = "format-specific",
        /// What requests it takes best.
        limits: Option<BlockLimitsInfo>,
        /// The backing image; never in a flat listing.
        backing_image: Option<Box<ImageInfo>> = "backing-image",
    }

    /// A dirty bitmap of a node.
    struct BlockDirtyInfo {
        /// Its name.
        name: Option<String>,
        /// Dirty bytes.
        count: i64,
        /// Bytes for each bit.
        granularity: u32,
        /// It records writes.
        recording: bool,
        /// An export or a job uses it.
        busy: bool,
        /// It is stored in the image.
        persistent: bool,
        /// It was not saved properly and can only be removed.
        inconsistent: Option<bool>,
    }

    /// A node. The members named `bps` and `iops` are throttling limits; 0: none.
    struct BlockDeviceInfo {
        /// Name of the image.
        file: String,
        /// The node's name.
        node_name: String = "node-name",
        /// It refuses writes.
        ro: bool,
        /// Its driver.
        drv: String,
        /// Name of the backing file.
        backing_file: Option<String>,
        /// Length of the backing chain.
        backing_file_depth: i64,
        /// Its children (since 10.1).
        children: Vec<BlockdevChild>,
        /// It is active (since 10.0).
        active: bool,
        /// It is encrypted.
        encrypted: bool,
        /// What happens to writes of zeroes.
        detect_zeroes: BlockdevDetectZeroesOptions,
        /// Bytes per second.
        bps: i64,
        /// Bytes read per second.
        bps_rd: i64,
        /// Bytes written per second.
        bps_wr: i64,
        /// Requests per second.
        iops: i64,
        /// Reads per second.
        iops_rd: i64,
        /// Writes per second.
        iops_wr: i64,
        /// The image.
        image: ImageInfo,
        /// How the page cache is used.
        cache: BlockdevCacheInfo,
        /// Offset of writes that raises an event; 0: none.
        write_threshold: i64,
        /// Dirty bitmaps.
        dirty_bitmaps: Option<Vec<BlockDirtyInfo>> = "dirty-bitmaps",
    }

    /// A guest device. A storage daemon has none, so this only shapes an empty list.
    struct BlockInfo {
        /// Its name.
        device: String,
        /// Path of the device in the object tree.
        qdev: Option<String>,
        /// Obsolete.
        r#type: String = "type",
        /// The medium can be removed.
        removable: bool,
        /// The guest holds the medium.
        locked: bool,
        /// The medium.
        inserted: Option<BlockDeviceInfo>,
        /// The tray is open.
        tray_open: Option<bool>,
    }
}
