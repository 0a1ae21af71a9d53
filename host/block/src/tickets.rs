//! Flush tickets: which round of a flush covers whose request.
//!
//! ```text
//!   take ── wait for the round in progress ── covers? ── yes: done
//!                                               └ no: begin ── work ── ended_well
//! ```
//!
//! Any thread takes tickets; rounds run one at a time, under a lock of their owner, who also asks
//! [`Tickets::covers`] under it. Invariant: a round that began after a ticket was taken sees
//! whatever the taker did before, and covers the ticket only once it ended well. A round that
//! failed, panicked or was dropped covers nobody.

use crate::sync::{AtomicU64, Ordering};

/// The numbers of the rounds.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    /// Number of the last round that began.
    begun: AtomicU64,
    /// Number of the last round that ended well.
    done: AtomicU64,
}

/// Which rounds were too early for somebody.
#[derive(Debug)]
pub(crate) struct Ticket(u64);

/// A round in progress.
#[derive(Debug)]
pub(crate) struct Round(u64);

impl Tickets {
    /// A ticket for everything that was done until now.
    pub(crate) fn take(&self) -> Ticket {
        // A change, not a load: the round that comes next sees what was done before this.
        Ticket(self.begun.fetch_add(0, Ordering::AcqRel))
    }

    /// Did a round that began after the ticket was taken end well? Lock of the rounds.
    pub(crate) fn covers(&self, ticket: &Ticket) -> bool {
        self.done.load(Ordering::Acquire) > ticket.0
    }

    /// Begin a round. Lock of the rounds.
    pub(crate) fn begin(&self) -> Round {
        Round(self.begun.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Everything that the round was to do is done. Lock of the rounds.
    pub(crate) fn ended_well(&self, round: &Round) {
        self.done.store(round.0, Ordering::Release);
    }

    /// How many rounds began.
    #[cfg(test)]
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }
}
