//! [`WasmContext`]: `block::metacontext::ContextProvider` over an instance of a plugin.
//!
//! One instance serves one export with all its contexts, on whatever iothread asks, one question at
//! a time. Invariants: an answer is checked before anybody sees it; what faulted is withdrawn: its
//! requests fail at once and new clients are not offered it, until the back-off is over and a fresh
//! instance answers; nobody waits for it longer than its own deadline, and once more for whoever
//! asks just then.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outport_block::format::{Fault, FormatError};
use outport_block::metacontext::{ContextExtent, ContextProvider};
use outport_block::node::NodeFuture;
use outport_block::rule::Rule;
use outport_block::view::NodeView;
use outport_block::{ByteRange, Errno};
use tokio::sync::{Mutex, MutexGuard};

use crate::answers::{Answers, Holds, Validity};
use crate::back_off::BackOff;
use crate::bindings::{Malformed, context, convert};
use crate::counters::CallKind;
use crate::factory::{User, WasmFactory};
use crate::fault;
use crate::limits::{CALL_TIME_MAX, CONTEXTS_MAX, VIEW_RUNS_MAX};
use crate::live::{Live, opened, run, settle};
use crate::store::{Granted, Queueing};
use crate::world::Providers;

/// Makes instances of one provider plugin.
pub type WasmProviderFactory = WasmFactory<Providers>;

impl WasmProviderFactory {
    /// The contexts that an instance with these options (a JSON text) offers for the export `id`,
    /// whose node is seen through `view`.
    ///
    /// # Errors
    /// The options do not fit the schema, the plugin refuses them, it faults, or it names a context
    /// that it may not.
    pub async fn open(
        self: &Arc<Self>,
        id: &str,
        options: &str,
        view: Arc<dyn NodeView>,
    ) -> Result<Vec<Arc<WasmContext>>, FormatError> {
        self.open_as(id, options, view, None).await
    }

    pub(crate) async fn open_as(
        self: &Arc<Self>,
        id: &str,
        options: &str,
        view: Arc<dyn NodeView>,
        asked_for: Option<&str>,
    ) -> Result<Vec<Arc<WasmContext>>, FormatError> {
        self.plugin().about.check_options(options)?;
        let provider = Arc::new(Provider {
            factory: Arc::clone(self),
            export: id.to_owned(),
            options: options.to_owned(),
            granted: Granted {
                view,
                ..Granted::nothing(id)
            },
            withdrawn: AtomicBool::new(false),
            state: Mutex::default(),
        });
        let opened = provider.open(asked_for).await;
        if let Err(FormatError::Fault(fault)) = &opened {
            provider.report(fault);
        }
        let offered = opened?;
        let context = |offered: context::Offered| {
            Arc::new(WasmContext {
                provider: provider.clone(),
                name: offered.name,
                wide: offered.wide,
                rule: offered.rule,
                answers: Answers::default(),
            })
        };
        Ok(offered.into_iter().map(context).collect())
    }
}

/// An instance, and the contexts that share it.
struct Provider {
    factory: Arc<WasmProviderFactory>,
    export: String,
    options: String,
    granted: Granted,
    /// It broke, and was not loaded anew yet.
    withdrawn: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// None: a question was dropped midway, or the instance broke.
    live: Option<Box<Live<Providers>>>,
    back_off: BackOff,
}

/// One context of a provider.
pub struct WasmContext {
    provider: Arc<Provider>,
    name: String,
    wide: bool,
    /// The host answers by itself.
    rule: Option<Rule>,
    answers: Answers,
}

impl Provider {
    /// The first instance, and what it offers.
    async fn open(&self, asked_for: Option<&str>) -> Result<Vec<context::Offered>, FormatError> {
        let mut live = self.start().await?;
        let guest = &live.guests.provider;
        let answer = run!(live, Contexts, Queueing::NotNow, guest, call_contexts(""));
        let mut state = self.state.lock().await;
        let answer = settle(live, &mut state.live, CallKind::Contexts, answer)?;
        let listed = answer.map_err(convert::refused)?;
        let offered = context::offered(listed, CONTEXTS_MAX, asked_for);
        let mut offered =
            offered.map_err(|what| fault::malformed(CallKind::Contexts.word(), what))?;
        for context in &mut offered {
            context.rule = self.rule(&mut state, context).await?;
        }
        if offered.iter().all(|context| context.rule.is_some()) {
            // It said all that will be asked of it.
            state.live = None;
        }
        Ok(offered)
    }

    async fn rule(
        &self,
        state: &mut State,
        context: &context::Offered,
    ) -> Result<Option<Rule>, FormatError> {
        let mut live = self.take(state).await?;
        let Some(guest) = &live.guests.rules else {
            state.live = Some(live);
            return Ok(None);
        };
        let name = &context.name;
        let answer = run!(live, RuleOf, Queueing::NotNow, guest, call_rule_of(name));
        let answer = settle(live, &mut state.live, CallKind::RuleOf, answer)?;
        let rule = answer.map_err(convert::refused)?.map(context::rule);
        self.check_rule(context, rule.as_ref())
            .map_err(|what| fault::malformed(CallKind::RuleOf.word(), what))?;
        Ok(rule)
    }

    fn check_rule(&self, of: &context::Offered, rule: Option<&Rule>) -> Result<(), Malformed> {
        let Some(rule) = rule else {
            return Ok(());
        };
        let name = &of.name;
        if rule.is_wide() && !of.wide {
            return Err(Malformed::answer(format!(
                "The rule of '{name}' has a status of more than 32 bits"
            )));
        }
        let Rule::Bitmap { name: bitmap, .. } = rule else {
            return Ok(());
        };
        let shown = self.granted.view.bitmap_granularity(bitmap);
        shown.map(drop).map_err(|_| {
            Malformed::answer(format!(
                "The rule of '{name}' is about a bitmap that is not there"
            ))
        })
    }

    async fn start(&self) -> Result<Box<Live<Providers>>, FormatError> {
        let mut live = Live::new(self.factory.plugin(), self.granted.clone()).await?;
        let (guest, options) = (&live.guests.provider, &self.options);
        let answer = run!(live, Open, Queueing::NotNow, guest, call_open(options));
        opened(live, answer)
    }

    /// The instance, unless somebody keeps it for longer than a call may take.
    async fn turn(&self) -> Result<MutexGuard<'_, State>, Errno> {
        let limit = self.factory.plugin().limits.call_time_max;
        let limit = limit.unwrap_or(CALL_TIME_MAX);
        let turn = tokio::time::timeout(limit, self.state.lock()).await;
        turn.map_err(|_| {
            tracing::warn!(export = self.export, "a metadata context is too busy");
            Errno::Busy
        })
    }

    /// A living instance, for the time of one call.
    async fn take(&self, state: &mut State) -> Result<Box<Live<Providers>>, FormatError> {
        if let Some(live) = state.live.take() {
            return Ok(live);
        }
        let live = self.start().await?;
        if self.withdrawn.swap(false, Ordering::Relaxed) {
            tracing::info!(export = self.export, "metadata contexts are back");
        }
        Ok(live)
    }

    /// What a client is told of an error; a fault withdraws the contexts.
    fn failed(&self, state: &mut State, context: &str, error: &FormatError) -> Errno {
        match error {
            FormatError::Refused { message, .. } => {
                tracing::warn!(export = self.export, context, message, "no block status");
            }
            FormatError::Fault(fault) => {
                state.live = None;
                self.withdrawn.store(true, Ordering::Relaxed);
                let pause: Duration = state.back_off.failed(Instant::now(), &fault.message);
                tracing::warn!(
                    export = self.export,
                    context,
                    pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                    "metadata contexts withdrawn"
                );
                self.report(fault);
            }
        }
        error.errno()
    }

    fn report(&self, fault: &Fault) {
        self.factory
            .report(User::Export(self.export.clone()), fault);
    }
}

impl WasmContext {
    async fn ask(&self, range: ByteRange, extents_max: usize) -> Result<Vec<ContextExtent>, Errno> {
        let provider = &self.provider;
        let kept = match self.answers.find(range, extents_max) {
            // Nobody need be asked, nor waited for.
            Some((Holds::Version(then), extents)) => {
                if provider.granted.view.version() == Some(then) {
                    return Ok(extents);
                }
                None
            }
            Some((Holds::Generation(generation), extents)) => Some((generation, extents)),
            None => None,
        };
        let mut state = provider.turn().await?;
        if state.back_off.refuses(Instant::now()).is_some() {
            return Err(Errno::Io);
        }
        let asked = self.answer(&mut state, range, extents_max, kept).await;
        match asked {
            Ok(extents) => {
                state.back_off = BackOff::default();
                Ok(extents)
            }
            Err(error) => {
                self.answers.forget();
                Err(provider.failed(&mut state, &self.name, &error))
            }
        }
    }

    async fn answer(
        &self,
        state: &mut State,
        range: ByteRange,
        extents_max: usize,
        kept: Option<(u64, Vec<ContextExtent>)>,
    ) -> Result<Vec<ContextExtent>, FormatError> {
        let mut live = self.provider.take(state).await?;
        let name = &self.name;
        if let Some((generation, extents)) = kept {
            let guest = &live.guests.provider;
            let answer = run!(
                live,
                Generation,
                Queueing::NotNow,
                guest,
                call_generation(name)
            );
            let now = settle(live, &mut state.live, CallKind::Generation, answer)?;
            if now == generation {
                return Ok(extents);
            }
            live = self.provider.take(state).await?;
        }
        // As it was before it was asked: what changes meanwhile ends the answer.
        let version = self.provider.granted.view.version();
        let (guest, asked) = (&live.guests.provider, convert::to_range(range));
        // The caller asks again for what one answer does not hold.
        let spans_max = extents_max.min(VIEW_RUNS_MAX) as u32;
        let answer = run!(
            live,
            BlockStatus,
            Queueing::NotNow,
            guest,
            call_block_status(name, asked, spans_max)
        );
        let call = CallKind::BlockStatus;
        let status = settle(live, &mut state.live, call, answer)?.map_err(convert::refused)?;
        let checked = context::status(status, range, extents_max, self.wide);
        let (extents, validity) = checked.map_err(|what| fault::malformed(call.word(), what))?;
        let holds = match validity {
            Validity::Now => None,
            Validity::Generation(generation) => Some(Holds::Generation(generation)),
            Validity::Write => version.map(Holds::Version),
        };
        if let Some(holds) = holds {
            self.answers.keep(range, extents_max, holds, &extents);
        }
        Ok(extents)
    }
}

impl ContextProvider for WasmContext {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_wide(&self) -> bool {
        self.wide
    }

    fn is_offered(&self) -> bool {
        !self.provider.withdrawn.load(Ordering::Relaxed)
    }

    fn extents(&self, range: ByteRange, extents_max: usize) -> NodeFuture<'_, Vec<ContextExtent>> {
        match &self.rule {
            Some(rule) => self.provider.granted.view.by_rule(rule, range, extents_max),
            None => Box::pin(self.ask(range, extents_max)),
        }
    }
}

impl fmt::Debug for WasmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WasmContext")
            .field("name", &self.name)
            .field("export", &self.provider.export)
            .finish_non_exhaustive()
    }
}
