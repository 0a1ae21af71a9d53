//! Which operation a ring takes next: those of one file never keep out those of others.
//!
//! Owned by one ring. Each file has a lane: what it has in the kernel, and what waits. Pure.
//! Invariant: a file has at most [`LANE_MAX`] in the kernel; what waits in a lane that has room is
//! offered in turns with the other lanes.

use std::collections::VecDeque;
use std::os::fd::RawFd;

/// Operations of one file in the kernel at one time: a file that does not answer, on a server that
/// is gone, takes no more room than this. Deeper queues make no disk faster.
const LANE_MAX: usize = 128;

struct Lane<T> {
    inside: usize,
    waiting: VecDeque<T>,
    /// It is in `ready`.
    ready: bool,
}

/// The lanes of a ring.
pub(super) struct Lanes<T> {
    /// By descriptor: the lowest numbers are given first.
    lanes: Vec<Lane<T>>,
    /// Files with something that waits and room for it.
    ready: VecDeque<usize>,
}

impl<T> Lanes<T> {
    pub(super) const fn new() -> Self {
        Self {
            lanes: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// Something for this file: given back if it may begin now, otherwise it waits. `room`: the
    /// ring has some.
    pub(super) fn enter(&mut self, file: RawFd, it: T, room: bool) -> Option<T> {
        let at = usize::try_from(file).unwrap_or_default();
        if at >= self.lanes.len() {
            self.lanes.resize_with(at + 1, || Lane {
                inside: 0,
                waiting: VecDeque::new(),
                ready: false,
            });
        }
        let lane = &mut self.lanes[at];
        if room && lane.inside < LANE_MAX && lane.waiting.is_empty() {
            lane.inside += 1;
            return Some(it);
        }
        lane.waiting.push_back(it);
        self.offer(at);
        None
    }

    /// Something of this file has ended.
    pub(super) fn leave(&mut self, file: RawFd) {
        let at = usize::try_from(file).unwrap_or_default();
        if let Some(lane) = self.lanes.get_mut(at) {
            lane.inside = lane.inside.saturating_sub(1);
            self.offer(at);
        }
    }

    /// What may begin next, if the ring has room.
    pub(super) fn next(&mut self) -> Option<T> {
        let at = self.ready.pop_front()?;
        let lane = &mut self.lanes[at];
        lane.ready = false;
        let next = lane.waiting.pop_front();
        lane.inside += usize::from(next.is_some());
        self.offer(at);
        next
    }

    fn offer(&mut self, at: usize) {
        let lane = &mut self.lanes[at];
        if !lane.ready && lane.inside < LANE_MAX && !lane.waiting.is_empty() {
            lane.ready = true;
            self.ready.push_back(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_full_leaves_room_for_others() {
        let mut lanes = Lanes::new();
        for it in 0..LANE_MAX {
            assert_eq!(lanes.enter(3, it, true), Some(it));
        }
        assert_eq!(lanes.enter(3, 1000, true), None);
        assert_eq!(lanes.enter(5, 7, true), Some(7));
        assert_eq!(lanes.next(), None);
        lanes.leave(3);
        assert_eq!(lanes.enter(3, 1001, true), None, "first come, first served");
        assert_eq!((lanes.next(), lanes.next()), (Some(1000), None));
    }

    #[test]
    fn files_that_wait_take_turns() {
        let mut lanes = Lanes::new();
        for it in [30, 31, 32, 50, 51, 40] {
            assert_eq!(lanes.enter(it / 10, it, false), None);
        }
        let order: Vec<_> = std::iter::from_fn(|| lanes.next()).collect();
        assert_eq!(order, [30, 50, 40, 31, 51, 32]);
    }
}
