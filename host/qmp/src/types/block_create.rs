//! Images to create: the options of `blockdev-create` (part of QEMU's `block-core.json`).

use super::Size;
use super::block_core::{BlockdevDriver, BlockdevRef};
use super::qcow2::QCryptoBlockOptions;
use serde_json::{Map, Value};

qapi! {
    /// How much of a new image takes space at once.
    enum PreallocMode {
        /// Nothing.
        Off = "off",
        /// The structures, but not the data.
        Metadata = "metadata",
        /// Everything, reserved without being written.
        Falloc = "falloc",
        /// Everything, written.
        Full = "full",
    }

    /// Versions of the qcow2 format.
    enum BlockdevQcow2Version {
        /// `compat=0.10`.
        V2 = "v2",
        /// `compat=1.1`.
        V3 = "v3",
    }

    /// How the clusters of an image are compressed.
    enum Qcow2CompressionType {
        /// Deflate.
        Zlib = "zlib",
        /// Zstandard.
        Zstd = "zstd",
    }

    /// Encryption methods of a new image.
    enum QCryptoBlockFormat {
        /// The legacy method.
        Qcow = "qcow",
        /// LUKS.
        Luks = "luks",
    }

    /// How a new image is encrypted.
    union QCryptoBlockCreateOptions /
        #[doc = "The methods of [`QCryptoBlockCreateOptions`]."] QCryptoBlockCreateBranch
        on "format": QCryptoBlockFormat {} {
        /// The legacy method.
        Qcow(QCryptoBlockOptions) = "qcow",
        /// LUKS.
        Luks(QCryptoBlockOptions) = "luks",
    }

    /// A new file.
    struct BlockdevCreateOptionsFile {
        /// Path of the file.
        filename: String,
        /// Length in bytes.
        size: Size,
        /// How much takes space at once.
        preallocation: Option<PreallocMode>,
        /// Switch copy-on-write off on file systems that have it.
        nocow: Option<bool>,
        /// Bytes that the file system should allocate at once; 0: its own choice.
        extent_size_hint: Option<Size> = "extent-size-hint",
    }

    /// A new qcow2 image in a node that exists.
    struct BlockdevCreateOptionsQcow2 {
        /// The node to write the image into.
        file: BlockdevRef,
        /// The node to hold the data, if not `file`.
        data_file: Option<BlockdevRef> = "data-file",
        /// The data file is a raw image by itself.
        data_file_raw: Option<bool> = "data-file-raw",
        /// Subclusters.
        extended_l2: Option<bool> = "extended-l2",
        /// Length of the disk in bytes.
        size: Size,
        /// Version of the format; `v3` if absent.
        version: Option<BlockdevQcow2Version>,
        /// Name of the backing file to record.
        backing_file: Option<String> = "backing-file",
        /// Format of the backing file to record.
        backing_fmt: Option<BlockdevDriver> = "backing-fmt",
        /// How the image is encrypted.
        encrypt: Option<QCryptoBlockCreateOptions>,
        /// Bytes of a cluster; 64 KiB if absent.
        cluster_size: Option<Size> = "cluster-size",
        /// How much takes space at once.
        preallocation: Option<PreallocMode>,
        /// Postpone refcount updates.
        lazy_refcounts: Option<bool> = "lazy-refcounts",
        /// Width of a refcount; 16 if absent.
        refcount_bits: Option<i64> = "refcount-bits",
        /// How clusters are compressed.
        compression_type: Option<Qcow2CompressionType> = "compression-type",
    }

    /// An image to create, by driver.
    union BlockdevCreateOptions /
        #[doc = "Drivers that `blockdev-create` knows."] BlockdevCreateBranch
        on "driver": BlockdevDriver {} {
        /// Nothing to create.
        Blkdebug(super::Empty) = "blkdebug",
        /// Nothing to create.
        Compress(super::Empty) = "compress",
        /// Nothing to create.
        CopyOnRead(super::Empty) = "copy-on-read",
        /// A file.
        File(BlockdevCreateOptionsFile) = "file",
        /// Nothing to create.
        HostDevice(super::Empty) = "host_device",
        /// Nothing to create.
        Nbd(super::Empty) = "nbd",
        /// Nothing to create.
        NullAio(super::Empty) = "null-aio",
        /// Nothing to create.
        NullCo(super::Empty) = "null-co",
        /// A qcow2 image.
        Qcow2(Box<BlockdevCreateOptionsQcow2>) = "qcow2",
        /// Nothing to create.
        Raw(super::Empty) = "raw",
        /// Nothing to create.
        Throttle(super::Empty) = "throttle";
        /// An image of a plugin's format.
        else Plugin(PluginCreateOptions),
    }

    /// Arguments of `blockdev-create`.
    struct BlockdevCreate {
        /// Id of the job that does it.
        job_id: String = "job-id",
        /// What to create.
        options: BlockdevCreateOptions,
    }
}

/// The options for an image of a plugin's format, all of which the plugin checks.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PluginCreateOptions {
    /// The driver's name.
    pub driver: String,
    /// All other members.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl PluginCreateOptions {
    pub(crate) fn tag(&self) -> &str {
        &self.driver
    }

    pub(crate) fn new(driver: String, options: Map<String, Value>) -> Self {
        Self { driver, options }
    }
}
