//! The glue between the traits of this crate and the component model.
//!
//! ```text
//! host -> exports of the component -> ReadOnly<T>, Writable<T> -> T: Format
//!                                                                   |
//! host <- imports of the component <- Host <-------------- Files, Txn
//! ```
//!
//! Policies likewise, with [`Decider`] and `T: Policy`; providers with [`Describer`].
//!
//! Built for `wasm32` only. One instance is one image: what `open` returned
//! stays in [`image`] until the instance is dropped. A panic is a trap: the
//! hook of [`image`] logs it, then the host throws the instance away and, since
//! the call never returned, nothing of it is written.

/// The bindings that `wit-bindgen` generates: the only place of this crate with
/// unsafe code, all of it generated.
#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod bindings;
mod convert;
mod export;
mod image;
mod import;
mod policy;
mod provider;

pub use export::{ReadOnly, Writable};
pub use image::Instance;
pub use policy::Decider;
pub use provider::Describer;
