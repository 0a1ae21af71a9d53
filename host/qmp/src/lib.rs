//! QMP without I/O: everything about the protocol that is not a socket.
//!
//! ```text
//! bytes -- wire::Reader -> Value -- envelope::Session -> Request -- commands::Command -> Handler
//! bytes ◄── wire::line ── Value ◄── envelope::{reply, event} ◄────────────────────────────────┘
//! options of a command line ── keyval ──► Value ── de (Mode::Keyval) ──► the same types
//! ```
//!
//! The crate owns no descriptor, no clock and no thread: the daemon feeds it and acts on what it
//! returns. Its invariant is that nothing a client sends can panic it or make it hold more than
//! the limits in [`wire`] allow. What is accepted and what is refused, and in which words, follows
//! qemu-storage-daemon 11.1.

#![forbid(unsafe_code)]

#[macro_use]
mod qapi;

pub mod commands;
pub mod de;
pub mod envelope;
pub mod error;
pub mod events;
pub mod fuzzing;
pub mod introspect;
pub mod keyval;
pub mod qemu_opts;
pub mod types;
pub mod wire;

pub use commands::{Command, Handler};
pub use error::{Error, ErrorClass};
pub use events::Event;
