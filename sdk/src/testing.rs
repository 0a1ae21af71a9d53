//! A host in memory, and the crash checker: what a plugin's tests run against.
//!
//! ```text
//! your test -> TestNode  read, write, discard, flush ... by guest offset
//!                 |      every answer of the plugin is judged as the daemon does
//!              your T <- MemoryHost  files, transactions, stages, quarantine
//! ```
//!
//! - [`TestNode`] is enough for a read-only format;
//! - [`model`] runs random operations on a writable one and on plain bytes;
//! - [`crash`] cuts the power at every point of a workload and reopens.
//!
//! A policy needs no disk: [`TestPolicy`] asks it, with files from memory. A
//! provider sees a node in words: [`TestProvider`].
//!
//! Invariant: everything is deterministic; a failure names the seed.

#![forbid(unsafe_code)]

pub mod codec;
pub mod crash;
mod disk;
mod extents;
mod host;
pub mod model;
mod node;
mod policy;
mod provider;
mod random;
mod ranges;
mod trace;
mod write;

pub use disk::Disk;
pub use host::{Corruption, MemoryHost, TRANSFER_MAX};
pub use node::TestNode;
pub use policy::{MemoryConfig, TestPolicy};
pub use provider::{TestProvider, TestView};
pub use random::Random;
