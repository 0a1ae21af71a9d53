//! The one wasmtime engine of the process, and what every plugin links against.
//!
//! Made once by the registry; shared by reference count, read by every thread
//! without a lock. Invariant: nothing but the interfaces of `outport:plugin` is
//! in the linker: no WASI, no threads, no clock, no network.

use std::fmt;
use std::sync::Arc;

use wasmtime::component::Linker;
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel};

use crate::bindings;
use crate::store::HostState;
use crate::ticker::Ticker;

/// Stack of one fiber: half for the plugin's code, half for the host functions
/// that it calls. Reserved address space; touched pages only are paid for.
const FIBER_STACK_BYTES: usize = 1 << 20;

/// The part of a fiber's stack that Wasm code may use.
const WASM_STACK_BYTES: usize = 512 << 10;

/// The processor that all code is compiled for. Naming it (even where it is the
/// host) keeps features of the build machine's CPU out of the code, so that what
/// was compiled at build time loads everywhere. Parsers do not miss AVX.
const TARGET: Option<&str> = if cfg!(all(target_arch = "x86_64", target_os = "linux")) {
    Some("x86_64-unknown-linux-gnu")
} else if cfg!(all(target_arch = "aarch64", target_os = "linux")) {
    Some("aarch64-unknown-linux-gnu")
} else {
    None
};

/// The settings of the engine: equal at build time and at run time, or the
/// embedded code would not load.
pub(crate) fn config() -> wasmtime::Result<Config> {
    let mut config = Config::new();
    if let Some(target) = TARGET {
        config.target(target)?;
    }
    config
        .wasm_component_model(true)
        // A call is one fiber; the machinery for concurrent calls in one store
        // triples the price of an async call.
        .concurrency_support(false)
        .epoch_interruption(true)
        .wasm_memory64(false)
        // Components made of several parts (other languages' tools make such)
        // are joined by adapters that see the memories of both.
        .wasm_multi_memory(true)
        .wasm_relaxed_simd(false)
        .cranelift_opt_level(OptLevel::Speed)
        .parallel_compilation(true)
        // A backtrace needs function names only; the map from machine code to
        // Wasm offsets is a third of the embedded size.
        .generate_address_map(false)
        .async_stack_size(FIBER_STACK_BYTES)
        .max_wasm_stack(WASM_STACK_BYTES)
        // One instance per open image: tens, rarely hundreds, and long-lived.
        // The pooling allocator would reserve slots of the largest size for
        // all that may ever come; on demand, an idle image costs what it uses.
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
        .memory_init_cow(true);
    Ok(config)
}

/// The engine, its clock and its linker.
pub(crate) struct PluginEngine {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<HostState>,
    pub(crate) ticker: Ticker,
}

impl PluginEngine {
    /// One per process is meant; more are possible (tests).
    pub(crate) fn new() -> wasmtime::Result<Arc<Self>> {
        let engine = Engine::new(&config()?)?;
        let mut linker = Linker::new(&engine);
        bindings::add_to_linker(&mut linker)?;
        let ticker = Ticker::start(engine.weak())?;
        Ok(Arc::new(Self {
            engine,
            linker,
            ticker,
        }))
    }
}

impl fmt::Debug for PluginEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PluginEngine")
            .field("running", &self.ticker.running())
            .finish_non_exhaustive()
    }
}
