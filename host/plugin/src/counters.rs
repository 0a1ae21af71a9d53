//! What is counted per plugin. Relaxed atomics: a scrape reads them without
//! stopping anybody, and a call pays a few uncontended adds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use outport_block::format::FaultKind;

macro_rules! kinds {
    ($($name:ident $word:literal,)*) => {
        /// The calls of the contract that are counted apart.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are the contract's")]
        pub enum CallKind { $($name,)* }

        impl CallKind {
            /// All, in the order of the contract.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The contract's word.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}
kinds!(
    Describe "describe",
    Probe "probe",
    Open "open",
    TakeOver "take-over",
    Activate "activate",
    Resolve "resolve",
    ReadSpecial "read-special",
    Info "info",
    PrepareWrite "prepare-write",
    CommitWrite "commit-write",
    AbortWrite "abort-write",
    Discard "discard",
    Reclaim "reclaim",
    Flush "flush",
    Resize "resize",
    Check "check",
    Close "close",
    CreateSchema "create-schema",
    Measure "measure",
    Create "create",
    ListBitmaps "list-bitmaps",
    ReadBits "read-bits",
    CheckBitmap "check-bitmap",
    StoreBits "store-bits",
    KeepBitmaps "keep-bitmaps",
    IsAllowed "is-allowed",
    Decide "decide",
    Reconfigure "reconfigure",
    Contexts "contexts",
    RuleOf "rule-of",
    BlockStatus "block-status",
    Generation "generation",
);

const CALLS: usize = CallKind::ALL.len();

/// The kinds of [`FaultKind`], in the order they are shown.
pub(crate) const FAULTS: [FaultKind; 5] = [
    FaultKind::Trap,
    FaultKind::Deadline,
    FaultKind::Memory,
    FaultKind::BadExtent,
    FaultKind::BadAnswer,
];

#[derive(Debug, Default)]
struct PerCall {
    count: AtomicU64,
    ns_total: AtomicU64,
    ns_max: AtomicU64,
}

/// The counters of one plugin.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    calls: [PerCall; CALLS],
    faults: [AtomicU64; FAULTS.len()],
    instances: AtomicUsize,
}

/// One row of `query-plugins`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallStats {
    /// Which call.
    pub call: CallKind,
    /// How often it was made.
    pub count: u64,
    /// Time in it, waiting for files included.
    pub total: Duration,
    /// The longest one.
    pub max: Duration,
}

impl Counters {
    #[inline]
    pub(crate) fn called(&self, kind: CallKind, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let row = &self.calls[kind as usize];
        row.count.fetch_add(1, Ordering::Relaxed);
        row.ns_total.fetch_add(ns, Ordering::Relaxed);
        if ns > row.ns_max.load(Ordering::Relaxed) {
            row.ns_max.fetch_max(ns, Ordering::Relaxed);
        }
    }

    pub(crate) fn faulted(&self, kind: FaultKind) {
        if let Some(at) = FAULTS.iter().position(|k| *k == kind) {
            self.faults[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn instances(&self) -> usize {
        self.instances.load(Ordering::Relaxed)
    }

    /// Calls that were made at least once.
    pub(crate) fn calls(&self) -> Vec<CallStats> {
        let stats = CallKind::ALL
            .iter()
            .zip(&self.calls)
            .map(|(call, row)| CallStats {
                call: *call,
                count: row.count.load(Ordering::Relaxed),
                total: Duration::from_nanos(row.ns_total.load(Ordering::Relaxed)),
                max: Duration::from_nanos(row.ns_max.load(Ordering::Relaxed)),
            });
        stats.filter(|s| s.count > 0).collect()
    }

    /// Every kind, also those that never happened: a metric must not appear late.
    pub(crate) fn faults(&self) -> Vec<(FaultKind, u64)> {
        FAULTS
            .iter()
            .zip(&self.faults)
            .map(|(k, n)| (*k, n.load(Ordering::Relaxed)))
            .collect()
    }
}

/// A living instance; counted until dropped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<Counters>);

impl Counted {
    pub(crate) fn new(counters: &Arc<Counters>) -> Self {
        counters.instances.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counters))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.instances.fetch_sub(1, Ordering::Relaxed);
    }
}
