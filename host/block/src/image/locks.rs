//! Range locks: one allocating writer per cluster.
//!
//! Taken by allocating writes, discards and zeroing, from any iothread, for as
//! long as space of the range is being moved. In-place writes take none. First
//! come, first served: a wide range is not starved by many narrow ones.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::ByteRange;

/// Who holds or waits, in the order they came. Few: at most one per request in
/// flight.
#[derive(Debug, Default)]
struct Line {
    next: u64,
    tickets: Vec<(u64, ByteRange)>,
}

/// The ranges that are locked or waited for now.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    line: Mutex<Line>,
    released: Notify,
}

/// A place in the line, or at its head a locked range; given up on drop.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until no byte of the range is locked, then lock it.
    pub(crate) async fn lock(&self, range: ByteRange) -> RangeGuard<'_> {
        let guard = {
            let mut line = self.line();
            let ticket = line.next;
            line.next += 1;
            line.tickets.push((ticket, range));
            RangeGuard {
                locks: self,
                ticket,
            }
        };
        loop {
            // Made before looking, so that no release is missed.
            let released = self.released.notified();
            if self.line().is_first(guard.ticket, range) {
                return guard;
            }
            released.await;
        }
    }
}

impl Line {
    /// Does nobody before `ticket` want a byte of the range?
    fn is_first(&self, ticket: u64, range: ByteRange) -> bool {
        let before = self.tickets.iter().filter(|(t, _)| *t < ticket);
        !before.into_iter().any(|(_, r)| r.overlaps(range))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut line = self.locks.line();
        line.tickets.retain(|(t, _)| *t != self.ticket);
        drop(line);
        self.locks.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use std::pin::Pin;
    use std::task::Poll;

    use super::*;

    async fn is_ready<F: Future>(work: &mut Pin<Box<F>>) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_ready())).await
    }

    #[tokio::test]
    async fn overlapping_ranges_wait_for_each_other() {
        let locks = Arc::new(RangeLocks::default());
        let a = locks.lock(ByteRange::between(0, 10)).await;
        let _other = locks.lock(ByteRange::between(10, 20)).await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move {
                locks.lock(ByteRange::between(5, 6)).await;
            }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(a);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn a_wide_range_is_not_overtaken_and_may_give_up() {
        let locks = RangeLocks::default();
        let narrow = locks.lock(ByteRange::between(0, 1)).await;
        let mut wide = Box::pin(locks.lock(ByteRange::between(0, 100)));
        assert!(!is_ready(&mut wide).await);
        let mut late = Box::pin(locks.lock(ByteRange::between(50, 51)));
        assert!(!is_ready(&mut late).await, "it came after the wide one");
        drop(wide);
        assert!(is_ready(&mut late).await);
        drop(narrow);
    }
}
