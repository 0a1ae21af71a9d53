//! One living instance, and the frame of every call into it.
//!
//! ```text
//! run!: fresh CallState, clock on -> guest (fiber; may suspend) -> clock off, counted
//! ```
//!
//! A running call owns its [`Live`]. So if its future is dropped midway, the
//! instance goes with it, and a trapped one is never entered again.

use std::fmt;
use std::sync::Arc;

use outport_block::format::{FormatError, FormatFiles};
use wasmtime::Store;

use crate::bindings::{format_create, format_reader, format_writer, meta};
use crate::counters::Counted;
use crate::fault;
use crate::limits::CROSSING_BYTES_MAX;
use crate::plugin::Plugin;
use crate::store::{CallState, HostState, Queueing, on_tick};

/// A store with an instance, and its exports.
pub(crate) struct Live {
    pub(crate) store: Store<HostState>,
    pub(crate) meta: meta::Guest,
    pub(crate) reader: format_reader::Guest,
    pub(crate) writer: Option<format_writer::Guest>,
    pub(crate) creator: Option<format_create::Guest>,
    pub(crate) plugin: Arc<Plugin>,
    _counted: Counted,
}

impl Live {
    /// A fresh instance over `files`.
    pub(crate) async fn new(
        plugin: &Arc<Plugin>,
        files: Arc<dyn FormatFiles>,
    ) -> Result<Box<Self>, FormatError> {
        let engine = &plugin.engine;
        let state = HostState::new(Arc::clone(&plugin.about.name), files, &plugin.limits);
        let mut store = Store::new(&engine.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(CROSSING_BYTES_MAX);
        store.epoch_deadline_callback(on_tick);
        store.set_epoch_deadline(1);

        let made = {
            let _ticking = engine.ticker.enter();
            let exports = &plugin.exports;
            match exports.pre.instantiate_async(&mut store).await {
                Ok(instance) => exports.load(&mut store, &instance),
                Err(e) => Err(e),
            }
        };
        match made {
            Ok((meta, reader, writer, creator)) => Ok(Box::new(Self {
                store,
                meta,
                reader,
                writer,
                creator,
                plugin: Arc::clone(plugin),
                _counted: Counted::new(&plugin.counters),
            })),
            Err(e) => Err(fault::failed("instantiate", &e, store.data())),
        }
    }
}

/// A call begins: nothing of the last one is left, and the deadline counts from
/// now.
#[inline]
pub(crate) fn begin(store: &mut Store<HostState>, queueing: Queueing, ticks: Option<u64>) {
    let state = store.data_mut();
    state.call = CallState::new(queueing, ticks);
    state.limiter.refused = None;
    store.set_epoch_deadline(1);
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live")
            .field("plugin", &self.plugin.about.name)
            .finish_non_exhaustive()
    }
}

/// `run!(live, Kind, queueing, guest.call_x(args))`: make one call of an
/// exported function on `live: Box<Live>`; its value is what wasmtime returned.
macro_rules! run {
    ($live:ident, $kind:ident, $queueing:expr, $guest:expr, $call:ident ( $($arg:expr),* )) => {{
        $crate::live::begin(&mut $live.store, $queueing, $live.plugin.call_ticks);
        let started = ::std::time::Instant::now();
        let answer = {
            let _ticking = $live.plugin.engine.ticker.enter();
            $guest.$call(&mut $live.store $(, $arg)*).await
        };
        $live.plugin.counters.called($crate::counters::CallKind::$kind, started.elapsed());
        answer
    }};
}
pub(crate) use run;
