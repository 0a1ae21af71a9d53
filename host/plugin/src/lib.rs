//! The plugin host: the only crate that names wasmtime.
//!
//! ```text
//! PluginRegistry --format(name)--> WasmFormatFactory --instantiate--> WasmFormat
//!   | bundled code, cache, compiler      | counters, faults             | one store, one image
//! ```
//!
//! Loads components, checks that they ask for nothing but the contract, and
//! runs them within their limits as `outport_block::format::Format`. See
//! `ARCHITECTURE-plugin.md` for threads, invariants and failures.
//!
//! For the daemon: [`PluginRegistry`]. For `outport plugin check`:
//! [`inspect::check`]. For `plugins/build`: [`precompile`].

mod answers;
mod back_off;
mod bindings;
mod cache;
mod compile;
mod counters;
mod engine;
mod error;
mod examine;
mod factory;
mod fault;
mod files;
mod format;
pub mod inspect;
pub mod limits;
mod live;
mod on_demand;
mod plugin;
mod policy;
mod provider;
mod query;
mod registry;
mod schema;
mod store;
mod ticker;
mod world;

pub use cache::{CompileCache, MachineCode};
pub use compile::{CompileError, precompile, sha256_hex};
pub use counters::{CallKind, CallStats};
pub use error::PluginError;
pub use examine::{CONTRACT, PluginKind};
pub use factory::{FaultEvent, FaultHook, User, WasmFormatFactory};
pub use format::WasmFormat;
pub use limits::Limits;
pub use on_demand::WasmContextOnDemand;
pub use policy::{WasmPolicy, WasmPolicyFactory};
pub use provider::{WasmContext, WasmProviderFactory};
pub use query::PluginInfo;
pub use registry::{Bundled, PluginRegistry, PluginSpec, RegistryConfig};
pub use schema::{OptionError, Schema};
