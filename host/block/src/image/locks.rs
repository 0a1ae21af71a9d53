//! Range locks: one allocating writer per cluster.
//!
//! Taken by allocating writes, discards and zeroing, from any iothread, for as
//! long as space of the range is being moved. In-place writes take none.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::ByteRange;

/// The ranges that are locked now. Few: at most one per request in flight.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    held: Mutex<Vec<ByteRange>>,
    released: Notify,
}

/// A locked range; unlocks on drop.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: ByteRange,
}

impl RangeLocks {
    /// Wait until no byte of the range is locked, then lock it.
    pub(crate) async fn lock(&self, range: ByteRange) -> RangeGuard<'_> {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            // Registered before looking, so that no release is missed.
            released.as_mut().enable();
            {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                if !held.iter().any(|h| h.overlaps(range)) {
                    held.push(range);
                    return RangeGuard { locks: self, range };
                }
            }
            released.await;
        }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self
            .locks
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = held.iter().position(|h| *h == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.locks.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

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
}
