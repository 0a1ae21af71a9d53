//! The NBD server and exports (QEMU's `block-export.json`).

use super::OnOffAuto;
use super::sockets::{SocketAddress, SocketAddressLegacy};
use serde_json::{Map, Value};

qapi! {
    /// Arguments of `nbd-server-start`.
    struct NbdServerStart {
        /// Seconds from accept to the end of negotiation; 10 if absent, 0: no limit (since 10.0).
        handshake_max_seconds: Option<u32> = "handshake-max-seconds",
        /// Id of the TLS credentials; without them there is no TLS.
        tls_creds: Option<String> = "tls-creds",
        /// Id of the authorization object that is asked about clients.
        tls_authz: Option<String> = "tls-authz",
        /// Clients at a time; 100 if absent, 0: no limit.
        max_connections: Option<u32> = "max-connections",
        /// Where to listen.
        addr: SocketAddressLegacy,
        /// Id of one more server beside the default one (ours).
        id: Option<String>,
        /// Id of the authorization object that is asked when a client names an export (ours).
        authz: Option<String>,
        /// Whether clients about whom nobody is asked are refused; no if absent (ours).
        strict_authz: Option<bool> = "strict-authz",
    }

    /// The NBD server as the command line defines it, with a flat address.
    struct NbdServerOptions {
        /// Seconds from accept to the end of negotiation; 10 if absent, 0: no limit (since 10.0).
        handshake_max_seconds: Option<u32> = "handshake-max-seconds",
        /// Id of the TLS credentials; without them there is no TLS.
        tls_creds: Option<String> = "tls-creds",
        /// Id of the authorization object that is asked about clients.
        tls_authz: Option<String> = "tls-authz",
        /// Clients at a time; 100 if absent, 0: no limit.
        max_connections: Option<u32> = "max-connections",
        /// Where to listen.
        addr: SocketAddress,
        /// Id of one more server beside the default one (ours).
        id: Option<String>,
        /// Id of the authorization object that is asked when a client names an export (ours).
        authz: Option<String>,
        /// Whether clients about whom nobody is asked are refused; no if absent (ours).
        strict_authz: Option<bool> = "strict-authz",
    }

    /// Arguments of `nbd-server-stop`.
    #[derive(Default)]
    struct NbdServerStop {
        /// Id of the server; the default one if absent (ours).
        id: Option<String>,
    }

    /// An element of `query-nbd-servers` (ours).
    struct NbdServerInfo {
        /// Id of the server; absent for the default one.
        id: Option<String>,
        /// Where it listens: with the port that was chosen.
        addr: SocketAddress,
        /// Clients now, those in their handshake included.
        connections: u32,
        /// Clients at a time; 0: no limit.
        max_connections: u32 = "max-connections",
        /// Seconds from accept to the end of negotiation; 0: no limit.
        handshake_max_seconds: u32 = "handshake-max-seconds",
        /// Ids of its exports, newest first.
        exports: Vec<String>,
    }

    /// An element of `query-export-stats` (ours). Sums since the export was added.
    struct BlockExportStats {
        /// Id of the export.
        id: String,
        /// The node that it exports.
        node_name: String = "node-name",
        /// Clients now.
        clients: u64,
        /// Clients that ever entered.
        connections: u64,
        /// Bytes read.
        rd_bytes: u64 = "rd-bytes",
        /// Bytes written.
        wr_bytes: u64 = "wr-bytes",
        /// Reads.
        rd_operations: u64 = "rd-operations",
        /// Writes, those of zeroes included.
        wr_operations: u64 = "wr-operations",
        /// Flushes.
        flush_operations: u64 = "flush-operations",
        /// Discards.
        unmap_operations: u64 = "unmap-operations",
        /// Requests that failed.
        errors: u64,
        /// Requests that could not be answered at once.
        waited_operations: u64 = "waited-operations",
        /// Those of them that are not answered yet.
        in_flight: u64 = "in-flight",
        /// How long those took that were answered.
        waited_total_time_ns: u64 = "waited-total-time-ns",
    }

    /// Arguments of the deprecated `nbd-server-add`.
    struct NbdServerAdd {
        /// Export name, and id of the export; `device` if absent.
        name: Option<String>,
        /// Text for people.
        description: Option<String>,
        /// The node to export.
        device: String,
        /// Whether clients may write.
        writable: Option<bool>,
        /// A dirty bitmap to offer.
        bitmap: Option<String>,
    }

    /// Arguments of the deprecated `nbd-server-remove`.
    struct NbdServerRemove {
        /// Id of the export.
        name: String,
        /// What happens to its users.
        mode: Option<BlockExportRemoveMode>,
    }

    /// What happens to the users of an export that is deleted.
    enum BlockExportRemoveMode {
        /// The export stays while it has users.
        Safe = "safe",
        /// Users are cut off.
        Hard = "hard",
    }

    /// Kinds of export.
    enum BlockExportType {
        /// NBD.
        Nbd = "nbd",
        /// A virtio block device for a virtual machine.
        VhostUserBlk = "vhost-user-blk",
        /// A file in the file system.
        Fuse = "fuse",
    }

    /// A bitmap of one particular node.
    struct BlockDirtyBitmap {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    }

    /// A bitmap, by name along the chain, or of one particular node (since 7.1).
    alternate BlockDirtyBitmapOrStr {
        /// The name, looked up from the exported node down.
        Local(String) = "<string>",
        /// A bitmap of one particular node.
        External(BlockDirtyBitmap) = "<object>",
    }

    /// A provider of NBD metadata contexts that a plugin brings (ours).
    struct MetadataContextRef {
        /// Id of the plugin object.
        plugin: String,
        /// Configuration, checked by the plugin.
        config: Option<Map<String, Value>>,
    }

    /// The members of NBD exports.
    #[derive(Default)]
    struct BlockExportOptionsNbd {
        /// Export name; the node's if absent.
        name: Option<String>,
        /// Text for people.
        description: Option<String>,
        /// Dirty bitmaps to offer as metadata contexts.
        bitmaps: Option<Vec<BlockDirtyBitmapOrStr>>,
        /// Whether `qemu:allocation-depth` is offered.
        allocation_depth: Option<bool> = "allocation-depth",
        /// Further metadata contexts, from plugins (ours).
        metadata_contexts: Option<Vec<MetadataContextRef>> = "metadata-contexts",
        /// Whether reads are refused but where one of `bitmaps` is dirty (ours).
        restrict_reads: Option<bool> = "restrict-reads",
        /// Whether the node gives up what a client has read: for temporary copies that are read
        /// once. The export must be writable; what a client reads that was granted read-only access
        /// stays (ours).
        discard_after_read: Option<bool> = "discard-after-read",
        /// Id of the NBD server; the default one if absent (ours).
        server: Option<String>,
        /// Clients at a time; absent or 0: as many as the server takes (ours).
        max_connections: Option<u32> = "max-connections",
    }

    /// The members of vhost-user-blk exports.
    struct BlockExportOptionsVhostUserBlk {
        /// Where to listen: `unix` or `fd`.
        addr: SocketAddress,
        /// Bytes of a logical block; 512 if absent.
        logical_block_size: Option<u64> = "logical-block-size",
        /// Queues of the device; 1 if absent.
        num_queues: Option<u16> = "num-queues",
        /// Entries of a queue, at most; 32768 if absent (ours).
        queue_size: Option<u16> = "queue-size",
        /// What the guest reads as the disk's serial number; the id if absent (ours).
        serial: Option<String>,
    }

    /// The members of FUSE exports.
    struct BlockExportOptionsFuse {
        /// The regular file to mount over.
        mountpoint: String,
        /// Whether writes past the end grow the node.
        growable: Option<bool>,
        /// Whether other users may open the file; `auto` if absent.
        allow_other: Option<OnOffAuto> = "allow-other",
        /// Whether the kernel may read the node's file itself, if the export is read-only and the
        /// node nothing but that file (ours).
        passthrough: Option<bool>,
    }

    /// One iothread, or several (since 10.1).
    alternate BlockExportIothreads {
        /// The only iothread, to which the node is moved.
        Single(String) = "<string>",
        /// Iothreads that share the export's work.
        Multi(Vec<String>) = "<array>",
    }

    /// An export to add: arguments of `block-export-add`.
    union BlockExportOptions /
        #[doc = "Kinds of export, with the members that each has."] BlockExportBranch
        on "type": BlockExportType {
        /// Id of the export.
        id: String,
        /// Whether the node stays in `iothread` for good.
        fixed_iothread: Option<bool> = "fixed-iothread",
        /// Where requests are served.
        iothread: Option<BlockExportIothreads>,
        /// The node to export.
        node_name: String = "node-name",
        /// Whether clients may write.
        writable: Option<bool>,
        /// Whether each write is flushed before it is acknowledged.
        writethrough: Option<bool>,
        /// Whether the node may be inactive (since 10.0).
        allow_inactive: Option<bool> = "allow-inactive",
        /// Id of the authorization object that is asked about clients (ours).
        authz: Option<String>,
    } {
        /// NBD.
        Nbd(BlockExportOptionsNbd) = "nbd",
        /// A virtio block device.
        VhostUserBlk(BlockExportOptionsVhostUserBlk) = "vhost-user-blk",
        /// A file.
        Fuse(BlockExportOptionsFuse) = "fuse",
    }

    /// Arguments of `block-export-del`.
    struct BlockExportDel {
        /// Id of the export.
        id: String,
        /// What happens to its users; `safe` if absent.
        mode: Option<BlockExportRemoveMode>,
    }

    /// An element of `query-block-exports`.
    struct BlockExportInfo {
        /// Id of the export.
        id: String,
        /// Its kind.
        r#type: BlockExportType = "type",
        /// The node that it exports.
        node_name: String = "node-name",
        /// It waits for its last request.
        shutting_down: bool = "shutting-down",
    }
}

impl BlockExportOptions {
    /// The kind of export.
    pub fn export_type(&self) -> BlockExportType {
        match self.branch {
            BlockExportBranch::Nbd(_) => BlockExportType::Nbd,
            BlockExportBranch::VhostUserBlk(_) => BlockExportType::VhostUserBlk,
            BlockExportBranch::Fuse(_) => BlockExportType::Fuse,
        }
    }
}

impl From<NbdServerOptions> for NbdServerStart {
    fn from(options: NbdServerOptions) -> Self {
        Self {
            handshake_max_seconds: options.handshake_max_seconds,
            tls_creds: options.tls_creds,
            tls_authz: options.tls_authz,
            max_connections: options.max_connections,
            addr: options.addr.into(),
            id: options.id,
            authz: options.authz,
            strict_authz: options.strict_authz,
        }
    }
}

impl From<NbdServerStart> for NbdServerOptions {
    fn from(start: NbdServerStart) -> Self {
        Self {
            handshake_max_seconds: start.handshake_max_seconds,
            tls_creds: start.tls_creds,
            tls_authz: start.tls_authz,
            max_connections: start.max_connections,
            addr: start.addr.into(),
            id: start.id,
            authz: start.authz,
            strict_authz: start.strict_authz,
        }
    }
}
