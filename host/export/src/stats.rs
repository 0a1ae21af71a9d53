//! What an export did: counters that cost a request nothing that it shares.
//!
//! Each thread counts in a shard of its own, so a request touches a cache line that no other
//! iothread writes; whoever asks adds the shards up. Counters are relaxed: a sum may have one
//! request counted in one member and not yet in another.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// More threads than this share shards, which costs time and no correctness.
const SHARDS: usize = 16;

/// The counters of one thread.
#[derive(Debug, Default)]
#[repr(align(128))]
#[allow(missing_docs, reason = "the names say it")]
pub struct ExportStats {
    pub reads: AtomicU64,
    pub read_bytes: AtomicU64,
    pub writes: AtomicU64,
    pub write_bytes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub errors: AtomicU64,
    pub connections: AtomicU64,
    /// Requests that could not be answered at once, begun and ended.
    pub begun: AtomicU64,
    pub ended: AtomicU64,
    /// How long those took, in nanoseconds, by [`Waited`].
    waited_ns: [AtomicU64; 5],
    /// When the last request came: nanoseconds of the kernel's coarse clock, some milliseconds
    /// behind at worst; 0: none yet.
    last_ns: AtomicU64,
}

/// What a request that waited was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Waited {
    Read,
    Write,
    Flush,
    Discard,
    Other,
}

impl ExportStats {
    /// A request could not be answered at once and is in flight from now on.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// A request came.
    pub fn touch(&self) {
        self.last_ns.store(coarse_ns(), Ordering::Relaxed);
    }

    /// It was answered after this time.
    pub fn end(&self, what: Waited, after: Duration) {
        let ns = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        self.waited_ns[what as usize].fetch_add(ns, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A clock that costs next to nothing to read.
fn coarse_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let rest = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// Sums over all threads since the export was added; bytes and requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct ExportTotals {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub errors: u64,
    pub connections: u64,
    /// Requests that could not be answered at once, the ones in flight included.
    pub waited: u64,
    /// Requests that are not answered yet.
    pub in_flight: u64,
    /// How long requests waited that were answered, in nanoseconds.
    pub waited_ns: u64,
    /// The same by what they were: reads, writes, flushes, discards.
    pub waited_by: [u64; 4],
    /// When the last one came, by the clock of [`ExportTotals::idle_ns`]; 0: none yet.
    last_ns: u64,
}

impl ExportTotals {
    /// Adds what another export did.
    pub fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.writes += other.writes;
        self.write_bytes += other.write_bytes;
        self.flushes += other.flushes;
        self.discards += other.discards;
        self.errors += other.errors;
        self.connections += other.connections;
        self.waited += other.waited;
        self.in_flight += other.in_flight;
        self.waited_ns += other.waited_ns;
        for (sum, more) in self.waited_by.iter_mut().zip(other.waited_by) {
            *sum += more;
        }
        self.last_ns = self.last_ns.max(other.last_ns);
    }

    /// Nanoseconds since the last request; none before the first one.
    #[must_use]
    pub fn idle_ns(&self) -> Option<u64> {
        (self.last_ns > 0).then(|| coarse_ns().saturating_sub(self.last_ns))
    }
}

/// The shards of one export.
#[derive(Debug, Default)]
pub(crate) struct Shards([ExportStats; SHARDS]);

impl Shards {
    /// The calling thread's.
    pub(crate) fn mine(&self) -> &ExportStats {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
        }
        &self.0[INDEX.with(|index| *index)]
    }

    pub(crate) fn totals(&self) -> ExportTotals {
        let sum = |counter: fn(&ExportStats) -> &AtomicU64| -> u64 {
            let shards = self.0.iter().map(counter);
            shards.map(|one| one.load(Ordering::Relaxed)).sum()
        };
        let waited = [
            sum(|shard| &shard.waited_ns[Waited::Read as usize]),
            sum(|shard| &shard.waited_ns[Waited::Write as usize]),
            sum(|shard| &shard.waited_ns[Waited::Flush as usize]),
            sum(|shard| &shard.waited_ns[Waited::Discard as usize]),
            sum(|shard| &shard.waited_ns[Waited::Other as usize]),
        ];
        let last = self.0.iter().map(|it| it.last_ns.load(Ordering::Relaxed));
        // Ends first: a request that ends in between is in flight, not less than none.
        let ended = sum(|shard| &shard.ended);
        let begun = sum(|shard| &shard.begun);
        ExportTotals {
            reads: sum(|shard| &shard.reads),
            read_bytes: sum(|shard| &shard.read_bytes),
            writes: sum(|shard| &shard.writes),
            write_bytes: sum(|shard| &shard.write_bytes),
            flushes: sum(|shard| &shard.flushes),
            discards: sum(|shard| &shard.discards),
            errors: sum(|shard| &shard.errors),
            connections: sum(|shard| &shard.connections),
            waited: begun,
            in_flight: begun.saturating_sub(ended),
            waited_ns: waited.iter().sum(),
            waited_by: [waited[0], waited[1], waited[2], waited[3]],
            last_ns: last.max().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_thread_counted_is_in_the_sum() {
        let shards = Shards::default();
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        shards.mine().reads.fetch_add(1, Ordering::Relaxed);
                        shards.mine().begin();
                        shards.mine().end(Waited::Write, Duration::from_nanos(2));
                    }
                });
            }
        });
        shards.mine().begin();
        let totals = shards.totals();
        assert_eq!((totals.reads, totals.waited_ns), (40_000, 80_000));
        assert_eq!((totals.waited, totals.in_flight), (40_001, 1));
        assert_eq!(totals.waited_by, [0, 80_000, 0, 0]);
        assert_eq!(totals.idle_ns(), None);
        shards.mine().touch();
        assert!(shards.totals().idle_ns().is_some());
    }
}
