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

use outport_block::format::FormatError;
use wasmtime::Store;

use crate::bindings::{convert, meta, types};
use crate::counters::{CallKind, Counted};
use crate::fault;
use crate::limits::CROSSING_BYTES_MAX;
use crate::plugin::Plugin;
use crate::store::{CallState, Granted, HostState, Queueing, on_tick};
use crate::world::World;

/// A store with an instance, and its exports.
pub(crate) struct Live<W: World> {
    pub(crate) store: Store<HostState>,
    pub(crate) meta: meta::Guest,
    pub(crate) guests: W::Guests,
    pub(crate) plugin: Arc<Plugin<W>>,
    _counted: Counted,
}

impl<W: World> Live<W> {
    /// A fresh instance that sees what is `granted`.
    pub(crate) async fn new(
        plugin: &Arc<Plugin<W>>,
        granted: Granted,
    ) -> Result<Box<Self>, FormatError> {
        let engine = &plugin.engine;
        let state = HostState::new(Arc::clone(&plugin.about.name), granted, &plugin.limits);
        let mut store = Store::new(&engine.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(CROSSING_BYTES_MAX);
        store.epoch_deadline_callback(on_tick);
        store.set_epoch_deadline(1);

        let made = {
            let _ticking = engine.ticker.enter();
            match plugin.pre.instantiate_async(&mut store).await {
                Ok(instance) => plugin
                    .meta
                    .load(&mut store, &instance)
                    .and_then(|meta| Ok((meta, plugin.exports.load(&mut store, &instance)?))),
                Err(e) => Err(e),
            }
        };
        match made {
            Ok((meta, guests)) => Ok(Box::new(Self {
                store,
                meta,
                guests,
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

/// A fresh instance that was told its options, if it takes them.
pub(crate) fn opened<W: World>(
    live: Box<Live<W>>,
    answer: wasmtime::Result<Result<(), types::Error>>,
) -> Result<Box<Live<W>>, FormatError> {
    match answer {
        Ok(Ok(())) => Ok(live),
        Ok(Err(e)) => Err(convert::refused(e)),
        Err(e) => Err(fault::failed(CallKind::Open.word(), &e, live.store.data())),
    }
}

/// The end of a call: the instance is kept if it answered.
pub(crate) fn settle<W: World, T>(
    live: Box<Live<W>>,
    kept: &mut Option<Box<Live<W>>>,
    call: CallKind,
    answer: wasmtime::Result<T>,
) -> Result<T, FormatError> {
    let answer = answer.map_err(|e| fault::failed(call.word(), &e, live.store.data()))?;
    *kept = Some(live);
    Ok(answer)
}

impl<W: World> fmt::Debug for Live<W> {
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
