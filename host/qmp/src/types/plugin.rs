//! Plugins: objects, listing and faults. Ours throughout; QEMU has nothing of the kind.

use super::Size;

qapi! {
    /// The properties of a plugin object.
    struct WasmPluginProperties {
        /// Path of the component.
        filename: String,
        /// The component's SHA-256 in lower-case hexadecimal; anything else is refused.
        sha256: Option<String>,
        /// Load the component although `sha256` is absent.
        allow_unpinned: Option<bool> = "allow-unpinned",
        /// Most bytes of memory that one instance may take.
        memory_max: Option<Size> = "memory-max",
        /// Most milliseconds that one call may take.
        call_time_max_ms: Option<u64> = "call-time-max-ms",
    }

    /// What a plugin is for.
    enum PluginKind {
        /// Image formats.
        Format = "format",
        /// NBD metadata contexts.
        MetadataContext = "metadata-context",
        /// Authorization.
        Authz = "authz",
    }

    /// An element of `query-plugins`.
    struct PluginInfo {
        /// Id of the object, or the name of a bundled plugin.
        name: String,
        /// What it is for.
        kind: PluginKind,
        /// Its own version.
        version: String,
        /// Drivers that it brings, if it is a format.
        drivers: Vec<String>,
        /// It came with the daemon.
        bundled: bool,
        /// SHA-256 of the component in lower-case hexadecimal.
        sha256: String,
        /// Most bytes of memory that one instance may take.
        memory_max: u64 = "memory-max",
        /// Most milliseconds that one call may take.
        call_time_max_ms: u64 = "call-time-max-ms",
        /// Calls so far.
        calls: u64,
        /// Faults so far.
        faults: u64,
    }

    /// How a plugin failed.
    enum PluginFault {
        /// It executed something illegal.
        Trap = "trap",
        /// A call took too long.
        Deadline = "deadline",
        /// It wanted too much memory.
        Memory = "memory",
        /// It described an extent that cannot be.
        BadExtent = "bad-extent",
        /// It answered outside the contract in another way.
        BadAnswer = "bad-answer",
        /// It used a file or a function that it was not granted.
        Denied = "denied",
    }
}
