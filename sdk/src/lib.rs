//! What a vendor depends on to write an outport plugin.
//!
//! An image format is a type that implements [`Format`] (read-only) or, in
//! addition, [`WritableFormat`] and [`CreatableFormat`]; an authorization policy
//! implements [`Policy`], a provider of metadata contexts [`ContextProvider`].
//! One line makes a plugin of it:
//!
//! ```ignore
//! outport_sdk::export_format_ro!(Simg);
//! outport_sdk::export_policy!(OfficeHours);
//! outport_sdk::export_contexts!(Heatmap);
//! ```
//!
//! The same code builds natively, where `cargo test` runs it against the
//! in-memory host of [`testing`] (feature `testing`), and for
//! `wasm32-unknown-unknown`, where the macro binds it to the WIT contract.
//!
//! Invariant: a plugin says *where* bytes are; it never moves payload. All it
//! can reach is what the host grants its kind: [`Files`] and [`Txn`],
//! [`ConfigFiles`], or [`NodeView`].

#![cfg_attr(not(target_arch = "wasm32"), forbid(unsafe_code))]
#![cfg_attr(target_arch = "wasm32", deny(unsafe_code))]

mod context;
mod error;
mod export;
mod extents;
mod format;
mod policy;
mod provider;
mod read;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod wasm;

pub use context::{Files, LogLevel, Stage, Txn};
pub use error::{Errno, Error, Result};
pub use extents::ExtentList;
pub use format::{
    Bits, ByteRange, CheckReport, Child, ChildKind, Codec, CreatableFormat, DiscardKind, Extent,
    Format, Geometry, Grant, Granted, Info, KeepsBitmaps, KeptBitmap, Location, Measurement,
    Placement, Repair, SlotRange, WritableFormat, WriteIntent, WriteKind,
};
pub use policy::{ConfigFiles, Decision, Narrowing, Peer, Policy, Request, Transport};
pub use provider::{
    Alloc, AllocRun, Context, ContextProvider, ContextRules, Keep, NodeView, Rule, Span, Status,
};
pub use read::Reader;
