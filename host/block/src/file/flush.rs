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

use std::sync::atomic::Ordering;

use tokio::sync::Mutex as AsyncMutex;

use crate::Errno;
use crate::engine::OpKind;
use crate::tickets::Tickets;

use super::Inner;

/// The flush in progress and those who wait for the next.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    /// Held by the flush in progress.
    running: AsyncMutex<()>,
    tickets: Tickets,
}

#[cfg(test)]
impl Flusher {
    pub(super) fn begun(&self) -> u64 {
        self.tickets.begun()
    }
}

impl Inner {
    /// Everything written so far becomes durable.
    pub(super) async fn flush(&self) -> Result<(), Errno> {
        if self.no_flush.load(Ordering::Acquire) || self.read_only.load(Ordering::Acquire) {
            return Ok(());
        }
        let flusher = &self.flusher;
        let ticket = flusher.tickets.take();
        let _running = flusher.running.lock().await;
        if self.lost.load(Ordering::Acquire) {
            return Err(Errno::Io);
        }
        if flusher.tickets.covers(&ticket) {
            return Ok(());
        }
        let round = flusher.tickets.begin();
        let traced = self.trace.as_ref().map(|t| (t, t.flush()));
        if let Err(e) = self.op(0, OpKind::Datasync).await {
            // The kernel reports a lost page once and forgets it: the next
            // flush would succeed, and lie.
            if !self.is_direct() {
                self.lost.store(true, Ordering::Release);
            }
            return Err(e);
        }
        flusher.tickets.ended_well(&round);
        if let Some((trace, id)) = traced {
            trace.flushed(id);
        }
        Ok(())
    }
}
