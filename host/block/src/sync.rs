//! Atomics and locks of what threads share without a lock, behind one name.
//!
//! The models in `tests/loom` include the files that use this module, and give it another
//! meaning: loom's, which runs every order that the memory model allows. So a file that is
//! modelled takes its atomics from here and from nowhere else.

pub(crate) use std::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};

pub(crate) use arc_swap::ArcSwapOption;
