//! Nodes: what `blockdev-add` and its neighbours take (QEMU's `block-core.json`).

use serde_json::{Map, Value};

use super::block_debug::BlockdevOptionsBlkdebug;
use super::block_filter::{
    BlockdevOptionsCor, BlockdevOptionsGenericFormat, BlockdevOptionsThrottle,
};
use super::qcow2::BlockdevOptionsQcow2;
use super::sockets::SocketAddress;
use crate::de::{self, Mode};
use crate::error::Error;

qapi! {
    /// Drivers with options of their own. Any other name is a plugin's.
    open enum BlockdevDriver {
        /// Injects errors.
        Blkdebug = "blkdebug",
        /// Writes compressed.
        Compress = "compress",
        /// Keeps what is read from a backing node.
        CopyOnRead = "copy-on-read",
        /// A regular file.
        File = "file",
        /// A block device of the host.
        HostDevice = "host_device",
        /// An export of another NBD server.
        Nbd = "nbd",
        /// Reads as zeroes, asynchronously.
        NullAio = "null-aio",
        /// Reads as zeroes.
        NullCo = "null-co",
        /// The format of QEMU's images.
        Qcow2 = "qcow2",
        /// The bytes of another node.
        Raw = "raw",
        /// Makes requests wait for limits.
        Throttle = "throttle";
        /// A driver that a plugin brings.
        else Plugin,
    }

    /// What happens to discard requests.
    enum BlockdevDiscardOptions {
        /// They are ignored.
        Ignore = "ignore",
        /// They free space.
        Unmap = "unmap",
    }

    /// What happens to writes of zeroes.
    enum BlockdevDetectZeroesOptions {
        /// They are not detected.
        Off = "off",
        /// They become requests to write zeroes.
        On = "on",
        /// They become discards as well, if the node discards.
        Unmap = "unmap",
    }

    /// How the host's page cache is used.
    #[derive(Default)]
    struct BlockdevCacheOptions {
        /// Bypass it (`O_DIRECT`).
        direct: Option<bool>,
        /// Ignore flush requests.
        no_flush: Option<bool> = "no-flush",
    }

    /// How requests reach a file.
    enum BlockdevAioOptions {
        /// A pool of threads.
        Threads = "threads",
        /// Linux native asynchronous I/O.
        Native = "native",
        /// `io_uring`.
        IoUring = "io_uring",
    }

    /// The members of `file` and `host_device` nodes.
    struct BlockdevOptionsFile {
        /// Path of the file.
        filename: String,
        /// Id of the persistent-reservation object.
        pr_manager: Option<String> = "pr-manager",
        /// Whether the file is locked against other processes.
        locking: Option<super::OnOffAuto>,
        /// How requests reach the file.
        aio: Option<BlockdevAioOptions>,
        /// Requests submitted at once at most; 0: the daemon's choice.
        aio_max_batch: Option<i64> = "aio-max-batch",
        /// Drop cached pages when the node is given to another host.
        drop_cache: Option<bool> = "drop-cache",
        /// Check that no page stayed cached after `drop-cache`.
        x_check_cache_dropped: Option<bool> = "x-check-cache-dropped" [unstable],
    }

    /// The members of `nbd` nodes.
    struct BlockdevOptionsNbd {
        /// Where the server listens.
        server: SocketAddress,
        /// The export's name; the default export if absent.
        export: Option<String>,
        /// Id of the TLS credentials.
        tls_creds: Option<String> = "tls-creds",
        /// The name that the server's certificate must have.
        tls_hostname: Option<String> = "tls-hostname",
        /// A dirty bitmap of the server to report as allocation.
        x_dirty_bitmap: Option<String> = "x-dirty-bitmap" [unstable],
        /// Seconds for which requests wait when the connection was lost; 0: they fail at once.
        reconnect_delay: Option<u32> = "reconnect-delay",
        /// Seconds for which the first connection is tried again; 0: once.
        open_timeout: Option<u32> = "open-timeout",
    }

    /// The members of `null-co` and `null-aio` nodes.
    struct BlockdevOptionsNull {
        /// Length in bytes; 1 GiB if absent. May be negative here: whoever adds the node checks.
        size: Option<i64>,
        /// Nanoseconds that each request takes.
        latency_ns: Option<u64> = "latency-ns",
        /// Whether reads return zeroes rather than leave the buffer alone.
        read_zeroes: Option<bool> = "read-zeroes",
    }

    /// The members of `raw` nodes.
    struct BlockdevOptionsRaw {
        /// The node whose bytes these are.
        file: BlockdevRef,
        /// Where in `file` this node starts, in bytes.
        offset: Option<i64>,
        /// Length in bytes; up to the end of `file` if absent.
        size: Option<i64>,
    }

    /// A node to add: what all drivers have in common, and the driver with its own members.
    union BlockdevOptions / #[doc = "Drivers and their members."] BlockdevDriverOptions
        on "driver": BlockdevDriver {
        /// The name by which commands refer to the node; mandatory for a root.
        node_name: Option<String> = "node-name",
        /// What happens to discard requests.
        discard: Option<BlockdevDiscardOptions>,
        /// How the host's page cache is used.
        cache: Option<BlockdevCacheOptions>,
        /// Whether the node starts active (since 10.0).
        active: Option<bool>,
        /// Whether writes are refused.
        read_only: Option<bool> = "read-only",
        /// Whether the node becomes read-only if it cannot be opened for writing.
        auto_read_only: Option<bool> = "auto-read-only",
        /// Whether others may do to the image what they like while it is read.
        force_share: Option<bool> = "force-share",
        /// What happens to writes of zeroes.
        detect_zeroes: Option<BlockdevDetectZeroesOptions> = "detect-zeroes",
    } {
        /// Injects errors.
        Blkdebug(Box<BlockdevOptionsBlkdebug>) = "blkdebug",
        /// Writes compressed.
        Compress(BlockdevOptionsGenericFormat) = "compress",
        /// Keeps what is read from a backing node.
        CopyOnRead(BlockdevOptionsCor) = "copy-on-read",
        /// A regular file.
        File(BlockdevOptionsFile) = "file",
        /// A block device of the host.
        HostDevice(BlockdevOptionsFile) = "host_device",
        /// An export of another NBD server.
        Nbd(BlockdevOptionsNbd) = "nbd",
        /// Zeroes, asynchronously.
        NullAio(BlockdevOptionsNull) = "null-aio",
        /// Zeroes.
        NullCo(BlockdevOptionsNull) = "null-co",
        /// The format of QEMU's images.
        Qcow2(Box<BlockdevOptionsQcow2>) = "qcow2",
        /// The bytes of another node.
        Raw(BlockdevOptionsRaw) = "raw",
        /// Makes requests wait for limits.
        Throttle(BlockdevOptionsThrottle) = "throttle";
        /// A driver that a plugin brings, with options that only the plugin knows.
        else Plugin(PluginDriverOptions),
    }

    /// A node: the name of one that exists, or the definition of a new one.
    alternate BlockdevRef {
        /// A node to add, which lives as long as its parent.
        Definition(Box<BlockdevOptions>) = "<object>",
        /// The name of a node.
        Reference(String) = "<string>",
    }

    /// A node, or explicitly none.
    alternate BlockdevRefOrNull {
        /// A node to add, which lives as long as its parent.
        Definition(Box<BlockdevOptions>) = "<object>",
        /// The name of a node. The empty string means none, as `null` does.
        Reference(String) = "<string>",
        /// No node.
        Null(()) = "<null>",
    }

    /// Arguments of `blockdev-reopen`.
    struct BlockdevReopen {
        /// The nodes, each with all of its options.
        options: Vec<BlockdevOptions>,
    }

    /// Arguments of `blockdev-set-active`.
    struct BlockdevSetActive {
        /// The node; all nodes if absent.
        node_name: Option<String> = "node-name",
        /// Whether it is ours, or somebody else's for now.
        active: bool,
    }

    /// Arguments of `block-set-write-threshold`.
    struct BlockSetWriteThreshold {
        /// The node.
        node_name: String = "node-name",
        /// The first write past so many bytes is told; 0: none.
        write_threshold: u64 = "write-threshold",
    }

    /// Arguments of `blockdev-del`.
    struct BlockdevDel {
        /// The node to delete.
        node_name: String = "node-name",
    }

    /// Arguments of `query-named-block-nodes`.
    #[derive(Default)]
    struct QueryNamedBlockNodes {
        /// Leave out the information on backing images.
        flat: Option<bool>,
    }

    /// Arguments of `query-block`.
    #[derive(Default)]
    struct QueryBlock {
        /// Leave out the information on backing images (since 11.1).
        flat: Option<bool>,
    }

    /// A text, or explicitly none.
    alternate StrOrNull {
        /// A text.
        Text(String) = "<string>",
        /// None.
        Null(()) = "<null>",
    }

    /// Arguments of `x-blockdev-set-iothread`.
    struct BlockdevSetIothread {
        /// The node to move, with all that it is connected with.
        node_name: String = "node-name",
        /// The iothread object; `null` means the default one.
        iothread: StrOrNull,
        /// Move a node that exports use, too.
        force: Option<bool>,
    }

    /// Arguments of `block_resize`.
    struct BlockResize {
        /// A device, which a storage daemon does not have.
        device: Option<String>,
        /// The node to resize.
        node_name: Option<String> = "node-name",
        /// The new length in bytes. May be negative here: whoever resizes checks.
        size: i64,
    }
}

impl BlockdevOptions {
    /// The driver's name.
    pub fn driver(&self) -> &str {
        self.branch.tag()
    }

    /// The children that the options name or define, but for those of a plugin's driver, which are
    /// still among its other options ([`PluginDriverOptions::CHILDREN`]). No other place says which
    /// members of a native driver are nodes.
    pub fn children_mut(&mut self) -> Vec<ChildMut<'_>> {
        match &mut self.branch {
            BlockdevDriverOptions::Blkdebug(it) => vec![ChildMut::of(&mut it.image)],
            BlockdevDriverOptions::Compress(it) => vec![ChildMut::of(&mut it.file)],
            BlockdevDriverOptions::CopyOnRead(it) => vec![ChildMut::of(&mut it.file)],
            BlockdevDriverOptions::Qcow2(it) => {
                let data_file = it.data_file.as_mut().map(ChildMut::of);
                let backing = it.backing.as_mut().and_then(ChildMut::of_optional);
                let file = Some(ChildMut::of(&mut it.file));
                file.into_iter().chain(data_file).chain(backing).collect()
            }
            BlockdevDriverOptions::Raw(it) => vec![ChildMut::of(&mut it.file)],
            BlockdevDriverOptions::Throttle(it) => vec![ChildMut::of(&mut it.file)],
            BlockdevDriverOptions::File(_)
            | BlockdevDriverOptions::HostDevice(_)
            | BlockdevDriverOptions::Nbd(_)
            | BlockdevDriverOptions::NullAio(_)
            | BlockdevDriverOptions::NullCo(_)
            | BlockdevDriverOptions::Plugin(_) => Vec::new(),
        }
    }
}

/// A child in the options of its parent.
#[derive(Debug)]
pub enum ChildMut<'a> {
    /// The name of a node that exists.
    Reference(&'a mut String),
    /// A node that comes with its parent.
    Definition(&'a mut BlockdevOptions),
}

impl<'a> ChildMut<'a> {
    fn of(child: &'a mut BlockdevRef) -> Self {
        match child {
            BlockdevRef::Definition(it) => Self::Definition(it),
            BlockdevRef::Reference(name) => Self::Reference(name),
        }
    }

    fn of_optional(child: &'a mut BlockdevRefOrNull) -> Option<Self> {
        match child {
            BlockdevRefOrNull::Definition(it) => Some(Self::Definition(it)),
            BlockdevRefOrNull::Reference(name) if name.is_empty() => None,
            BlockdevRefOrNull::Reference(name) => Some(Self::Reference(name)),
            BlockdevRefOrNull::Null(()) => None,
        }
    }
}

/// The options of a driver that a plugin brings. The plugin's own schema checks what is left after
/// its children were taken; if no plugin has the driver, the command fails with
/// `Parameter 'driver' does not accept value ...` ([`PluginDriverOptions::unknown_driver`]).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PluginDriverOptions {
    /// The driver's name.
    pub driver: String,
    /// All members but those that every node has.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl PluginDriverOptions {
    /// Members that are nodes, whatever the plugin.
    pub const CHILDREN: [&'static str; 3] = ["file", "data-file", "backing"];

    pub(crate) fn tag(&self) -> &str {
        &self.driver
    }

    pub(crate) fn new(driver: String, options: Map<String, Value>) -> Self {
        Self { driver, options }
    }

    /// Takes the child `name`, such as `file`, out of the options; `None` if it is absent.
    ///
    /// # Errors
    /// As [`de::from_value`], if the member is no node.
    pub fn take_child(&mut self, name: &str, mode: Mode) -> Result<Option<BlockdevRef>, Error> {
        let child = de::from_member(&self.options, name, mode)?;
        self.options.remove(name);
        Ok(child)
    }

    /// Takes the child `backing` out of the options; `None` if it is absent.
    ///
    /// # Errors
    /// As [`de::from_value`], if the member is neither a node nor `null`.
    pub fn take_backing(&mut self, mode: Mode) -> Result<Option<BlockdevRefOrNull>, Error> {
        let child = de::from_member(&self.options, "backing", mode)?;
        self.options.remove("backing");
        Ok(child)
    }

    /// The error for a driver that nobody has.
    pub fn unknown_driver(&self) -> Error {
        Error::bad_enum("driver", &self.driver)
    }
}
