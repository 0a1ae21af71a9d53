//! [`WasmPolicy`]: `block::authz::Policy` over one instance of a plugin.
//!
//! Asked on the control plane, one decision at a time. Invariants: what is not an answer within
//! the contract is a denial; an instance that faulted is never asked again, and its successor not
//! before the back-off is over, so that a broken policy costs its deadline once in a while and not
//! for each client.
//!
//! ```text
//! ready --fault--> broken, denies at once --back-off over, next question--> fresh instance
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use outport_block::authz::{ConfigFiles, Deciding, Decision, Facts, Grant, Policy};
use outport_block::format::{Fault, FormatError};
use tokio::sync::Mutex;

use crate::back_off::BackOff;
use crate::bindings::{convert, policy};
use crate::counters::CallKind;
use crate::factory::{User, WasmFactory};
use crate::live::{Live, opened, run, settle};
use crate::store::{Granted, Queueing};
use crate::world::Policies;

/// Makes instances of one policy plugin.
pub type WasmPolicyFactory = WasmFactory<Policies>;

impl WasmPolicyFactory {
    /// A policy for the object `id`, with these options (a JSON text) and these files.
    ///
    /// # Errors
    /// The options do not fit the schema, the plugin refuses them, or it faults.
    pub async fn open(
        self: &Arc<Self>,
        id: &str,
        options: &str,
        files: Arc<dyn ConfigFiles>,
    ) -> Result<WasmPolicy, FormatError> {
        let policy = WasmPolicy {
            factory: Arc::clone(self),
            id: id.to_owned(),
            granted: Granted {
                config: files,
                ..Granted::nothing(id)
            },
            state: Mutex::new(State {
                live: None,
                options: Some(options.to_owned()),
                back_off: BackOff::default(),
            }),
        };
        let opened = policy.start(options).await;
        if let Err(FormatError::Fault(fault)) = &opened {
            policy.report(fault);
        }
        policy.state.lock().await.live = Some(opened?);
        Ok(policy)
    }
}

/// One policy with its options.
pub struct WasmPolicy {
    factory: Arc<WasmPolicyFactory>,
    /// Of its object.
    id: String,
    granted: Granted,
    state: Mutex<State>,
}

struct State {
    /// None: a question was dropped midway, or the instance broke.
    live: Option<Box<Live<Policies>>>,
    /// None: it was closed and denies.
    options: Option<String>,
    back_off: BackOff,
}

/// What is asked.
#[derive(Clone, Copy)]
enum Question {
    IsAllowed,
    Decide,
}

/// Why there is no decision.
enum Undecided {
    /// Said in an orderly way, or known without asking.
    Refused(String),
    Broken(Fault),
}

impl From<FormatError> for Undecided {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Fault(fault) => Self::Broken(fault),
            FormatError::Refused { message, .. } => Self::Refused(message),
        }
    }
}

impl WasmPolicy {
    /// Other options from now on; the old ones stay if these are refused.
    ///
    /// # Errors
    /// The options do not fit the schema, the plugin refuses them, or it faults.
    pub async fn reconfigure(&self, options: &str) -> Result<(), FormatError> {
        self.factory.plugin().about.check_options(options)?;
        let mut state = self.state.lock().await;
        let Some(mut live) = state.live.take().filter(|_| state.options.is_some()) else {
            state.live = Some(self.start(options).await?);
            state.options = Some(options.to_owned());
            state.back_off = BackOff::default();
            return Ok(());
        };
        let guest = &live.guests;
        let answer = run!(
            live,
            Reconfigure,
            Queueing::NotNow,
            guest,
            call_reconfigure(options)
        );
        let settled = settle(live, &mut state.live, CallKind::Reconfigure, answer);
        match settled.and_then(|answer| answer.map_err(convert::refused)) {
            Ok(()) => {
                state.options = Some(options.to_owned());
                Ok(())
            }
            Err(error) => {
                self.failed(&mut state, &error);
                Err(error)
            }
        }
    }

    /// Denies everything from now on, until it is reconfigured.
    pub async fn close(&self) {
        let mut state = self.state.lock().await;
        state.options = None;
        state.live = None;
    }

    /// A fresh instance.
    async fn start(&self, options: &str) -> Result<Box<Live<Policies>>, FormatError> {
        let plugin = self.factory.plugin();
        plugin.about.check_options(options)?;
        let mut live = Live::new(plugin, self.granted.clone()).await?;
        let guest = &live.guests;
        let answer = run!(live, Open, Queueing::NotNow, guest, call_open(options));
        opened(live, answer)
    }

    async fn ask(&self, question: Question, facts: &Facts) -> Decision {
        let mut state = self.state.lock().await;
        match self.answer(&mut state, question, facts).await {
            Ok(decision) => {
                state.back_off = BackOff::default();
                decision
            }
            Err(Undecided::Refused(reason)) => Decision::Deny(reason),
            Err(Undecided::Broken(fault)) => {
                let reason = fault.to_string();
                self.failed(&mut state, &FormatError::Fault(fault));
                Decision::Deny(reason)
            }
        }
    }

    async fn answer(
        &self,
        state: &mut State,
        question: Question,
        facts: &Facts,
    ) -> Result<Decision, Undecided> {
        let Some(options) = state.options.clone() else {
            let reason = "The policy has no valid configuration".to_owned();
            return Err(Undecided::Refused(reason));
        };
        if let Some(reason) = state.back_off.refuses(Instant::now()) {
            return Err(Undecided::Refused(reason));
        }
        let mut live = match state.live.take() {
            Some(live) => live,
            None => self.start(&options).await?,
        };
        let guest = &live.guests;
        match question {
            Question::IsAllowed => {
                let identity = &facts.peer.identity;
                let answer = run!(
                    live,
                    IsAllowed,
                    Queueing::NotNow,
                    guest,
                    call_is_allowed(identity)
                );
                let allowed = settle(live, &mut state.live, CallKind::IsAllowed, answer)?
                    .map_err(convert::refused)?;
                Ok(if allowed {
                    Decision::Allow(Grant::default())
                } else {
                    Decision::Deny("The policy does not admit this identity".into())
                })
            }
            Question::Decide => {
                let request = policy::to_request(facts);
                let answer = run!(live, Decide, Queueing::NotNow, guest, call_decide(&request));
                let decision = settle(live, &mut state.live, CallKind::Decide, answer)?
                    .map_err(convert::refused)?;
                Ok(policy::decision(decision))
            }
        }
    }

    fn failed(&self, state: &mut State, error: &FormatError) {
        if let FormatError::Fault(fault) = error {
            let pause = state.back_off.failed(Instant::now(), &fault.message);
            tracing::warn!(
                policy = self.id,
                pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                "a broken policy denies everybody, and is loaded anew after a pause"
            );
            self.report(fault);
        }
    }

    fn report(&self, fault: &Fault) {
        self.factory.report(User::Object(self.id.clone()), fault);
    }
}

impl Policy for WasmPolicy {
    fn is_allowed<'a>(&'a self, facts: &'a Facts) -> Deciding<'a> {
        Box::pin(self.ask(Question::IsAllowed, facts))
    }

    fn decide<'a>(&'a self, facts: &'a Facts) -> Deciding<'a> {
        Box::pin(self.ask(Question::Decide, facts))
    }
}

impl fmt::Debug for WasmPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WasmPolicy")
            .field("id", &self.id)
            .field("plugin", self.factory.plugin())
            .finish_non_exhaustive()
    }
}
