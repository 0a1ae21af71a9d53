//! The thread pool: where operations run when a file asked for `aio=threads`,
//! when io_uring is not allowed, or when the caller is no iothread.
//!
//! Owns its threads, started on demand. Invariant: at most
//! [`THREADS_MAX`] of them, and an accepted operation always completes.

use std::collections::VecDeque;
use std::sync::{Condvar, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use super::op::{Completion, Op};

/// QEMU's `thread-pool-max` default.
const THREADS_MAX: usize = 64;

/// An idle thread leaves after this long: it holds a stack for nothing.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    queue: VecDeque<(Op, Completion)>,
    threads: usize,
    idle: usize,
}

/// A bounded pool.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

static POOL: LazyLock<Pool> = LazyLock::new(Pool::default);

/// The process's pool.
pub(crate) fn pool() -> &'static Pool {
    &POOL
}

/// Memory first: a waiter may take the buffer as its only owner.
fn finish(op: Op, done: &Completion) {
    let result = op.run_blocking();
    drop(op);
    done.set(result);
}

impl Pool {
    /// Queue an operation; starts a thread if none is idle.
    pub(crate) fn submit(&'static self, op: Op, done: Completion) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.queue.push_back((op, done));
        if state.idle == 0 && state.threads < THREADS_MAX {
            let started = std::thread::Builder::new()
                .name("io-worker".to_owned())
                .stack_size(128 * 1024)
                .spawn(|| self.work());
            match started {
                Ok(_) => state.threads += 1,
                Err(_) if state.threads > 0 => {}
                Err(_) => {
                    // No thread can be had: do it here rather than never.
                    let job = state.queue.pop_back();
                    drop(state);
                    if let Some((op, done)) = job {
                        finish(op, &done);
                    }
                    return;
                }
            }
        }
        drop(state);
        self.work.notify_one();
    }

    fn work(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some((op, done)) = state.queue.pop_front() {
                drop(state);
                finish(op, &done);
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.idle += 1;
            let (next, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
