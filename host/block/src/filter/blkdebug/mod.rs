//! `blkdebug`: a node that fails requests and holds them up, on demand. For tests.
//!
//! Any iothread. The rules are behind a mutex that is never held while waiting: who uses this
//! node does not measure speed. Without rules and limits requests go straight through. A request
//! that is held up waits for [`Blkdebug::resume`], which comes from the control plane; it holds no
//! lock meanwhile. Invariant: after [`Blkdebug::release`] nobody is held up any more.

mod limits;
mod rules;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::engine::buffer::IoMem;
use crate::node::Status;
use crate::{ByteRange, Errno, Node};

pub use limits::Limits;
use rules::Rules;
pub use rules::{Event, InjectError, IoType, SetState};

/// A request that waits to be resumed.
#[derive(Debug)]
struct Held {
    tag: String,
    go: oneshot::Sender<()>,
}

#[derive(Debug)]
struct State {
    rules: Rules,
    held: Vec<Held>,
    /// The daemon ends: nobody is held up any more.
    released: bool,
}

/// The node.
#[derive(Debug)]
pub struct Blkdebug {
    child: Arc<Node>,
    limits: Limits,
    state: Mutex<State>,
    /// No rules, no breaks, no limits.
    quiet: AtomicBool,
}

impl Blkdebug {
    /// A node before `child`.
    #[must_use]
    pub fn new(
        child: Arc<Node>,
        limits: Limits,
        set_state: Vec<SetState>,
        inject_error: Vec<InjectError>,
    ) -> Self {
        let rules = Rules::new(set_state, inject_error);
        let quiet = rules.are_idle() && limits.are_none();
        Self {
            child,
            limits,
            state: Mutex::new(State {
                rules,
                held: Vec::new(),
                released: false,
            }),
            quiet: AtomicBool::new(quiet),
        }
    }

    /// The node behind it.
    #[must_use]
    pub const fn child(&self) -> &Arc<Node> {
        &self.child
    }

    /// Do requests go straight through?
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_quiet(&self, state: &State) {
        let quiet = state.rules.are_idle() && self.limits.are_none();
        self.quiet.store(quiet, Ordering::Release);
    }

    // === what tests do ===

    /// The next request that comes to `event` is held up, under this tag.
    pub fn add_break(&self, event: Event, tag: &str) {
        let mut state = self.state();
        if !state.released {
            state.rules.add_break(event, tag);
            self.quiet.store(false, Ordering::Release);
        }
    }

    /// Forgets breaks that were not met yet. Returns how many.
    pub fn remove_breaks(&self, tag: &str) -> usize {
        let mut state = self.state();
        let removed = state.rules.remove_breaks(Some(tag));
        self.update_quiet(&state);
        removed
    }

    /// Lets requests that are held up go on; `None`: all of them. Returns how many.
    pub fn resume(&self, tag: Option<&str>) -> usize {
        let mut state = self.state();
        let fits = |held: &Held| tag.is_none_or(|tag| tag == held.tag);
        let (going, kept): (Vec<_>, Vec<_>) = state.held.drain(..).partition(fits);
        state.held = kept;
        drop(state);
        let resumed = going.into_iter().map(|held| held.go.send(()));
        resumed.filter(Result::is_ok).count()
    }

    /// Tags of the requests that are held up, the oldest first.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        let state = self.state();
        // Who gave up waiting is not held up.
        let held = state.held.iter().filter(|held| !held.go.is_closed());
        held.map(|held| held.tag.clone()).collect()
    }

    /// The state that the rules are in.
    #[must_use]
    pub fn rule_state(&self) -> i64 {
        self.state().rules.state()
    }

    /// Holds nobody up, now or later.
    pub fn release(&self) {
        let mut state = self.state();
        state.released = true;
        state.rules.remove_breaks(None);
        self.update_quiet(&state);
        drop(state);
        self.resume(None);
    }

    // === what requests do ===

    /// A request came to this place.
    pub(crate) async fn fire(&self, event: Event) {
        if self.is_quiet() {
            return;
        }
        let waiting = {
            let mut state = self.state();
            let Some(tag) = state.rules.fire(event) else {
                return;
            };
            if state.released {
                return;
            }
            let (go, waiting) = oneshot::channel();
            state.held.retain(|held| !held.go.is_closed());
            state.held.push(Held { tag, go });
            waiting
        };
        let _ = waiting.await;
    }

    async fn check(&self, iotype: IoType, range: ByteRange) -> Result<(), Errno> {
        let injected = self.state().rules.check(iotype, range);
        let Some(injected) = injected else {
            return Ok(());
        };
        if !injected.immediately {
            tokio::task::yield_now().await;
        }
        Err(injected.errno)
    }

    pub(super) async fn read(&self, offset: u64, mem: IoMem) -> Result<(), Errno> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        for piece in self.limits.transfers(range) {
            let padded = self.limits.padded(piece);
            self.check(IoType::Read, padded).await?;
            let part = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
            self.child.read_mem(piece.offset(), part).await?;
        }
        Ok(())
    }

    pub(super) async fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Result<(), Errno> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        self.fire_unaligned(range).await;
        self.fire(Event::PWRITEV).await;
        let written = async {
            for piece in self.limits.transfers(range) {
                let padded = self.limits.padded(piece);
                self.check(IoType::Write, padded).await?;
                let part = mem.part((piece.offset() - offset) as usize, piece.len() as usize);
                self.child.write_mem(piece.offset(), part, fua).await?;
            }
            Ok(())
        }
        .await;
        self.fire(Event::PWRITEV_DONE).await;
        written
    }

    pub(super) async fn before_compressed(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let range = ByteRange::new(offset, len as u64).ok_or(Errno::Inval)?;
        self.fire(Event::PWRITEV).await;
        self.check(IoType::Write, range).await
    }

    /// What a write that is not aligned would do first if it were padded.
    async fn fire_unaligned(&self, range: ByteRange) {
        let (head, tail) = self.limits.cuts(range);
        if head {
            self.fire(Event::PWRITEV_RMW_HEAD).await;
            self.fire(Event::PWRITEV_RMW_AFTER_HEAD).await;
        }
        if tail {
            self.fire(Event::PWRITEV_RMW_TAIL).await;
            self.fire(Event::PWRITEV_RMW_AFTER_TAIL).await;
        }
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        if !self.is_quiet() {
            self.check(IoType::Flush, ByteRange::default()).await?;
        }
        self.child.flush_as_child().await
    }

    pub(super) async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        if self.is_quiet() {
            return self.child.discard(range).await;
        }
        for piece in self.limits.discards(range) {
            self.check(IoType::Discard, piece).await?;
            self.child.discard(piece).await?;
        }
        Ok(())
    }

    /// `NotSup`: the whole range is to be written.
    pub(super) async fn zero(
        &self,
        range: ByteRange,
        may_unmap: bool,
        fast: bool,
    ) -> Result<(), Errno> {
        if self.is_quiet() {
            return self.child.zero(range, may_unmap, fast).await;
        }
        if !self.limits.zeroes_fit(range) {
            return Err(Errno::NotSup);
        }
        self.fire(Event::PWRITEV_ZERO).await;
        let zeroed = async {
            for piece in self.limits.zeroes(range) {
                self.check(IoType::WriteZeroes, piece).await?;
                self.child.zero(piece, may_unmap, fast).await?;
            }
            Ok(())
        }
        .await;
        if zeroed != Err(Errno::NotSup) {
            // What is written instead comes to the end of its own.
            self.fire(Event::PWRITEV_DONE).await;
        }
        zeroed
    }

    pub(super) async fn status(&self, range: ByteRange) -> Result<Status, Errno> {
        if !self.is_quiet() {
            self.check(IoType::BlockStatus, range).await?;
        }
        self.child.status(range).await
    }
}

#[cfg(test)]
mod tests;
