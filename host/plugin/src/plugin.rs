//! A loaded plugin: compiled code, linked once, and what it says of itself.
//!
//! Immutable after loading, shared by every instance. Invariant: its component
//! imports nothing but `outport:plugin`, and `describe` answered within the
//! contract.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use outport_block::Errno;
use outport_block::format::{Fault, FaultKind, FormatError};
use serde_json::Value;
use wasmtime::component::{Component, InstancePre};

use crate::bindings::{Malformed, meta};
use crate::counters::{CallKind, Counters};
use crate::engine::PluginEngine;
use crate::fault;
use crate::limits::{JSON_BYTES_MAX, Limits, MESSAGE_BYTES_MAX, sentence};
use crate::live::{Live, run};
use crate::schema::Schema;
use crate::store::{Granted, HostState, Queueing};
use crate::world::World;

/// What a plugin says of itself.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: Arc<str>,
    pub(crate) version: String,
    pub(crate) description: String,
    pub(crate) schema: Schema,
}

impl About {
    /// Before `describe` answered.
    pub(crate) fn unknown() -> Self {
        Self {
            name: "(not yet known)".into(),
            version: String::new(),
            description: String::new(),
            schema: Schema::default(),
        }
    }

    fn checked(info: meta::Info) -> Result<Self, Malformed> {
        let bad = |what: String| Err(Malformed::answer(what));
        let name = sentence(info.name, 31);
        let mut chars = name.chars();
        let ok = chars.next().is_some_and(|c| c.is_ascii_lowercase())
            && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if !ok {
            return bad(format!(
                "The name '{name}' is not a letter a-z followed by at most 30 of a-z, 0-9 and -"
            ));
        }
        if info.options_schema.len() > JSON_BYTES_MAX {
            return bad(format!(
                "An options schema of {} bytes",
                info.options_schema.len()
            ));
        }
        let schema = match Schema::parse(&info.options_schema) {
            Ok(schema) => schema,
            Err(e) => return bad(format!("The options schema: {e}")),
        };
        Ok(Self {
            name: name.into(),
            version: sentence(info.version, 64),
            description: sentence(info.description, MESSAGE_BYTES_MAX),
            schema,
        })
    }

    /// Do these options (a JSON text) fit the plugin's schema?
    pub(crate) fn check_options(&self, options: &str) -> Result<(), FormatError> {
        let refused = |message| FormatError::Refused {
            code: Errno::Inval,
            message,
        };
        let options: Value = serde_json::from_str(options)
            .map_err(|e| refused(format!("The options are no JSON object: {e}")))?;
        self.schema
            .check(&options)
            .map_err(|e| refused(e.to_string()))
    }
}

/// A plugin of one kind, ready to make instances.
pub(crate) struct Plugin<W> {
    pub(crate) engine: Arc<PluginEngine>,
    pub(crate) pre: InstancePre<HostState>,
    pub(crate) meta: meta::GuestIndices,
    pub(crate) exports: W,
    pub(crate) about: About,
    pub(crate) limits: Limits,
    pub(crate) call_ticks: Option<u64>,
    pub(crate) counters: Arc<Counters>,
}

impl<W: World> Plugin<W> {
    /// Link `component`, and ask it who it is, with nothing granted.
    pub(crate) fn load(
        engine: &Arc<PluginEngine>,
        component: &Component,
        limits: Limits,
    ) -> Result<Arc<Self>, FormatError> {
        let linked = (|| {
            let pre = engine.linker.instantiate_pre(component)?;
            let meta = meta::GuestIndices::new(&pre)?;
            let exports = W::link(&pre)?;
            Ok::<_, wasmtime::Error>((pre, meta, exports))
        })();
        let (pre, meta, exports) = linked.map_err(|e| {
            let message = format!("Linking: {}", sentence(format!("{e:#}"), MESSAGE_BYTES_MAX));
            FormatError::Fault(Fault {
                kind: FaultKind::BadAnswer,
                message,
            })
        })?;
        let mut plugin = Arc::new(Self {
            engine: Arc::clone(engine),
            pre,
            meta,
            exports,
            about: About::unknown(),
            limits,
            call_ticks: limits.call_ticks(),
            counters: Arc::default(),
        });
        let about = drive(describe(&plugin))?;
        // `describe` has dropped its instance, which held the other reference.
        if let Some(plugin) = Arc::get_mut(&mut plugin) {
            plugin.about = about;
        }
        Ok(plugin)
    }
}

impl<W> fmt::Debug for Plugin<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin")
            .field("about", &self.about)
            .finish_non_exhaustive()
    }
}

async fn describe<W: World>(plugin: &Arc<Plugin<W>>) -> Result<About, FormatError> {
    let mut live = Live::new(plugin, Granted::nothing("-")).await?;
    let guest = &live.meta;
    let answer = run!(live, Describe, Queueing::NotNow, guest, call_describe());
    let word = CallKind::Describe.word();
    let info = answer.map_err(|e| fault::failed(word, &e, live.store.data()))?;
    About::checked(info).map_err(|what| fault::malformed(word, what))
}

/// Poll a future that never waits for anything but ticks (no file is granted to
/// it), on whatever thread this is.
pub(crate) fn drive<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return value;
        }
    }
}
