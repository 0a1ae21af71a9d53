//! The protocol's types, one file per file of QEMU's schema, under QEMU's names.
//!
//! Each type is what a client can send or receive, no more: optional members are `Option`, and a
//! default is applied by whoever acts on the value. Members appear in the schema's order because
//! that is the order in which mistakes are reported.

use serde::{Deserialize, Serialize};

pub mod block_bitmap;
pub mod block_core;
pub mod block_create;
pub mod block_debug;
pub mod block_export;
pub mod block_filter;
pub mod block_graph;
pub mod block_info;
pub mod block_stats;
pub mod char;
pub mod control;
pub mod fdset;
pub mod introspect;
pub mod job;
pub mod plugin;
pub mod qcow2;
pub mod qom;
pub mod sockets;
pub mod transaction;

/// The name under which [`Size`] asks the deserializer for suffixes.
pub(crate) const SIZE: &str = "Size";

/// A number of bytes. Key=value options may spell it `64k` or `1.5G`; JSON may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Size(pub u64);

impl From<u64> for Size {
    fn from(bytes: u64) -> Self {
        Self(bytes)
    }
}

qapi! {
    /// No arguments, no members, or nothing to return.
    #[derive(Default)]
    struct Empty {}

    /// Off, on, or what the daemon finds best.
    enum OnOffAuto {
        /// Decide by circumstances.
        Auto = "auto",
        /// Always.
        On = "on",
        /// Never.
        Off = "off",
    }
}
