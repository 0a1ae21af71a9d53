//! What a check says: counters, and a bounded number of sentences.

use super::{Check, Round};

/// Sentences kept; the counters go on.
const MESSAGES_MAX: usize = 200;

impl Check {
    /// Damage that does not depend on counts, and that nothing mends: said in
    /// the first window only.
    pub(super) fn found(&mut self, faults: u64, message: impl FnOnce() -> String) {
        if self.first_pass() {
            self.report.corruptions += faults;
            self.say(message);
        }
    }

    /// One corruption, of which `fixed` (0 or 1) is mended.
    pub(super) fn corruption(&mut self, fixed: u64, message: impl FnOnce() -> String) {
        self.report.corruptions += 1;
        self.report.corruptions_fixed += fixed;
        self.say(message);
    }

    pub(super) fn say(&mut self, message: impl FnOnce() -> String) {
        match self.report.messages.len() {
            n if n < MESSAGES_MAX => self.report.messages.push(message()),
            MESSAGES_MAX => self.report.messages.push("(and more)".to_owned()),
            _ => {}
        }
    }

    /// The image is seen for the first time.
    pub(super) fn first_pass(&self) -> bool {
        self.round == Round::Report && self.counts.first() == 0
    }
}
