//! Answers of a metadata context that hold for a while.
//!
//! Shared by the connections of an export. One that holds until the plugin's generation changes is
//! used again when the plugin was asked for that, which costs a tenth of asking for the answer; one
//! that holds until a write, while the node's version is the same: then nobody is asked. The host
//! keeps less than it may: any write to the chain ends it, also one elsewhere. Invariant: at most
//! [`KEPT_MAX`] answers, and [`EXTENTS_MAX`] extents in all of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use outport_block::ByteRange;
use outport_block::metacontext::ContextExtent;

/// Answers kept: what one client asks while it walks an image twice in steps of a GiB.
const KEPT_MAX: usize = 64;

/// Extents kept, 16 bytes each: as many as one reply may have, so that a client which asks for all
/// of a finely dirty image again does not cost the plugin's work again.
const EXTENTS_MAX: usize = 1 << 20;

/// How long an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Validity {
    /// For this request.
    Now,
    /// While the plugin's generation is this one.
    Generation(u64),
    /// Until the node is written to.
    Write,
}

/// While what an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// While the plugin's generation is this one.
    Generation(u64),
    /// While the node's version is this one.
    Version(u64),
}

#[derive(Debug)]
struct Kept {
    range: ByteRange,
    extents_max: usize,
    holds: Holds,
    extents: Vec<ContextExtent>,
}

/// The answers of one context, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Answers(Mutex<VecDeque<Kept>>);

impl Answers {
    /// The answer to the same question, and how long it holds.
    pub(crate) fn find(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Option<(Holds, Vec<ContextExtent>)> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |it: &&Kept| it.range == range && it.extents_max == extents_max;
        let found = kept.iter().find(same)?;
        Some((found.holds, found.extents.clone()))
    }

    /// Keep an answer, in the place of an older one to the same question.
    pub(crate) fn keep(
        &self,
        range: ByteRange,
        extents_max: usize,
        holds: Holds,
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
                holds,
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
        let first = Holds::Generation(1);
        answers.keep(range(0), 5, first, &extents(1));
        let second = Holds::Version(2);
        answers.keep(range(0), 5, second, &extents(3));
        assert_eq!(answers.find(range(0), 5), Some((second, extents(3))));
        assert_eq!(answers.find(range(0), 6), None);
        for at in 1..=64 {
            answers.keep(range(at), 5, first, &extents(1));
        }
        assert_eq!(answers.find(range(0), 5), None);
        assert!(answers.find(range(1), 5).is_some());
        answers.keep(range(99), 5, first, &extents(EXTENTS_MAX));
        assert_eq!(answers.find(range(64), 5), None, "it takes all the room");
        answers.keep(range(100), 5, first, &extents(EXTENTS_MAX + 1));
        assert_eq!(answers.find(range(100), 5), None, "more than there is");
        answers.forget();
        assert_eq!(answers.find(range(99), 5), None);
    }
}
