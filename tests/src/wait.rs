//! Waiting for something to become true.

use std::time::{Duration, Instant};

/// Longer than anything takes on a loaded two-core machine; only failures wait for it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Polls until `what` holds; panics, with `what` in words, when it never does.
///
/// No test asserts how long something takes: this bound is only for what never comes.
pub fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(
            start.elapsed() < DEADLINE,
            "still not true after {DEADLINE:?}: {what}"
        );
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
