//! Answers of a metadata context that hold until its plugin says otherwise.
//!
//! Shared by the connections of an export. A plugin is asked for its generation each time, which
//! costs a tenth of asking for the answer. Invariant: at most [`KEPT_MAX`] answers, and
//! [`EXTENTS_MAX`] extents in all of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use outport_block::ByteRange;
use outport_block::metacontext::ContextExtent;

/// Answers kept: what one client asks while it walks an image twice in steps of a GiB.
const KEPT_MAX: usize = 64;

/// Extents kept, 16 bytes each.
const EXTENTS_MAX: usize = 65_536;

/// How long an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Validity {
    /// For this request.
    Now,
    /// While the plugin's generation is this one.
    Generation(u64),
}

#[derive(Debug)]
struct Kept {
    range: ByteRange,
    extents_max: usize,
    generation: u64,
    extents: Vec<ContextExtent>,
}

/// The answers of one context, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Answers(Mutex<VecDeque<Kept>>);

impl Answers {
    /// The answer to the same question, and under which generation it was given.
    pub(crate) fn find(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Option<(u64, Vec<ContextExtent>)> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |it: &&Kept| it.range == range && it.extents_max == extents_max;
        let found = kept.iter().find(same)?;
        Some((found.generation, found.extents.clone()))
    }

    /// Keep an answer, in the place of an older one to the same question.
    pub(crate) fn keep(
        &self,
        range: ByteRange,
        extents_max: usize,
        generation: u64,
        extents: &[ContextExtent],
    ) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|it| it.range != range || it.extents_max != extents_max);
        let mut room = EXTENTS_MAX;
        for it in &*kept {
            room = room.saturating_sub(it.extents.len());
        }
        while kept.len() >= KEPT_MAX || (room < extents.len() && !kept.is_empty()) {
            room += kept.pop_front().map_or(0, |it| it.extents.len());
        }
        if room >= extents.len() {
            kept.push_back(Kept {
                range,
                extents_max,
                generation,
                extents: extents.to_vec(),
            });
        }
    }

    /// Nothing holds any longer.
    pub(crate) fn forget(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(count: usize) -> Vec<ContextExtent> {
        vec![ContextExtent { len: 1, flags: 2 }; count]
    }

    #[test]
    fn the_same_question_has_one_answer_and_the_oldest_make_room() {
        let answers = Answers::default();
        let range = |at: u64| ByteRange::between(at, at + 1);
        answers.keep(range(0), 5, 1, &extents(1));
        answers.keep(range(0), 5, 2, &extents(3));
        assert_eq!(answers.find(range(0), 5), Some((2, extents(3))));
        assert_eq!(answers.find(range(0), 6), None);
        for at in 1..=64 {
            answers.keep(range(at), 5, 3, &extents(1));
        }
        assert_eq!(answers.find(range(0), 5), None);
        assert!(answers.find(range(1), 5).is_some());
        answers.keep(range(99), 5, 4, &extents(EXTENTS_MAX));
        assert_eq!(answers.find(range(64), 5), None, "it takes all the room");
        answers.keep(range(100), 5, 4, &extents(EXTENTS_MAX + 1));
        assert_eq!(answers.find(range(100), 5), None, "more than there is");
        answers.forget();
        assert_eq!(answers.find(range(99), 5), None);
    }
}
