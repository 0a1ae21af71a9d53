//! Objects (QEMU's `qom.json`).

use super::block_filter::ThrottleGroupProperties;
use super::plugin::WasmPluginProperties;

qapi! {
    /// Types of object that can be added.
    enum ObjectType {
        /// A thread that serves requests.
        Iothread = "iothread",
        /// Limits that nodes share.
        ThrottleGroup = "throttle-group",
        /// A sandboxed component (ours).
        WasmPlugin = "wasm-plugin",
    }

    /// The properties of an iothread.
    #[derive(Default)]
    struct IothreadProperties {
        /// Requests submitted at once at most; 0: the daemon's choice.
        aio_max_batch: Option<i64> = "aio-max-batch",
        /// Threads that are kept for blocking work.
        thread_pool_min: Option<i64> = "thread-pool-min",
        /// Most threads for blocking work; 64 if absent.
        thread_pool_max: Option<i64> = "thread-pool-max",
        /// Longest spin before sleeping, in nanoseconds; 32768 if absent, 0: never spin.
        poll_max_ns: Option<i64> = "poll-max-ns",
        /// Factor by which the spin grows.
        poll_grow: Option<i64> = "poll-grow",
        /// Divisor by which the spin shrinks.
        poll_shrink: Option<i64> = "poll-shrink",
        /// Weight of the newest sample in the spin's adaption, 0 to 63 (since 11.1).
        poll_weight: Option<i64> = "poll-weight",
    }

    /// An object to add: arguments of `object-add`.
    union ObjectOptions / #[doc = "Types of object, with their properties."] ObjectBranch
        on "qom-type": ObjectType {
        /// Id of the object.
        id: String,
    } {
        /// A thread that serves requests.
        Iothread(IothreadProperties) = "iothread",
        /// Limits that nodes share.
        ThrottleGroup(Box<ThrottleGroupProperties>) = "throttle-group",
        /// A sandboxed component (ours).
        WasmPlugin(WasmPluginProperties) = "wasm-plugin",
    }

    /// Arguments of `object-del`.
    struct ObjectDel {
        /// Id of the object.
        id: String,
    }

    /// Arguments of `qom-list`.
    struct QomList {
        /// A path in the object tree, e.g. `/objects`.
        path: String,
    }

    /// An element of `qom-list`.
    struct ObjectPropertyInfo {
        /// Name of the property.
        name: String,
        /// Its type; `child<T>` for an object below this one.
        r#type: String = "type",
        /// Text for people.
        description: Option<String>,
        /// The value that it has by default.
        default_value: Option<serde_json::Value> = "default-value",
    }
}
