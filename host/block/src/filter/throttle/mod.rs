//! `throttle`: a node whose requests wait until the limits of its group let them go.
//!
//! Any iothread. A group is shared by nodes on several of them; its state is behind a mutex that is
//! held for a few additions. Who must wait queues: first come, first served within a node, and the
//! nodes of a group take turns. One task per group, on the iothread of whoever queued first, wakes
//! who may go: no iothread ever blocks, and requests of one group have one order.
//!
//! Invariants: whoever queued is let go or gave up (its receiver is gone); while a node is drained
//! ([`Throttle::drain`]) nobody of it waits; a request ends in the node where it came in, though
//! child and group can be exchanged ([`Throttle::exchange`], [`Throttle::join`]); the pump runs
//! exactly while somebody is queued.

mod bucket;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, oneshot};

use crate::engine::background;
use crate::engine::buffer::IoMem;
use crate::node::Status;
use crate::window::{OldWindow, RawWindow, Window};
use crate::{ByteRange, Errno, Node};

use bucket::Buckets;
pub use bucket::{Direction, Limits, Rate, Rates};

/// Limits that several nodes share.
#[derive(Debug)]
pub struct ThrottleGroup {
    name: String,
    /// Nothing is limited: the one thing that the hot path looks at.
    off: AtomicBool,
    made: Instant,
    state: Mutex<State>,
    /// Limits changed or somebody else may go: the pump looks again.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    buckets: Buckets,
    reads: Queue,
    writes: Queue,
    pumping: bool,
    /// Whose turn it is to be looked at first.
    writes_first: bool,
}

/// Who waits in one direction, by node; the node at the front is next.
#[derive(Debug, Default)]
struct Queue(VecDeque<(u64, VecDeque<Waiting>)>);

#[derive(Debug)]
struct Waiting {
    bytes: u64,
    go: oneshot::Sender<()>,
}

impl Queue {
    fn push(&mut self, node: u64, waiting: Waiting) {
        match self.0.iter_mut().find(|(other, _)| *other == node) {
            Some((_, line)) => line.push_back(waiting),
            None => self.0.push_back((node, VecDeque::from([waiting]))),
        }
    }

    /// The next one who still waits; its node goes to the end of the line.
    fn pop(&mut self) -> Option<Waiting> {
        while let Some((node, mut line)) = self.0.pop_front() {
            let next = std::iter::from_fn(|| line.pop_front()).find(|next| !next.go.is_closed());
            if !line.is_empty() {
                self.0.push_back((node, line));
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }

    /// Everyone of a node.
    fn take(&mut self, node: u64) -> impl Iterator<Item = Waiting> + use<> {
        let at = self.0.iter().position(|(other, _)| *other == node);
        let line = at.and_then(|at| self.0.remove(at)).map(|(_, line)| line);
        line.unwrap_or_default().into_iter()
    }

    /// Drops who gave up; is anybody left?
    fn is_wanted(&mut self) -> bool {
        for (_, line) in &mut self.0 {
            line.retain(|waiting| !waiting.go.is_closed());
        }
        self.0.retain(|(_, line)| !line.is_empty());
        !self.0.is_empty()
    }
}

impl State {
    const fn queue(&mut self, direction: Direction) -> &mut Queue {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }

    /// Lets go who may; how long until the next one may, `None`: nobody waits.
    fn turn(&mut self, now: Duration) -> Option<Duration> {
        loop {
            let mut soonest: Option<Duration> = None;
            let mut moved = false;
            let order = match self.writes_first {
                true => [Direction::Write, Direction::Read],
                false => [Direction::Read, Direction::Write],
            };
            for direction in order {
                if !self.queue(direction).is_wanted() {
                    continue;
                }
                let wait = self.buckets.wait(direction, now);
                if !wait.is_zero() {
                    soonest = Some(soonest.map_or(wait, |other| other.min(wait)));
                    continue;
                }
                if let Some(next) = self.queue(direction).pop() {
                    self.buckets.fill(direction, next.bytes);
                    let _ = next.go.send(());
                    moved = true;
                    self.writes_first = direction == Direction::Read;
                    break;
                }
            }
            if !moved {
                return soonest;
            }
        }
    }
}

impl ThrottleGroup {
    /// A group; `name` is the object's id.
    #[must_use]
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let buckets = Buckets::new(limits);
        Arc::new(Self {
            name: name.to_owned(),
            off: AtomicBool::new(buckets.are_off()),
            made: Instant::now(),
            state: Mutex::new(State {
                buckets,
                ..State::default()
            }),
            changed: Notify::new(),
        })
    }

    /// The object's id.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        *self.state().buckets.limits()
    }

    /// Other limits, at once, for those who wait too.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = self.state();
        let now = self.made.elapsed();
        state.buckets.set_limits(limits, now);
        self.off.store(state.buckets.are_off(), Ordering::Release);
        drop(state);
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes who may go until nobody waits.
    async fn pump(self: Arc<Self>) {
        loop {
            let wait = {
                let mut state = self.state();
                let wait = state.turn(self.made.elapsed());
                if wait.is_none() {
                    state.pumping = false;
                }
                wait
            };
            let Some(wait) = wait else { return };
            // Both ends are harmless: the turn looks at the clock itself.
            let _ = tokio::time::timeout(wait, self.changed.notified()).await;
        }
    }
}

/// The node.
#[derive(Debug)]
pub struct Throttle {
    child: RawWindow,
    group: ArcSwap<ThrottleGroup>,
    /// Tells the nodes of a group apart.
    number: u64,
    /// How many drain it now.
    drains: AtomicU64,
}

impl Throttle {
    /// A node before `child`.
    #[must_use]
    pub fn new(child: Arc<Node>, group: Arc<ThrottleGroup>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            child: RawWindow::new(Window::whole(child)),
            group: ArcSwap::new(group),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            drains: AtomicU64::new(0),
        })
    }

    /// The node behind it.
    pub(super) fn child(&self) -> Guard<Arc<Window>> {
        self.child.now()
    }

    /// Another node behind it, for all requests that come from now on.
    pub fn exchange(&self, child: Arc<Node>) -> OldWindow {
        self.child.exchange(Window::whole(child))
    }

    /// Its group.
    #[must_use]
    pub fn group(&self) -> Arc<ThrottleGroup> {
        self.group.load_full()
    }

    /// Another group, for all requests that come from now on; who waits goes.
    pub fn join(&self, group: Arc<ThrottleGroup>) {
        let old = self.group.swap(group);
        self.let_go(&mut old.state());
    }

    /// Does nothing wait now?
    pub(super) fn is_open(&self) -> bool {
        self.is_open_in(&self.group.load())
    }

    fn is_open_in(&self, group: &ThrottleGroup) -> bool {
        group.off.load(Ordering::Acquire) || self.drains.load(Ordering::Acquire) > 0
    }

    /// Everyone of this node who waits.
    fn let_go(&self, state: &mut State) {
        let reads = state.reads.take(self.number);
        let writes = state.writes.take(self.number);
        for waiting in reads.chain(writes) {
            let _ = waiting.go.send(());
        }
    }

    /// Lets everyone of this node go, now and until the answer is dropped: who waits for its
    /// requests to end does not wait for the limits.
    #[must_use]
    pub fn drain(self: &Arc<Self>) -> Undrain {
        let group = self.group();
        let mut state = group.state();
        self.drains.fetch_add(1, Ordering::AcqRel);
        self.let_go(&mut state);
        drop(state);
        Undrain(self.clone())
    }

    /// Waits until a request may go.
    async fn admit(&self, direction: Direction, bytes: u64) {
        let group = self.group();
        let waiting = {
            let mut state = group.state();
            // Looked at under the lock: a drain, or another group, that comes later finds us in the
            // queue.
            if self.is_open_in(&group) || !Arc::ptr_eq(&group, &self.group.load()) {
                return;
            }
            let now = group.made.elapsed();
            let free = !state.queue(direction).is_wanted();
            if free && state.buckets.wait(direction, now).is_zero() {
                state.buckets.fill(direction, bytes);
                return;
            }
            let (go, waiting) = oneshot::channel();
            state
                .queue(direction)
                .push(self.number, Waiting { bytes, go });
            if state.pumping {
                group.changed.notify_one();
            } else {
                state.pumping = true;
                background::spawn(group.clone().pump());
            }
            waiting
        };
        let _ = waiting.await;
    }

    pub(super) async fn read(&self, offset: u64, mem: IoMem) -> Result<(), Errno> {
        self.admit(Direction::Read, mem.len() as u64).await;
        self.child.get().child.read_mem(offset, mem).await
    }

    pub(super) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<(), Errno> {
        self.admit(Direction::Write, mem.len() as u64).await;
        self.child.get().child.write_mem(offset, mem, fua).await
    }

    pub(super) async fn before_compressed(&self, len: usize) {
        self.admit(Direction::Write, len as u64).await;
    }

    pub(super) async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        self.admit(Direction::Write, range.len()).await;
        self.child.get().child.discard(range).await
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        self.child.get().child.flush_as_child().await
    }

    pub(super) async fn status(&self, range: ByteRange) -> Result<Status, Errno> {
        self.child.get().child.status(range).await
    }

    /// What has to be written instead is written below: it was let through already.
    pub(super) async fn zero(
        &self,
        range: ByteRange,
        may_unmap: bool,
        fast: bool,
    ) -> Result<(), Errno> {
        self.admit(Direction::Write, range.len()).await;
        let place = self.child.get();
        if fast {
            place.child.zero_fast(range, may_unmap).await
        } else {
            place.child.write_zeroes(range, may_unmap).await
        }
    }
}

/// Ends a drain when it is dropped.
#[derive(Debug)]
pub struct Undrain(Arc<Throttle>);

impl Drop for Undrain {
    fn drop(&mut self) {
        self.0.drains.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests;
