//! Who is inside a node: the drain gate and the grace period of freed space.
//!
//! Every request holds a [`Pass`] while it may use the node's mapping. Two
//! questions are asked of the gate:
//!   - *drain*: close it, wait until everyone left (resize, reopen, delete);
//!   - *grace*: wait until everyone who entered before now has left, without
//!     keeping anyone out (space that a discard freed may be reused then).
//!
//! Counters are sharded by thread and split by the parity of the epoch, so a
//! request touches one cache line that other iothreads do not.

use std::time::Duration;

use tokio::sync::Notify;

use crate::sync::{AtomicBool, AtomicUsize, Ordering, fence};

const SHARDS: usize = 8;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard([AtomicUsize; 2]);

/// The gate of one node.
#[derive(Debug, Default)]
pub struct Gate {
    epoch: AtomicUsize,
    shards: [Shard; SHARDS],
    closed: AtomicBool,
    opened: Notify,
}

/// Proof of being inside.
#[derive(Debug)]
pub struct Pass<'a> {
    counter: &'a AtomicUsize,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::Release);
    }
}

fn shard_index() -> usize {
    // Orders nothing, so it is in no model.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    thread_local! {
        static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    INDEX.with(|i| *i)
}

impl Gate {
    /// Enter if the gate is open.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        let shard = &self.shards[shard_index()];
        loop {
            let epoch = self.epoch.load(Ordering::Relaxed);
            let counter = &shard.0[epoch & 1];
            counter.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) != epoch {
                // A grace period began in between; it may not have seen us.
                counter.fetch_sub(1, Ordering::Release);
                continue;
            }
            if self.closed.load(Ordering::SeqCst) {
                counter.fetch_sub(1, Ordering::Release);
                return None;
            }
            return Some(Pass { counter });
        }
    }

    /// Enter; waits while the gate is closed.
    pub async fn enter(&self) -> Pass<'_> {
        loop {
            let opened = self.opened.notified();
            if let Some(pass) = self.try_enter() {
                return pass;
            }
            opened.await;
        }
    }

    fn inside(&self, parity: usize) -> usize {
        self.shards
            .iter()
            .map(|s| s.0[parity].load(Ordering::SeqCst))
            .sum()
    }

    /// Requests inside now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inside(0) + self.inside(1)
    }

    /// Begin a grace period: returns a token for [`Gate::grace_over`].
    ///
    /// At most one at a time: the caller serialises.
    pub fn begin_grace(&self) -> usize {
        self.epoch.fetch_add(1, Ordering::SeqCst) & 1
    }

    /// Has everyone left who was inside when the grace period began?
    pub fn grace_over(&self, token: usize) -> bool {
        fence(Ordering::SeqCst);
        self.inside(token) == 0
    }

    /// Nobody enters from now on; `false`: it is closed already. Who is inside stays there.
    pub(crate) fn shut(&self) -> bool {
        !self.closed.swap(true, Ordering::SeqCst)
    }

    /// Close the gate and wait until everyone left. Returns a guard that opens
    /// it again. The caller must not be inside itself.
    pub async fn drain(&self) -> Drained<'_> {
        while !self.shut() {
            // Another mover has it.
            let opened = self.opened.notified();
            if self.closed.load(Ordering::SeqCst) {
                opened.await;
            }
        }
        let drained = Drained { gate: self };
        // Leaving does not signal: requests must stay cheap, drains are rare.
        while self.in_flight() > 0 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        drained
    }
}

/// A closed gate; opens on drop.
#[derive(Debug)]
pub struct Drained<'a> {
    gate: &'a Gate,
}

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
        self.gate.opened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_keeps_others_out_until_dropped() {
        let gate = Gate::default();
        let pass = gate.try_enter().unwrap();
        assert_eq!(gate.in_flight(), 1);
        drop(pass);
        let drained = gate.drain().await;
        assert!(gate.try_enter().is_none());
        drop(drained);
        assert!(gate.try_enter().is_some());
    }

    #[test]
    fn grace_waits_for_those_before_and_not_for_those_after() {
        let gate = Gate::default();
        let before = gate.try_enter().unwrap();
        let token = gate.begin_grace();
        let after = gate.try_enter().unwrap();
        assert!(!gate.grace_over(token));
        drop(before);
        assert!(gate.grace_over(token));
        drop(after);
    }
}
