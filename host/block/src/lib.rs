//! The block layer: nodes, extents, and the engine that moves bytes.
//!
//! Knows no protocol, no Wasm and no JSON. See `host/ARCHITECTURE.md` for the
//! picture; each module says what it owns, which thread runs it and what stays
//! true.

mod errno;
pub mod format;
mod range;

pub use errno::{Errno, strerror};
pub use range::ByteRange;
