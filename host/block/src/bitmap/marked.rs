//! What the writes of one node mark: the gate that a write passes, and the list behind it.
//!
//! ```text
//!   publish:  list = new ── gate on or off ── publications + 1 ── changes + 1
//!   write:    its bytes ── gate off? done ── mark the list ── publications moved? again
//! ```
//!
//! Writers are on any thread; those who publish hold the lock of `set`. Invariants: who finds the
//! gate on finds the list that put it on, or a later one; a write that meets a publication is in
//! what was before or after it, or in both; what was marked in something of which a copy is
//! published is in the copy.

use std::sync::Arc;

use crate::sync::{ArcSwapOption, AtomicU8, AtomicU64, Ordering};

/// Writes mark bitmaps.
const MARKED: u8 = 1;

/// Somebody relies on what was said of the node until it is written to.
const WATCHED: u8 = 2;

/// A list of `B`, which are marked by writes.
#[derive(Debug)]
pub(crate) struct Marked<B> {
    /// The gate: all that a node without bitmaps pays for.
    any: AtomicU8,
    /// Writes that ended since the node is watched, and changes of other kinds.
    changes: AtomicU64,
    list: ArcSwapOption<Vec<Arc<B>>>,
    publications: AtomicU64,
}

impl<B> Default for Marked<B> {
    fn default() -> Self {
        Self {
            any: AtomicU8::default(),
            changes: AtomicU64::default(),
            list: ArcSwapOption::default(),
            publications: AtomicU64::default(),
        }
    }
}

impl<B> Marked<B> {
    /// From now on writes mark these. One publication at a time.
    pub(crate) fn publish(&self, list: Vec<Arc<B>>) {
        let any = !list.is_empty();
        self.list.store(any.then(|| Arc::new(list)));
        if any {
            self.any.fetch_or(MARKED, Ordering::SeqCst);
        } else {
            self.any.fetch_and(!MARKED, Ordering::SeqCst);
        }
        self.publications.fetch_add(1, Ordering::SeqCst);
        self.changed();
    }

    /// Publishes a list in which copies stand for others. `catch_up` brings over what was marked
    /// since they were copied: a write that marked only the old ones ended before this, and one
    /// that ends later marks the copies itself.
    pub(crate) fn publish_copies(&self, list: Vec<Arc<B>>, catch_up: impl FnOnce()) {
        self.publish(list);
        catch_up();
    }

    /// Does this list hold what is published? Nobody publishes meanwhile.
    pub(crate) fn is_published(&self, list: &[Arc<B>]) -> bool {
        let published = self.list.load();
        let published = (*published).as_ref();
        let published = published.map_or(&[][..], |all| all.as_slice());
        let same = list.iter().zip(published).all(|(a, b)| Arc::ptr_eq(a, b));
        same && list.len() == published.len()
    }

    /// What was said of the node may be wrong now, for another reason than a write.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// A number that is another one after each write that ended from now on, and after each
    /// change. Whoever asks once makes every write count.
    pub(crate) fn version(&self) -> u64 {
        if self.any.load(Ordering::Acquire) & WATCHED == 0 {
            self.any.fetch_or(WATCHED, Ordering::SeqCst);
            // A write that ends just now may not count: what is said now does not hold.
            return self.changes.fetch_add(1, Ordering::SeqCst);
        }
        self.changes.load(Ordering::SeqCst)
    }

    /// Does a write that ended concern anybody?
    ///
    /// Acquires what `publish` stored before: a writer that passes here finds the list. On x86
    /// that is the plain load that it would be anyway.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.any.load(Ordering::SeqCst) != 0
    }

    /// A write ended: `mark` marks one of the list; `false`: there is no room for it there.
    /// `make_room` publishes larger ones then; `false`: there are none.
    pub(crate) fn mark_all(&self, mark: impl Fn(&B) -> bool, make_room: impl Fn() -> bool) {
        loop {
            let publication = self.publications.load(Ordering::SeqCst);
            let mut fits = true;
            if let Some(all) = &*self.list.load() {
                for one in all.iter() {
                    fits &= mark(one);
                }
            }
            if !fits && make_room() {
                continue;
            }
            if self.publications.load(Ordering::SeqCst) == publication {
                break;
            }
        }
        if self.any.load(Ordering::SeqCst) & WATCHED != 0 {
            self.changed();
        }
    }
}
