//! The contract as Rust: generated from `wit/`, plus one file per interface
//! that a plugin may import.
//!
//! One set of bindings serves all worlds: each of them is the same component
//! type with fewer imports and exports. What a plugin may import is a matter of
//! its kind, and is judged in `examine`; what it was not granted answers with an
//! error. Only `files.read` and `node-view.allocation` can wait.

pub(crate) mod bitmaps;
mod config_files;
pub(crate) mod context;
pub(crate) mod convert;
mod files;
mod health;
mod log;
mod node_view;
pub(crate) mod policy;
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
        inline: "
            package outport:host;
            world all {
                include outport:plugin/format-full-bitmaps@0.1.0;
                export outport:plugin/format-takeover@0.1.0;
                include outport:plugin/authz@0.1.0;
                include outport:plugin/metadata-context-rules@0.1.0;
            }
        ",
        world: "outport:host/all",
        imports: {
            "outport:plugin/files.read": async,
            "outport:plugin/node-view.allocation": async,
        },
        exports: { default: async },
    });
}

pub(crate) use generated::exports::outport::plugin::{
    authz_policy, context_provider, context_rules, format_bitmaps, format_create, format_reader,
    format_takeover, format_writer, meta,
};
pub(crate) use generated::outport::plugin::{extents, types};

pub(crate) use convert::Malformed;

/// The interfaces that a plugin may import, and nothing else.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    generated::All::add_to_linker::<HostState, HasSelf<HostState>>(linker, |state| state)
}

/// An ordinary refusal, in the contract's words.
fn refuse<T>(code: types::Errno, message: impl Into<String>) -> Result<T, types::Error> {
    Err(types::Error {
        code,
        message: message.into(),
    })
}
