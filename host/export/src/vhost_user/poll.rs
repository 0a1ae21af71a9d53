//! How long a data thread looks at its rings before it sleeps.
//!
//! Pure. Waking up costs more than a request, so a thread that expects its next request soon looks
//! for it instead. The window follows what happened: it grows while requests come just after the
//! thread went to sleep, and shrinks when they do not. Times are nanoseconds; the bounds are those
//! of the iothread object (`poll-max-ns`, `poll-grow`, `poll-shrink`).

/// The first window when it grows from nothing, as QEMU's.
const FIRST_NS: u64 = 4000;

/// Bounds of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Never longer than this; 0: never look.
    pub(super) max_ns: u64,
    /// Factor of growth; 0 counts as 2.
    pub(super) grow: u64,
    /// Divisor when it shrinks; 0: to nothing.
    pub(super) shrink: u64,
}

/// The window of one thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    bounds: Bounds,
    ns: u64,
}

impl Window {
    pub(super) const fn new(bounds: Bounds) -> Self {
        Self { bounds, ns: 0 }
    }

    /// How long to look.
    pub(super) const fn ns(&self) -> u64 {
        self.ns
    }

    /// The next request came `after_ns` after the thread had nothing to do.
    pub(super) fn waited(&mut self, after_ns: u64) {
        let Bounds {
            max_ns,
            grow,
            shrink,
        } = self.bounds;
        if after_ns <= self.ns {
            return;
        }
        self.ns = if after_ns > max_ns {
            self.ns.checked_div(shrink).unwrap_or(0)
        } else {
            let factor = if grow == 0 { 2 } else { grow };
            self.ns.saturating_mul(factor).max(FIRST_NS).min(max_ns)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_requests() {
        let mut window = Window::new(Bounds {
            max_ns: 32_768,
            grow: 0,
            shrink: 0,
        });
        assert_eq!(window.ns(), 0);
        for expected in [4000, 8000, 16_000, 16_000] {
            window.waited(10_000);
            assert_eq!(window.ns(), expected);
        }
        window.waited(30_000);
        assert_eq!(window.ns(), 32_000);
        window.waited(32_500);
        assert_eq!(window.ns(), 32_768, "never past its bound");
        window.waited(1_000_000);
        assert_eq!(window.ns(), 0);
    }

    #[test]
    fn no_bound_no_window() {
        let mut window = Window::new(Bounds {
            max_ns: 0,
            grow: 2,
            shrink: 2,
        });
        window.waited(1);
        assert_eq!(window.ns(), 0);
    }
}
