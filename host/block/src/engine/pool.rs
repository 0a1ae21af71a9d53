//! The thread pool: where operations run when a file asked for `aio=threads`,
//! when io_uring is not allowed, or when the caller is no iothread.
//!
//! Owns its threads, started on demand. Invariant: at most
//! [`THREADS_MAX`] of them, and an accepted operation always completes.

use std::collections::VecDeque;
use std::sync::{Condvar, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use super::completion::Completion;
use super::op::Op;

/// QEMU's `thread-pool-max` default.
const THREADS_MAX: usize = 64;

/// An idle thread leaves after this long: it holds a stack for nothing.
const IDLE: Duration = Duration::from_secs(10);

/// What a thread of the pool does; tests have others.
pub(crate) trait Job: Send + 'static {
    /// Do it; may wait.
    fn run(self);
}

/// An operation, and where its result is put.
type Queued = (Op, Completion);

impl Job for Queued {
    fn run(self) {
        let (op, done) = self;
        let result = op.run_blocking();
        // Memory first: a waiter may take the buffer as its only owner.
        drop(op);
        done.set(result);
    }
}

struct State<J> {
    queue: VecDeque<J>,
    threads: usize,
    /// Those that wait, and those that were woken and have not looked yet.
    idle: usize,
}

/// A bounded pool.
pub(crate) struct Pool<J = Queued> {
    state: Mutex<State<J>>,
    work: Condvar,
}

static POOL: LazyLock<Pool> = LazyLock::new(Pool::default);

/// The process's pool.
pub(crate) fn pool() -> &'static Pool {
    &POOL
}

impl<J> Default for Pool<J> {
    fn default() -> Self {
        let state = State {
            queue: VecDeque::new(),
            threads: 0,
            idle: 0,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
        }
    }
}

impl Pool {
    /// Queue an operation.
    pub(crate) fn submit(&'static self, op: Op, done: Completion) {
        self.push((op, done));
    }
}

impl<J: Job> Pool<J> {
    /// Queues; starts a thread if more wait than are idle, since any of them may take long.
    fn push(&'static self, job: J) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.queue.push_back(job);
        if state.queue.len() > state.idle && state.threads < THREADS_MAX {
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
                    if let Some(job) = job {
                        job.run();
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
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job.run();
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    impl Job for Box<dyn FnOnce() + Send> {
        fn run(self) {
            self();
        }
    }

    #[test]
    fn a_burst_does_not_wait_for_the_thread_that_was_idle() {
        let pool: &Pool<Box<dyn FnOnce() + Send>> = Box::leak(Box::default());
        pool.push(Box::new(|| {}));
        let lock = || pool.state.lock().unwrap();
        while lock().idle == 0 {
            std::thread::yield_now();
        }
        let (release, hold) = mpsc::channel::<()>();
        let hold = std::sync::Arc::new(Mutex::new(hold));
        for _ in 0..8 {
            let hold = hold.clone();
            pool.push(Box::new(move || {
                let _let_go = hold.lock().unwrap().recv();
            }));
        }
        let (done, ended) = mpsc::channel();
        pool.push(Box::new(move || done.send(()).unwrap()));
        let ended = ended.recv_timeout(Duration::from_secs(20));
        drop(release);
        ended.expect("nobody ran the last one");
        assert!(lock().threads <= 10);
    }
}
