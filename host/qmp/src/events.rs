//! Events: what the daemon tells every negotiated monitor without being asked.
//!
//! One table gives an event its name and the type of its data. None of these is rate-limited
//! (spec 1.7).

use serde_json::Value;

use crate::introspect::Types;
use crate::types::job::JobStatus;
use crate::types::plugin::PluginFault;

qapi! {
    /// Data of [`Event::BlockExportDeleted`].
    struct BlockExportDeleted {
        /// Id of the export, which may be used again from now on.
        id: String,
    }

    /// Data of [`Event::BlockImageCorrupted`].
    struct BlockImageCorrupted {
        /// Guest device; empty in a storage daemon.
        device: String,
        /// The node.
        node_name: Option<String> = "node-name",
        /// What is wrong, for people.
        msg: String,
        /// Where in the file, in bytes.
        offset: Option<i64>,
        /// How many bytes.
        size: Option<i64>,
        /// The node refuses further requests.
        fatal: bool,
    }

    /// Data of [`Event::BlockWriteThreshold`].
    struct BlockWriteThreshold {
        /// The node.
        node_name: String = "node-name",
        /// How far past the threshold the write ended, in bytes.
        amount_exceeded: u64 = "amount-exceeded",
        /// The threshold, which is off from now on.
        write_threshold: u64 = "write-threshold",
    }

    /// Data of [`Event::JobStatusChange`].
    struct JobStatusChange {
        /// Id of the job.
        id: String,
        /// Its new state.
        status: JobStatus,
    }

    /// Data of [`Event::OutportPluginFault`].
    struct OutportPluginFault {
        /// Id of the plugin object, or the name of a bundled plugin.
        plugin: String,
        /// The node that the plugin served.
        node_name: Option<String> = "node-name",
        /// The authorization object that it served.
        object: Option<String>,
        /// The export that it served with metadata contexts.
        export: Option<String>,
        /// How the plugin failed.
        fault: PluginFault,
        /// The details, for people.
        message: String,
    }
}

macro_rules! events {
    ($($(#[$meta:meta])* $wire:literal $Name:ident;)*) => {
        /// An event with its data.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Event {
            $($(#[$meta])* $Name($Name),)*
        }

        impl Event {
            /// The event's name on the wire.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$Name(_) => $wire,)*
                }
            }

            /// The event's data; `None` if it has none.
            pub fn data(&self) -> Option<Value> {
                let data = match self {
                    $(Self::$Name(data) => serde_json::to_value(data),)*
                };
                data.ok().filter(|data| data.as_object().is_some_and(|data| !data.is_empty()))
            }
        }

        /// Enters all events into the schema.
        pub(crate) fn describe(types: &mut Types) {
            $(types.event::<$Name>($wire);)*
        }
    };
}

events! {
    /// An export is gone: its id may be used again.
    "BLOCK_EXPORT_DELETED" BlockExportDeleted;
    /// An image contradicts itself.
    "BLOCK_IMAGE_CORRUPTED" BlockImageCorrupted;
    /// A write ended past a threshold.
    "BLOCK_WRITE_THRESHOLD" BlockWriteThreshold;
    /// A job entered another state.
    "JOB_STATUS_CHANGE" JobStatusChange;
    /// A plugin failed (ours).
    "OUTPORT_PLUGIN_FAULT" OutportPluginFault;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_leaves_out_what_is_absent() {
        let event = Event::OutportPluginFault(OutportPluginFault {
            plugin: "acme".into(),
            node_name: None,
            object: None,
            export: None,
            fault: PluginFault::BadExtent,
            message: "past the end".into(),
        });
        let want = serde_json::json!(
            {"plugin": "acme", "fault": "bad-extent", "message": "past the end"}
        );
        assert_eq!(
            (event.name(), event.data()),
            ("OUTPORT_PLUGIN_FAULT", Some(want))
        );
    }
}
