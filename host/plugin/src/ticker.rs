//! The one owner of the engine's clock.
//!
//! A thread raises the engine's epoch each [`TICK`] while any call runs, and
//! parks after [`IDLE_TICKS`] without one, so that an idle daemon never wakes
//! up. Calls announce themselves with [`Ticker::enter`]; that is one atomic add
//! and one load, and a wake-up only if the thread is parked.
//!
//! Invariant: while a [`Running`] lives, the epoch moves. Its converse does not
//! matter: each call sets its deadline anew from the present epoch, so that a
//! sleeping ticker never traps anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Thread};

use wasmtime::EngineWeak;

use crate::limits::{IDLE_TICKS, TICK};

#[derive(Debug)]
struct Shared {
    /// Calls that run now.
    running: AtomicUsize,
    /// The thread sleeps, or is about to.
    parked: AtomicBool,
    /// The thread shall end.
    stopping: AtomicBool,
}

/// Handle of the thread; dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Ticker {
    shared: Arc<Shared>,
    thread: Thread,
}

impl Ticker {
    /// Start the thread for the engine behind `engine`.
    pub(crate) fn start(engine: EngineWeak) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            running: AtomicUsize::new(0),
            parked: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let handle = thread::Builder::new()
            .name("plugin-ticker".into())
            .stack_size(64 << 10)
            .spawn(move || tick(&theirs, &engine))?;
        Ok(Self {
            shared,
            thread: handle.thread().clone(),
        })
    }

    /// A call begins.
    #[inline]
    pub(crate) fn enter(&self) -> Running<'_> {
        // SeqCst on both sides: either this call sees `parked`, or the thread
        // sees the call before it parks.
        self.shared.running.fetch_add(1, Ordering::SeqCst);
        if self.shared.parked.load(Ordering::SeqCst) {
            self.wake();
        }
        Running(&self.shared)
    }

    #[cold]
    fn wake(&self) {
        if self.shared.parked.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    /// Is the thread asleep?
    #[cfg(test)]
    pub(crate) fn is_parked(&self) -> bool {
        self.shared.parked.load(Ordering::SeqCst)
    }

    /// Calls that run now.
    pub(crate) fn running(&self) -> usize {
        self.shared.running.load(Ordering::Relaxed)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

/// A call in progress: the clock runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The thread: ends when the ticker or the engine is gone.
fn tick(shared: &Shared, engine: &EngineWeak) {
    let mut idle = 0;
    while !shared.stopping.load(Ordering::SeqCst) {
        if shared.running.load(Ordering::SeqCst) > 0 {
            idle = 0;
            let Some(engine) = engine.upgrade() else {
                return;
            };
            engine.increment_epoch();
        } else {
            idle += 1;
        }
        if idle >= IDLE_TICKS {
            idle = 0;
            shared.parked.store(true, Ordering::SeqCst);
            if shared.running.load(Ordering::SeqCst) > 0 {
                shared.parked.store(false, Ordering::SeqCst);
            }
            let asleep =
                |s: &Shared| s.parked.load(Ordering::SeqCst) && !s.stopping.load(Ordering::SeqCst);
            while asleep(shared) {
                thread::park();
            }
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasmtime::Engine;

    fn eventually(what: &str, is: impl Fn() -> bool) {
        for _ in 0..5000 {
            if is() {
                return;
            }
            thread::sleep(TICK);
        }
        panic!("never: {what}");
    }

    #[test]
    fn the_clock_sleeps_when_nobody_calls_and_wakes_with_a_call() {
        let engine = Engine::default();
        let ticker = Ticker::start(engine.weak()).unwrap();
        for _ in 0..3 {
            eventually("parked", || ticker.is_parked());
            let running = ticker.enter();
            assert_eq!(ticker.running(), 1);
            assert!(!ticker.is_parked());
            drop(running);
        }
        assert_eq!(ticker.running(), 0);
    }

    #[test]
    fn the_thread_ends_with_its_handle() {
        let engine = Engine::default();
        let ticker = Ticker::start(engine.weak()).unwrap();
        let shared = Arc::downgrade(&ticker.shared);
        eventually("parked", || ticker.is_parked());
        drop(ticker);
        eventually("the thread is gone", || shared.upgrade().is_none());
    }
}
