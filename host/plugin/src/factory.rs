//! [`WasmFactory`]: one plugin, of whatever kind; a format is the `FormatFactory` of its driver
//! name.
//!
//! Held by the registry and by every node, object and export that uses it. Faults come back here
//! from them: counted, logged, and handed to the daemon's hook.

use std::fmt;
use std::sync::Arc;

use outport_block::Errno;
use outport_block::format::{
    Fault, FaultKind, Format, FormatError, FormatFactory, FormatFiles, FormatFuture, Measurement,
};

use crate::bindings::{Malformed, convert};
use crate::counters::CallKind;
use crate::fault;
use crate::format::WasmFormat;
use crate::limits::PROBE_BYTES_MAX;
use crate::live::{Live, run};
use crate::plugin::Plugin;
use crate::schema::Schema;
use crate::store::{Granted, Queueing};
use crate::world::Formats;

/// Whom a plugin served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// The image of a node.
    Node(String),
    /// An authorization object.
    Object(String),
    /// An export's metadata contexts.
    Export(String),
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node '{name}'"),
            Self::Object(id) => write!(f, "object '{id}'"),
            Self::Export(id) => write!(f, "export '{id}'"),
        }
    }
}

/// A broken contract, for whoever sends events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultEvent {
    /// Driver name of the plugin.
    pub plugin: String,
    /// Whom it served.
    pub user: User,
    /// How it broke the contract.
    pub kind: FaultKind,
    /// One sentence with the facts.
    pub message: String,
}

/// Called once per fault, on the thread that saw it: it must not wait.
pub type FaultHook = Arc<dyn Fn(&FaultEvent) + Send + Sync>;

/// Makes instances of one plugin of the kind `W`.
pub struct WasmFactory<W> {
    plugin: Arc<Plugin<W>>,
    on_fault: Option<FaultHook>,
}

/// Makes instances of one format plugin.
pub type WasmFormatFactory = WasmFactory<Formats>;

impl<W> WasmFactory<W> {
    pub(crate) fn new(plugin: Arc<Plugin<W>>, on_fault: Option<FaultHook>) -> Self {
        Self { plugin, on_fault }
    }

    pub(crate) fn plugin(&self) -> &Arc<Plugin<W>> {
        &self.plugin
    }

    /// The plugin's options.
    #[must_use]
    pub fn options_schema(&self) -> &Schema {
        &self.plugin.about.schema
    }

    /// A fault is counted, logged, and handed to whoever sends events.
    pub(crate) fn report(&self, user: User, fault: &Fault) {
        self.plugin.counters.faulted(fault.kind);
        let event = FaultEvent {
            plugin: self.plugin.about.name.to_string(),
            user,
            kind: fault.kind,
            message: fault.message.clone(),
        };
        tracing::error!(
            plugin = event.plugin,
            user = %event.user,
            fault = fault.kind.word(),
            "{fault}"
        );
        if let Some(hook) = &self.on_fault {
            hook(&event);
        }
    }
}

impl WasmFormatFactory {
    /// Can it make new images?
    #[must_use]
    pub fn creates(&self) -> bool {
        self.plugin.exports.creator.is_some()
    }

    /// 0..100: is a file of `size` bytes that starts with `head` of this format?
    ///
    /// # Errors
    /// A fault of the plugin.
    pub async fn probe(&self, head: &[u8], size: u64) -> Result<u8, FormatError> {
        let head = &head[..head.len().min(PROBE_BYTES_MAX)];
        let mut live = self.blind().await?;
        let reader = &live.guests.reader;
        let answer = run!(
            live,
            Probe,
            Queueing::NotNow,
            reader,
            call_probe(head, size)
        );
        Ok(self.judge(&live, CallKind::Probe, answer)?.min(100))
    }

    /// The JSON Schema of the options of [`Format::create`].
    ///
    /// # Errors
    /// The format cannot make images, or a fault of the plugin.
    pub async fn create_schema(&self) -> Result<Schema, FormatError> {
        let mut live = self.blind().await?;
        let Some(creator) = &live.guests.creator else {
            return self.cannot_create();
        };
        let answer = run!(
            live,
            CreateSchema,
            Queueing::NotNow,
            creator,
            call_create_schema()
        );
        let text = self.judge(&live, CallKind::CreateSchema, answer)?;
        Schema::parse(&text).map_err(|e| {
            let what = Malformed::answer(format!("The schema: {e}"));
            fault::malformed(CallKind::CreateSchema.word(), what)
        })
    }

    /// How large an image with these options would be.
    ///
    /// # Errors
    /// The format cannot make images, refuses the options, or faults.
    pub async fn measure(&self, options: &str) -> Result<Measurement, FormatError> {
        let mut live = self.blind().await?;
        let Some(creator) = &live.guests.creator else {
            return self.cannot_create();
        };
        let answer = run!(
            live,
            Measure,
            Queueing::NotNow,
            creator,
            call_measure(options)
        );
        let answer = self.judge(&live, CallKind::Measure, answer)?;
        Ok(convert::measurement(answer.map_err(convert::refused)?))
    }

    /// An instance that sees no file, for one question.
    async fn blind(&self) -> Result<Box<Live<Formats>>, FormatError> {
        Live::new(&self.plugin, Granted::nothing("-")).await
    }

    fn judge<T>(
        &self,
        live: &Live<Formats>,
        call: CallKind,
        answer: wasmtime::Result<T>,
    ) -> Result<T, FormatError> {
        answer.map_err(|e| fault::failed(call.word(), &e, live.store.data()))
    }

    fn cannot_create<T>(&self) -> Result<T, FormatError> {
        let message = format!("Format '{}' cannot make images", self.plugin.about.name);
        Err(FormatError::Refused {
            code: Errno::NotSup,
            message,
        })
    }
}

impl FormatFactory for WasmFormatFactory {
    fn name(&self) -> &str {
        &self.plugin.about.name
    }

    fn writable(&self) -> bool {
        self.plugin.exports.writer.is_some()
    }

    fn instantiate(&self, files: Arc<dyn FormatFiles>) -> FormatFuture<'_, Box<dyn Format>> {
        Box::pin(async move {
            let live = Live::new(&self.plugin, Granted::files(files)).await?;
            let format: Box<dyn Format> = Box::new(WasmFormat::new(live));
            Ok(format)
        })
    }

    fn report_fault(&self, node_name: &str, fault: &Fault) {
        self.report(User::Node(node_name.to_owned()), fault);
    }
}

impl<W> fmt::Debug for WasmFactory<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WasmFactory")
            .field("plugin", &self.plugin)
            .finish_non_exhaustive()
    }
}
