//! A write past a threshold is told once: thin storage grows before it is full
//! (`block-set-write-threshold`).
//!
//! Looked at by every write, two relaxed loads; set by the control plane. Invariant: each threshold
//! that was set is told at most once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Node;

/// A write ended past the threshold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Which node.
    pub node_name: String,
    /// How far past it, in bytes.
    pub amount: u64,
    /// Where it was.
    pub threshold: u64,
}

/// Who is told, on the thread of the write.
pub type ExceededSink = Arc<dyn Fn(Exceeded) + Send + Sync>;

/// The threshold of one node; 0: none.
#[derive(Default)]
pub(super) struct Threshold {
    at: AtomicU64,
    /// End of the last byte that was ever written.
    highest: AtomicU64,
    sink: Mutex<Option<ExceededSink>>,
}

impl std::fmt::Debug for Threshold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.at.fmt(f)
    }
}

impl Node {
    /// From now on the first write past `at` bytes is told; 0: none.
    pub fn set_write_threshold(&self, at: u64, sink: ExceededSink) {
        *self.sink() = Some(sink);
        self.threshold.at.store(at, Ordering::Release);
    }

    /// The threshold that was set and not passed yet; 0: none.
    #[must_use]
    pub fn write_threshold(&self) -> u64 {
        self.threshold.at.load(Ordering::Acquire)
    }

    /// End of the last byte that was ever written.
    #[must_use]
    pub fn highest_write(&self) -> u64 {
        self.threshold.highest.load(Ordering::Relaxed)
    }

    fn sink(&self) -> MutexGuard<'_, Option<ExceededSink>> {
        let sink = self.threshold.sink.lock();
        sink.unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is written there.
    pub(super) fn note_write(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        if end > self.threshold.highest.load(Ordering::Relaxed) {
            self.threshold.highest.fetch_max(end, Ordering::Relaxed);
        }
        let at = self.threshold.at.load(Ordering::Relaxed);
        if at != 0 && end > at {
            self.exceed(at, end);
        }
    }

    #[cold]
    fn exceed(&self, at: u64, end: u64) {
        let relaxed = Ordering::Relaxed;
        let first = self
            .threshold
            .at
            .compare_exchange(at, 0, Ordering::AcqRel, relaxed);
        if first.is_err() {
            return;
        }
        let sink = self.sink().clone();
        if let Some(tell) = sink {
            tell(Exceeded {
                node_name: self.name.clone(),
                amount: end - at,
                threshold: at,
            });
        }
    }
}
