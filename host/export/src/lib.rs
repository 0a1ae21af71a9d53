//! The front-ends of outport: how a block node is offered to the outside.
//!
//! One folder per protocol. Each parses, bounds and authorizes what a client sends, and knows
//! nothing of image formats or of Wasm. What they share lies beside them: [`errno`] is the one
//! table that says how an error of the block layer is told to each kind of client, [`tls`] encrypts
//! and proves identities.

pub mod access;
pub mod errno;
pub mod export;
pub mod fuse;
pub mod lease;
pub mod nbd;
mod pool;
pub mod reads;
pub mod stats;
pub mod tls;
pub mod vhost_user;

pub use access::{Access, Policies, PolicyTotals};
pub use export::{Export, ExportContext, ExportHold, ExportOptions, ExportUser, NoEntry};
pub use lease::Lease;
pub use reads::Reads;
pub use stats::{ExportStats, ExportTotals};
