//! What a store holds for its plugin: the files, the budgets of the running
//! call, and the memory limiter.
//!
//! Owned by one instance, used by one call at a time, on the thread that polls
//! that call. Invariant: all of [`CallState`] is fresh when a call begins, so
//! that nothing of a failed call can reach the next one.

use std::sync::Arc;
use std::time::Instant;

use outport_block::authz::ConfigFiles;
use outport_block::format::{FormatFiles, TxnLog};
use outport_block::view::NodeView;
use wasmtime::{ResourceLimiter, StoreContextMut, UpdateDeadline};

use crate::files::Nothing;
use crate::limits::{
    CONFIG_READS_PER_CALL_MAX, CORRUPTIONS_PER_CALL_MAX, INSTANCES_MAX, LOG_BURST,
    LOG_LINES_PER_SECOND, Limits, MEMORIES_MAX, READ_BYTES_PER_CALL_MAX, TABLE_ELEMENTS_MAX,
    TABLES_MAX,
};

/// May the running call queue writes?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queueing {
    /// Yes.
    Allowed,
    /// Not this call (`open`, `resolve`, ...).
    NotNow,
    /// Never: the image is open for reading.
    ReadOnly,
}

/// The state of one call.
#[derive(Debug)]
pub(crate) struct CallState {
    pub(crate) txn: TxnLog,
    pub(crate) txn_bytes: usize,
    pub(crate) queueing: Queueing,
    pub(crate) read_left: u64,
    pub(crate) corruptions_left: u32,
    pub(crate) config_reads_left: u32,
    /// Ticks left to run; none: no deadline.
    pub(crate) ticks_left: Option<u64>,
    /// The call waited for a file since the last tick, which is not its fault.
    pub(crate) waited: bool,
    pub(crate) deadline_hit: bool,
    /// The last line that the plugin logged as an error: a panic's message.
    pub(crate) last_error: Option<String>,
}

impl CallState {
    pub(crate) fn new(queueing: Queueing, ticks: Option<u64>) -> Self {
        Self {
            txn: TxnLog::new(),
            txn_bytes: 0,
            queueing,
            read_left: READ_BYTES_PER_CALL_MAX,
            corruptions_left: CORRUPTIONS_PER_CALL_MAX,
            config_reads_left: CONFIG_READS_PER_CALL_MAX,
            ticks_left: ticks,
            waited: false,
            deadline_hit: false,
            last_error: None,
        }
    }
}

/// A token bucket for log lines.
#[derive(Debug)]
pub(crate) struct LogBudget {
    tokens: u32,
    filled: Instant,
    pub(crate) dropped: u64,
}

impl LogBudget {
    fn new() -> Self {
        Self {
            tokens: LOG_BURST,
            filled: Instant::now(),
            dropped: 0,
        }
    }

    /// May one more line pass?
    pub(crate) fn take(&mut self) -> bool {
        let earned = self.filled.elapsed().as_millis() * u128::from(LOG_LINES_PER_SECOND) / 1000;
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(LOG_BURST);
            self.tokens = self.tokens.saturating_add(earned).min(LOG_BURST);
            self.filled = Instant::now();
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => {
                self.dropped += 1;
                false
            }
        }
    }
}

/// All that one instance may see: what its kind does not need is [`Nothing`].
#[derive(Clone)]
pub(crate) struct Granted {
    /// Whom it serves: a node, an object, an export. For the log.
    pub(crate) user: Arc<str>,
    pub(crate) files: Arc<dyn FormatFiles>,
    pub(crate) config: Arc<dyn ConfigFiles>,
    pub(crate) view: Arc<dyn NodeView>,
}

impl Granted {
    /// Nothing at all.
    pub(crate) fn nothing(user: &str) -> Self {
        Self {
            user: user.into(),
            files: Arc::new(Nothing),
            config: Arc::new(Nothing),
            view: Arc::new(Nothing),
        }
    }

    /// The files of an image.
    pub(crate) fn files(files: Arc<dyn FormatFiles>) -> Self {
        Self {
            files: files.clone(),
            ..Self::nothing(files.node_name())
        }
    }
}

/// What the host functions of one instance work on.
pub(crate) struct HostState {
    pub(crate) plugin: Arc<str>,
    pub(crate) granted: Granted,
    pub(crate) call: CallState,
    pub(crate) log: LogBudget,
    pub(crate) limiter: MemoryLimiter,
}

impl HostState {
    pub(crate) fn new(plugin: Arc<str>, granted: Granted, limits: &Limits) -> Self {
        Self {
            plugin,
            granted,
            call: CallState::new(Queueing::NotNow, limits.call_ticks()),
            log: LogBudget::new(),
            limiter: MemoryLimiter::new(limits),
        }
    }
}

/// Runs at each tick of a running call: yield to the neighbours, or end it.
pub(crate) fn on_tick(
    mut store: StoreContextMut<'_, HostState>,
) -> wasmtime::Result<UpdateDeadline> {
    let call = &mut store.data_mut().call;
    let waited = std::mem::take(&mut call.waited);
    if let Some(left) = &mut call.ticks_left
        && !waited
    {
        *left = left.saturating_sub(1);
        if *left == 0 {
            call.deadline_hit = true;
            return Ok(UpdateDeadline::Interrupt);
        }
    }
    // Tokio's own yield: it lets the I/O driver run before this call goes on.
    // Waking oneself would not, for as many as 61 turns.
    Ok(UpdateDeadline::YieldCustom(
        1,
        Box::pin(tokio::task::yield_now()),
    ))
}

/// Says no to memory beyond the limit, and remembers that it did.
#[derive(Debug)]
pub(crate) struct MemoryLimiter {
    max: u64,
    /// Over all memories of the store.
    used: u64,
    /// Which limit was hit, since the call began.
    pub(crate) refused: Option<&'static str>,
}

impl MemoryLimiter {
    fn new(limits: &Limits) -> Self {
        Self {
            max: limits.memory_max,
            used: 0,
            refused: None,
        }
    }
}

impl ResourceLimiter for MemoryLimiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current) as u64;
        let wanted = self.used.saturating_add(more);
        if wanted > self.max {
            self.refused = Some("memory-max");
            return Ok(false);
        }
        self.used = wanted;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if desired > TABLE_ELEMENTS_MAX {
            self.refused = Some("TABLE_ELEMENTS_MAX");
            return Ok(false);
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        TABLES_MAX
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}
