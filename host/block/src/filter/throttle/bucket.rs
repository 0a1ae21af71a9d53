//! Leaky buckets, without a clock of their own.
//!
//! Each limit is a bucket that leaks at its average rate and holds what may come at once: the
//! burst, or a tenth of a second's worth where none is given. A request goes when no bucket it
//! concerns is over-full; it fills them by what it is. A burst that may last longer than a second
//! has a second bucket, which keeps its rate.

use std::time::Duration;

/// Kinds of request that limits tell apart. Discards and zeroes are writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Everything that changes something.
    Write,
}

/// One limit, per second: bytes or requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The average; 0: no limit.
    pub average: u64,
    /// The rate in a burst; 0: none is given.
    pub max: u64,
    /// How many seconds a burst may last; at least one.
    pub burst_length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            average: 0,
            max: 0,
            burst_length: 1,
        }
    }
}

/// A limit for all requests, one for reads, one for writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Rates {
    pub total: Rate,
    pub read: Rate,
    pub write: Rate,
}

/// All limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bps: Rates,
    /// Requests.
    pub iops: Rates,
    /// A request counts once for each so many bytes; 0: once.
    pub iops_size: u64,
}

/// How full a bucket is.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

impl Bucket {
    fn leak(&mut self, rate: Rate, seconds: f64) {
        self.level = (self.level - rate.average as f64 * seconds).max(0.0);
        self.burst = (self.burst - rate.max as f64 * seconds).max(0.0);
    }

    /// Seconds until a request may go.
    fn wait(&self, rate: Rate) -> f64 {
        if rate.average == 0 {
            return 0.0;
        }
        let size = match rate.max {
            0 => rate.average as f64 / 10.0,
            max => max as f64 * rate.burst_length as f64,
        };
        let over = (self.level - size) / rate.average as f64;
        if rate.burst_length > 1 && rate.max > 0 {
            let max = rate.max as f64;
            return over.max((self.burst - max / 10.0) / max).max(0.0);
        }
        over.max(0.0)
    }

    fn fill(&mut self, units: f64) {
        self.level += units;
        self.burst += units;
    }
}

/// The limits and how far they are used up: total, reads, writes; bytes, then requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Buckets {
    limits: Limits,
    levels: [Bucket; 6],
    /// When they leaked last, since the group was made.
    leaked: Duration,
}

impl Buckets {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Other limits; who was fast under the old ones begins anew.
    pub(super) fn set_limits(&mut self, limits: Limits, now: Duration) {
        *self = Self {
            leaked: now,
            ..Self::new(limits)
        };
    }

    /// Is nothing limited?
    pub(super) fn are_off(&self) -> bool {
        self.rates().iter().all(|rate| rate.average == 0)
    }

    fn rates(&self) -> [Rate; 6] {
        let Limits { bps, iops, .. } = self.limits;
        [
            bps.total, bps.read, bps.write, iops.total, iops.read, iops.write,
        ]
    }

    /// The buckets that requests of a direction fill.
    const fn concerned(direction: Direction) -> [usize; 4] {
        match direction {
            Direction::Read => [0, 1, 3, 4],
            Direction::Write => [0, 2, 3, 5],
        }
    }

    /// How long a request has to wait; zero: it may go.
    pub(super) fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        let seconds = now.saturating_sub(self.leaked).as_secs_f64();
        self.leaked = self.leaked.max(now);
        let rates = self.rates();
        for (level, rate) in self.levels.iter_mut().zip(rates) {
            level.leak(rate, seconds);
        }
        let waits = Self::concerned(direction).map(|at| self.levels[at].wait(rates[at]));
        // No wait is longer than the largest burst is long: limits are checked.
        Duration::try_from_secs_f64(waits.into_iter().fold(0.0, f64::max)).unwrap_or(Duration::MAX)
    }

    /// A request goes.
    pub(super) fn fill(&mut self, direction: Direction, bytes: u64) {
        let count = match self.limits.iops_size {
            0 => 1.0,
            size if bytes <= size => 1.0,
            size => bytes as f64 / size as f64,
        };
        let [a, b, c, d] = Self::concerned(direction);
        for at in [a, b] {
            self.levels[at].fill(bytes as f64);
        }
        for at in [c, d] {
            self.levels[at].fill(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iops(average: u64, max: u64, burst_length: u64) -> Limits {
        let total = Rate {
            average,
            max,
            burst_length,
        };
        Limits {
            iops: Rates {
                total,
                ..Rates::default()
            },
            ..Limits::default()
        }
    }

    /// Requests that go from `now` on for so long.
    fn served(buckets: &mut Buckets, now: u64, seconds: u64, bytes: u64) -> u64 {
        let (mut at, end) = (Duration::from_secs(now), Duration::from_secs(now + seconds));
        let mut count = 0;
        loop {
            let wait = buckets.wait(Direction::Read, at);
            at += wait;
            if at >= end {
                return count;
            }
            if wait.is_zero() {
                buckets.fill(Direction::Read, bytes);
                count += 1;
            }
        }
    }

    #[test]
    fn the_average_is_kept() {
        let mut buckets = Buckets::new(iops(100, 0, 1));
        let count = served(&mut buckets, 0, 10, 4096);
        assert!((1000..=1012).contains(&count), "{count}");
        assert!(Buckets::new(Limits::default()).are_off());
    }

    #[test]
    fn bursts_are_as_large_and_as_long_as_given() {
        let mut buckets = Buckets::new(iops(100, 1000, 1));
        let count = served(&mut buckets, 0, 1, 4096);
        assert!((1000..=1102).contains(&count), "{count}");
        let count = served(&mut buckets, 1, 10, 4096);
        assert!((998..=1002).contains(&count), "{count}");
        let mut buckets = Buckets::new(iops(100, 1000, 5));
        let seconds: Vec<_> = (0..8).map(|s| served(&mut buckets, s, 1, 1)).collect();
        assert!((1000..=1102).contains(&seconds[0]), "{seconds:?}");
        assert!((990..=1010).contains(&seconds[4]), "{seconds:?}");
        assert!((90..=110).contains(&seconds[7]), "{seconds:?}");
    }

    #[test]
    fn large_requests_count_several_times_and_directions_are_apart() {
        let mut limits = iops(100, 0, 1);
        limits.iops_size = 4096;
        let count = served(&mut Buckets::new(limits), 0, 10, 8192);
        assert!((500..=506).contains(&count), "{count}");
        let mut limits = Limits::default();
        limits.bps.read.average = 4096;
        let mut buckets = Buckets::new(limits);
        buckets.fill(Direction::Read, 1 << 20);
        assert!(!buckets.wait(Direction::Read, Duration::ZERO).is_zero());
        assert!(buckets.wait(Direction::Write, Duration::ZERO).is_zero());
        buckets.set_limits(limits, Duration::ZERO);
        assert!(buckets.wait(Direction::Read, Duration::ZERO).is_zero());
    }
}
