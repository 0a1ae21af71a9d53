//! Flushing a host file: one at a time, its outcome told to everybody who relied on it.
//!
//! ```text
//!  A: write lost in write-back                       the kernel tells one caller, and forgets
//!  B: flush ── fdatasync ── EIO ──► lost
//!  A: flush (meanwhile) ── waits ─► lost: EIO        and every one from then on
//! ```
//!
//! Any thread. Whoever comes while a flush runs shares the next one. Invariant: nothing but
//! [`Inner::flush`] asks the kernel about a buffered file, and only one of them at a time, so no
//! answer is missed.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex as AsyncMutex;

use crate::Errno;
use crate::engine::OpKind;

use super::Inner;

/// The flush in progress and those who wait for the next.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    /// Held by the flush in progress.
    running: AsyncMutex<()>,
    /// Number of the last flush that began.
    begun: AtomicU64,
    /// Number of the last flush that ended well; one that nobody waited for to its end does not.
    done: AtomicU64,
}

#[cfg(test)]
impl Flusher {
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }
}

impl Inner {
    /// Everything written so far becomes durable.
    pub(super) async fn flush(&self) -> Result<(), Errno> {
        if self.no_flush.load(Ordering::Acquire) || self.read_only.load(Ordering::Acquire) {
            return Ok(());
        }
        let flusher = &self.flusher;
        let ticket = flusher.begun.load(Ordering::Acquire);
        let _running = flusher.running.lock().await;
        if self.lost.load(Ordering::Acquire) {
            return Err(Errno::Io);
        }
        // One that began after the ticket was taken covers us.
        if flusher.done.load(Ordering::Acquire) > ticket {
            return Ok(());
        }
        let number = flusher.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let traced = self.trace.as_ref().map(|t| (t, t.flush()));
        if let Err(e) = self.op(0, OpKind::Datasync).await {
            // The kernel reports a lost page once and forgets it: the next
            // flush would succeed, and lie.
            if !self.is_direct() {
                self.lost.store(true, Ordering::Release);
            }
            return Err(e);
        }
        flusher.done.store(number, Ordering::Release);
        if let Some((trace, id)) = traced {
            trace.flushed(id);
        }
        Ok(())
    }
}
