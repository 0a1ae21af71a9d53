//! Looking again before sleeping: a completion that is near is cheaper to see than to be woken for.
//!
//! On an iothread. Whoever is about to wait polls for a window that adapts as QEMU's does: it grows
//! while what came would have come within the limit, and shrinks when it did not. Between two looks
//! everybody else on the thread has a turn, so polling delays nobody. Limits are the properties of
//! the `iothread` object; the control plane changes them at any time. Invariant: nobody polls
//! longer than `poll_max_ns` at a time, or at all when that is 0.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The first window: shorter ones cost more than they find.
const FIRST_NS: u64 = 4000;

/// What the properties of an iothread mean for its engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Longest window; 0: no polling.
    pub poll_max_ns: u64,
    /// Factor by which the window grows; 0: 2.
    pub poll_grow: u64,
    /// Divisor by which it shrinks; 0: to nothing.
    pub poll_shrink: u64,
    /// Operations handed to the kernel at once at most; 0: what the engine finds best.
    pub batch_max: u64,
}

/// The limits of one thread, as they are now.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    poll_max_ns: AtomicU64,
    poll_grow: AtomicU64,
    poll_shrink: AtomicU64,
    batch_max: AtomicU64,
}

impl Shared {
    pub(crate) fn set(&self, limits: IoLimits) {
        self.poll_max_ns
            .store(limits.poll_max_ns, Ordering::Relaxed);
        self.poll_grow.store(limits.poll_grow, Ordering::Relaxed);
        self.poll_shrink
            .store(limits.poll_shrink, Ordering::Relaxed);
        self.batch_max.store(limits.batch_max, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> IoLimits {
        IoLimits {
            poll_max_ns: self.poll_max_ns.load(Ordering::Relaxed),
            poll_grow: self.poll_grow.load(Ordering::Relaxed),
            poll_shrink: self.poll_shrink.load(Ordering::Relaxed),
            batch_max: self.batch_max.load(Ordering::Relaxed),
        }
    }
}

thread_local! {
    static LIMITS: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// The limits of this thread from now on.
pub(crate) fn enter(limits: Arc<Shared>) {
    LIMITS.set(Some(limits));
}

/// One thing that is waited for again and again on an iothread: a queue, a ring.
#[derive(Debug)]
pub struct Poll {
    limits: Arc<Shared>,
    window_ns: u64,
}

impl Default for Poll {
    fn default() -> Self {
        Self::new()
    }
}

impl Poll {
    /// For something on this thread. Elsewhere than on an iothread it never polls.
    #[must_use]
    pub fn new() -> Self {
        let limits = LIMITS.with_borrow(Option::clone);
        Self {
            limits: limits.unwrap_or_default(),
            window_ns: 0,
        }
    }

    /// May it poll at all now?
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.limits.get().poll_max_ns > 0
    }

    /// How long to look before sleeping now. For one who looks without giving the thread to others:
    /// only while nobody waits for it.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_nanos(self.window_ns.min(self.limits.get().poll_max_ns))
    }

    /// Looks until it is `ready` or the window ends; whether it is. The answer "no" means: sleep,
    /// and say so with [`Poll::waited`].
    pub async fn until(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        let window = self.window();
        if window.is_zero() {
            return false;
        }
        let begun = Instant::now();
        loop {
            if ready() {
                return true;
            }
            if begun.elapsed() >= window {
                return false;
            }
            tokio::task::yield_now().await;
        }
    }

    /// It took so long, polling and sleeping together, until there was something.
    pub fn waited(&mut self, time: Duration) {
        let limits = self.limits.get();
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.window_ns = adapted(self.window_ns, ns, limits);
    }
}

/// The next window after one in which something came after `ns`.
fn adapted(window: u64, ns: u64, limits: IoLimits) -> u64 {
    let max = limits.poll_max_ns;
    if ns <= window {
        return window.min(max);
    }
    if ns > max {
        // Polling that long would not have paid.
        return window.checked_div(limits.poll_shrink).unwrap_or(0).min(max);
    }
    let grow = if limits.poll_grow == 0 {
        2
    } else {
        limits.poll_grow
    };
    window.saturating_mul(grow).max(FIRST_NS).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS_OF_QEMU: IoLimits = IoLimits {
        poll_max_ns: 32768,
        poll_grow: 2,
        poll_shrink: 2,
        batch_max: 0,
    };

    #[test]
    fn the_window_follows_what_comes() {
        let mut window = 0;
        for _ in 0..8 {
            window = adapted(window, 20_000, LIMITS_OF_QEMU);
        }
        assert_eq!(window, 32_000, "as long as it takes, and no longer");
        assert_eq!(adapted(window, 40_000, LIMITS_OF_QEMU), 16_000);
        let to_nothing = IoLimits {
            poll_shrink: 0,
            ..LIMITS_OF_QEMU
        };
        assert_eq!(adapted(window, 40_000, to_nothing), 0);
        let fast = IoLimits {
            poll_grow: 8,
            ..LIMITS_OF_QEMU
        };
        assert_eq!(adapted(4000, 20_000, fast), 32_000);
        assert_eq!(adapted(8000, 20_000, fast), 32_768, "never above the limit");
        assert_eq!(adapted(window, 1, IoLimits::default()), 0, "0 is off");
    }

    #[tokio::test]
    async fn limits_count_from_when_they_are_set() {
        let long = IoLimits {
            poll_max_ns: 60_000_000_000,
            ..IoLimits::default()
        };
        let shared = Arc::new(Shared::default());
        enter(shared.clone());
        let mut poll = Poll::new();
        let mut looks = 0;
        assert!(
            !poll.until(|| true).await,
            "nothing is asked when it is off"
        );
        shared.set(long);
        // Grown to far more than three looks take.
        for _ in 0..40 {
            poll.waited(Duration::from_secs(59));
        }
        let third = || {
            looks += 1;
            looks == 3
        };
        assert!(poll.until(third).await);
        assert_eq!(looks, 3);
        shared.set(IoLimits::default());
        assert!(!poll.until(|| true).await, "and off again");
    }
}
