//! The wire format: a stream of JSON values in, one object per line out (spec 1.1, 1.2).
//!
//! ```text
//! bytes ──► lexer (tokens, positions) ──► parser (values, recovery) ──► Value or ParseError
//! ```
//!
//! Reading is incremental and never recurses, so a peer chooses neither when we stop nor how deep
//! our stack gets. QEMU's dialect is accepted: strings in single quotes, `\'`, and NUL as the two
//! bytes `C0 80`. A byte that cannot stand where it does ends its message; what follows is dropped
//! up to the next bracket, comma or colon, or the end of the line. So a line end, another control
//! character, `FE` or `FF` brings any reader back to a clean state.

mod float;
mod lexer;
mod literal;
mod parser;
mod reader;
mod writer;

pub use reader::{ParseError, Reader, parse_one};
pub use writer::{line, pretty};

/// A message may take this many bytes of tokens (QEMU's limit). Beyond it the rest of the message
/// is read and dropped.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A message may have this many tokens (QEMU's limit): a value takes more memory than its text.
pub const MESSAGE_TOKENS_MAX: usize = 2 << 20;

/// Brackets and braces may nest this deep (QEMU's limit).
pub const NESTING_MAX: usize = 1024;
