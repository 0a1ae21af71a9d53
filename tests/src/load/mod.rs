//! What the load generators share: threads that start together, clocks, latencies, words of the
//! command line, and the report.
//!
//! ```text
//! thread: Mark --- Tally of the measured time --- Mark      (no two threads share anything)
//!         '--------- Spent ----------------------'
//! all of them: Totals --> one JSON object
//! ```

mod cpu;
mod histogram;
mod options;
mod totals;

use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};

pub use histogram::Histogram;
pub use options::{bytes, seconds};
pub use totals::{Totals, rounded};

/// Counters of a thread's measured time.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that were answered.
    pub ops: u64,
    /// Those that failed.
    pub errors: u64,
    /// From a request to its answer, in nanoseconds.
    pub latency: Histogram,
}

/// What a thread's measured time cost.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// By the clock on the wall.
    pub elapsed: Duration,
    /// CPU time of the client's thread.
    pub client_cpu: Duration,
    /// CPU time of all of the server, if it was asked for.
    pub server_cpu: Option<Duration>,
}

/// The moment that begins or ends the measured time.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Taken last, so that reading the other clocks counts for the time before it.
    pub at: Instant,
    client: Duration,
    server: Option<Duration>,
}

impl Mark {
    /// Now, on the clocks of this thread and of the server's process.
    pub fn now(server: Option<i32>) -> Self {
        Self {
            server: server.and_then(cpu::of_process),
            client: cpu::of_this_thread(),
            at: Instant::now(),
        }
    }

    /// What was spent until `end`, a mark of the same thread.
    pub fn until(&self, end: &Self) -> Spent {
        let server = end.server.zip(self.server);
        Spent {
            elapsed: end.at - self.at,
            client_cpu: end.client.saturating_sub(self.client),
            server_cpu: server.map(|(end, begin)| end.saturating_sub(begin)),
        }
    }
}

/// Gives each piece of work a thread; they start together, and the first error is everybody's.
///
/// # Panics
/// A piece of work panicked.
pub fn together<T: Send>(work: Vec<impl FnOnce() -> io::Result<T> + Send>) -> io::Result<Vec<T>> {
    let start = Barrier::new(work.len());
    std::thread::scope(|scope| {
        let start = &start;
        let mut threads = Vec::new();
        for one in work {
            threads.push(scope.spawn(move || {
                start.wait();
                one()
            }));
        }
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a worker does not panic"))
            .collect()
    })
}
