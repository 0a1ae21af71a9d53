//! What `crate::sync` means in a model: loom's atomics and locks.
//!
//! Loom knows sequential consistency of fences only. So a change of that order is one that
//! acquires and releases, with a fence behind it, and such a load is one that acquires: what a
//! processor with a total store order does. A load promises less than in the language, so that a
//! model may fail where the code is right, and not the other way round.

use std::sync::Arc;

pub(crate) use loom::sync::Mutex;
pub(crate) use loom::sync::atomic::{Ordering, fence};

fn fenced<T>(order: Ordering, weaker: Ordering, change: impl FnOnce(Ordering) -> T) -> T {
    if order != Ordering::SeqCst {
        return change(order);
    }
    let value = change(weaker);
    fence(Ordering::SeqCst);
    value
}

macro_rules! atomic {
    ($name:ident, $value:ty, $($change:ident)*) => {
        #[derive(Debug, Default)]
        pub(crate) struct $name(loom::sync::atomic::$name);

        #[allow(dead_code, reason = "each model uses some of them")]
        impl $name {
            #[track_caller]
            pub(crate) fn new(value: $value) -> Self {
                Self(loom::sync::atomic::$name::new(value))
            }

            #[track_caller]
            pub(crate) fn load(&self, order: Ordering) -> $value {
                match order {
                    Ordering::SeqCst => self.0.load(Ordering::Acquire),
                    weaker => self.0.load(weaker),
                }
            }

            #[track_caller]
            pub(crate) fn store(&self, value: $value, order: Ordering) {
                fenced(order, Ordering::Release, |order| self.0.store(value, order));
            }

            $(
                #[track_caller]
                pub(crate) fn $change(&self, value: $value, order: Ordering) -> $value {
                    fenced(order, Ordering::AcqRel, |order| self.0.$change(value, order))
                }
            )*
        }
    };
}

atomic!(AtomicBool, bool, swap);
atomic!(AtomicU8, u8, fetch_or fetch_and);
atomic!(AtomicU64, u64, fetch_add);
atomic!(AtomicUsize, usize, fetch_add fetch_sub);

/// As the crate `arc_swap` has it: a store is of the strongest order, a load acquires.
#[derive(Debug)]
pub(crate) struct ArcSwapOption<T> {
    /// Place in `kept`, plus one; 0: nothing.
    place: AtomicUsize,
    kept: std::sync::Mutex<Vec<Arc<T>>>,
}

impl<T> Default for ArcSwapOption<T> {
    fn default() -> Self {
        Self {
            place: AtomicUsize::default(),
            kept: std::sync::Mutex::default(),
        }
    }
}

impl<T> ArcSwapOption<T> {
    pub(crate) fn store(&self, value: Option<Arc<T>>) {
        let place = value.map_or(0, |value| {
            let mut kept = self
                .kept
                .lock()
                .expect("no model panics while it holds this");
            kept.push(value);
            kept.len()
        });
        self.place.store(place, Ordering::SeqCst);
    }

    pub(crate) fn load(&self) -> Box<Option<Arc<T>>> {
        let place = self.place.load(Ordering::Acquire);
        let kept = self
            .kept
            .lock()
            .expect("no model panics while it holds this");
        Box::new(place.checked_sub(1).map(|at| kept[at].clone()))
    }
}
