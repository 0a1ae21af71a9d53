//! The block layer: nodes, extents, and the engine that moves bytes.
//!
//! Knows no protocol, no Wasm and no JSON. See `host/ARCHITECTURE.md` for the
//! picture; each module says what it owns, which thread runs it and what stays
//! true.

pub mod authz;
pub mod bitmap;
pub mod engine;
mod errno;
pub mod error;
pub mod file;
pub mod filter;
pub mod format;
pub mod fuzzing;
pub mod gate;
pub mod image;
pub mod metacontext;
pub mod node;
mod range;
pub mod remote;
pub mod rule;
mod sync;
mod tickets;
#[doc(hidden)]
pub mod trace;
pub mod view;
pub mod window;

pub use engine::buffer::Buf;
pub use engine::{Aio, IoThread};
pub use errno::{Errno, strerror};
pub use error::{Error, ErrorKind, Result};
pub use node::Node;
pub use range::ByteRange;
