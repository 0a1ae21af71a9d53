//! When something that broke is tried again: never at once, and ever more rarely.

use std::time::{Duration, Instant};

use crate::limits::{BACK_OFF_MAX, BACK_OFF_MIN};

/// The pauses of one policy or provider. The default is that of one that never broke.
#[derive(Debug, Default)]
pub(crate) struct BackOff {
    /// The next pause; zero: it works.
    pause: Duration,
    until: Option<Instant>,
    last: String,
}

impl BackOff {
    /// It broke now: the pause that begins.
    pub(crate) fn failed(&mut self, now: Instant, why: &str) -> Duration {
        self.pause = (self.pause * 2).clamp(BACK_OFF_MIN, BACK_OFF_MAX);
        self.until = now.checked_add(self.pause);
        why.clone_into(&mut self.last);
        self.pause
    }

    /// Why it is not to be tried now, if so.
    pub(crate) fn refuses(&self, now: Instant) -> Option<String> {
        let left = self.until?.checked_duration_since(now)?;
        (!left.is_zero()).then(|| {
            let ms = left.as_millis();
            let last = &self.last;
            format!("The plugin is broken, and is loaded anew in {ms} ms. It failed with: {last}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let start = Instant::now();
        let mut back_off = BackOff::default();
        assert_eq!(back_off.refuses(start), None);
        let pauses: Vec<_> = (0..10).map(|_| back_off.failed(start, "x")).collect();
        assert_eq!(pauses[0], BACK_OFF_MIN);
        assert_eq!(pauses[3], 8 * BACK_OFF_MIN);
        assert_eq!(pauses[9], BACK_OFF_MAX);
        assert!(back_off.refuses(start).unwrap().ends_with("with: x"));
        assert_eq!(back_off.refuses(start + BACK_OFF_MAX), None);
    }
}
