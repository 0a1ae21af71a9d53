//! Dirty bitmaps: which granules of a node were written.
//!
//! ```text
//!  write, zero, discard ──► NodeBitmaps::mark ──► Bits     no lock; allocates a leaf's first
//!                                 ▲ exchanged as a whole
//!  commands ──► list of DirtyBitmap ── publish             control plane
//! ```
//!
//! A write is marked when it ended, before it is acknowledged, by what was published then.
//! Invariants: whoever sees a bitmap as published sees every write that it was to record; between
//! two publications nothing falls: a write that meets one is in what was before or after it, or in
//! both. Rules of use (busy, inconsistent) are the commands' affair.

mod bits;
mod marked;
mod set;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;

pub use bits::Bits;
pub(crate) use set::Mark;
pub use set::NodeBitmaps;

/// One bitmap. Its state is changed by the control plane alone.
#[derive(Debug)]
pub struct DirtyBitmap {
    name: String,
    granularity: u32,
    bits: ArcSwap<Bits>,
    enabled: AtomicBool,
    persistent: AtomicBool,
    inconsistent: AtomicBool,
    /// Who keeps it from being changed by commands: exports, and actions that are not decided.
    users: AtomicUsize,
}

impl DirtyBitmap {
    /// A bitmap without dirty granules for `size` bytes; `None`: too many granules.
    #[must_use]
    pub fn new(name: &str, granularity: u32, size: u64, enabled: bool) -> Option<Arc<Self>> {
        Some(Self::with_bits(
            name,
            granularity,
            Bits::new(size, granularity)?,
            enabled,
        ))
    }

    /// A bitmap with these bits, which have that granularity.
    #[must_use]
    pub fn with_bits(name: &str, granularity: u32, bits: Bits, enabled: bool) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            granularity,
            bits: ArcSwap::from_pointee(bits),
            enabled: AtomicBool::new(enabled),
            persistent: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            users: AtomicUsize::new(0),
        })
    }

    /// Its name, unique on its node.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of a granule: a power of two, at least 512.
    #[must_use]
    pub const fn granularity(&self) -> u32 {
        self.granularity
    }

    /// What is dirty now.
    #[must_use]
    pub fn bits(&self) -> Arc<Bits> {
        self.bits.load_full()
    }

    /// Gives it other bits; writers use them from [`NodeBitmaps::publish`] on. Returns what it
    /// had.
    pub fn replace_bits(&self, bits: Arc<Bits>) -> Arc<Bits> {
        self.bits.swap(bits)
    }

    /// Does it record writes?
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Lets it record writes, or not, from [`NodeBitmaps::publish`] on. Returns what was before.
    pub fn set_enabled(&self, enabled: bool) -> bool {
        self.enabled.swap(enabled, Ordering::Relaxed)
    }

    /// Is it kept in the image?
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::Relaxed)
    }

    /// It is kept in the image when the node is closed, or not.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Ordering::Relaxed);
    }

    /// Was it not stored when its image was used last? Then it says nothing.
    #[must_use]
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.load(Ordering::Relaxed)
    }

    /// It says nothing.
    pub fn set_inconsistent(&self) {
        self.inconsistent.store(true, Ordering::Relaxed);
    }

    /// Does somebody rely on it?
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }

    /// Commands leave it alone until the answer is dropped.
    #[must_use]
    pub fn hold(self: &Arc<Self>) -> Held {
        self.users.fetch_add(1, Ordering::Relaxed);
        Held(self.clone())
    }
}

/// A bitmap that somebody relies on.
#[derive(Debug)]
pub struct Held(Arc<DirtyBitmap>);

impl Held {
    /// The bitmap.
    #[must_use]
    pub const fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}
