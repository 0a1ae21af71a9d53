//! The NBD server.
//!
//! Protocol below, I/O above. The files of the core take bytes and give bytes; they own no
//! socket, know no clock, and can be driven by a test or a fuzzer as well as by a connection:
//!
//! ```text
//! bytes -> haggle (options, contexts) -> Session -> check(request) -> Operation -> reply -> bytes
//! ```
//!
//! Invariants of the core: no input makes it panic, and no input makes it hold more memory than
//! the constants in [`limits`] say.

pub mod client;
mod connection;
pub mod contexts;
pub mod exports;
pub mod fuzzing;
pub mod haggle;
pub mod limits;
pub mod listener;
pub mod options;
mod out;
mod reads;
pub mod reply;
mod serve;
pub mod server;
pub mod session;
mod socket;
pub mod status;
mod stream;
pub mod wire;

pub use listener::{Address, Bound, Listener};
pub use server::{Admission, Server, ServerOptions, ServerTls};
