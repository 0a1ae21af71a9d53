//! The contract as Rust: generated from `wit/`, plus one file per interface
//! that a plugin may import.
//!
//! The bindings of world `format-full` serve all three format worlds: a smaller
//! world is the same component type with fewer exports. Only `files.read` can
//! wait; the other imports answer at once.

pub(crate) mod convert;
mod files;
mod health;
mod log;
mod txn;

use wasmtime::component::{HasSelf, Linker};

use crate::store::HostState;

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
mod generated {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "format-full",
        imports: { "outport:plugin/files.read": async },
        exports: { default: async },
    });
}

pub(crate) use generated::exports::outport::plugin::{
    format_create, format_reader, format_writer, meta,
};
pub(crate) use generated::outport::plugin::{extents, types};

pub(crate) use convert::Malformed;

/// The interfaces that a plugin may import, and nothing else.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    generated::FormatFull::add_to_linker::<HostState, HasSelf<HostState>>(linker, |state| state)
}

/// An ordinary refusal, in the contract's words.
fn refuse<T>(code: types::Errno, message: impl Into<String>) -> Result<T, types::Error> {
    Err(types::Error {
        code,
        message: message.into(),
    })
}
