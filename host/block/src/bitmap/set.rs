//! The bitmaps of one node, and what its writes mark.
//!
//! The list is the control plane's, behind a mutex that writers take only where an image outgrows
//! its file's bitmaps. What writes mark is a copy of it, exchanged as a whole (`publish`) and
//! counted: a writer that meets an exchange marks what came after it, too.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::marked::Marked;
use super::{Bits, DirtyBitmap};
use crate::ByteRange;

/// The bitmaps of one node.
#[derive(Debug, Default)]
pub struct NodeBitmaps {
    marked: Marked<Bits>,
    /// Newest first.
    list: Mutex<Vec<Arc<DirtyBitmap>>>,
}

impl NodeBitmaps {
    // === control plane ===

    fn list(&self) -> MutexGuard<'_, Vec<Arc<DirtyBitmap>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bitmaps, newest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<DirtyBitmap>> {
        self.list().clone()
    }

    /// The bitmap of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        self.list().iter().find(|it| it.name() == name).cloned()
    }

    /// Adds a bitmap, whose name is new here. It records from [`NodeBitmaps::publish`] on.
    pub fn insert(&self, bitmap: Arc<DirtyBitmap>) {
        self.list().insert(0, bitmap);
    }

    /// Adds bitmaps, the oldest first, whose names are new here.
    pub(crate) fn insert_all(&self, bitmaps: Vec<Arc<DirtyBitmap>>) {
        let mut list = self.list();
        list.splice(..0, bitmaps.into_iter().rev());
    }

    /// Takes a bitmap out; it records until [`NodeBitmaps::publish`].
    pub fn remove(&self, bitmap: &Arc<DirtyBitmap>) {
        self.list().retain(|it| !Arc::ptr_eq(it, bitmap));
    }

    /// From now on writes mark the bits of the bitmaps that are enabled now. Marks of writes that
    /// ended before are seen by the caller.
    pub fn publish(&self) {
        self.publish_list(&self.list());
    }

    fn publish_list(&self, list: &[Arc<DirtyBitmap>]) {
        self.marked.publish(enabled(list));
    }

    /// What was said of the node may be wrong now, for another reason than a write.
    pub(crate) fn changed(&self) {
        self.marked.changed();
    }

    /// A number that is another one after each write that ended from now on, and after each
    /// change of the bitmaps. Whoever asks once makes every write count.
    pub(crate) fn version(&self) -> u64 {
        self.marked.version()
    }

    /// A bitmap that cannot have bits for so many bytes.
    #[must_use]
    pub fn too_small_for(&self, size: u64) -> Option<Arc<DirtyBitmap>> {
        let list = self.list();
        list.iter().find(|it| !it.bits().can_cover(size)).cloned()
    }

    /// The node has another length.
    pub fn resize(&self, size: u64) {
        let list = self.list();
        if list.is_empty() {
            return;
        }
        let mut copies = Vec::new();
        for bitmap in list.iter().filter(|it| it.bits().size() != size) {
            if !bitmap.bits().can_cover(size) {
                overflowed(bitmap, size);
            }
            let (old, new) = (bitmap.bits(), Arc::new(bitmap.bits().resized(size)));
            bitmap.replace_bits(new.clone());
            copies.push((old, new));
        }
        self.publish_copies(&list, &copies);
    }

    fn publish_copies(&self, list: &[Arc<DirtyBitmap>], copies: &[(Arc<Bits>, Arc<Bits>)]) {
        self.marked.publish_copies(enabled(list), || {
            for (old, new) in copies {
                new.catch_up(old);
            }
        });
    }

    // === writers ===

    /// A write to this range ended, well or not.
    #[inline]
    pub(crate) fn mark(&self, range: ByteRange) {
        if self.marked.is_on() && !range.is_empty() {
            self.mark_all(range);
        }
    }

    fn mark_all(&self, range: ByteRange) {
        let make_room = || self.make_room(range.end());
        self.marked.mark_all(|bits| bits.mark(range), make_room);
    }

    /// A write went past the end. `false`: no bitmap can have more bits.
    fn make_room(&self, end: u64) -> bool {
        let list = self.list();
        let mut copies = Vec::new();
        for bitmap in list.iter() {
            let bits = bitmap.bits();
            if bits.has_room_for(end) {
                continue;
            }
            let roomy = bits.with_room(end);
            if !roomy.has_room_for(end) {
                overflowed(bitmap, end);
            }
            // Bits that are exchanged must be published, and whoever publishes marks again.
            if roomy.has_more_room_than(&bits) {
                let roomy = Arc::new(roomy);
                bitmap.replace_bits(roomy.clone());
                copies.push((bits, roomy));
            }
        }
        // Commands may have given room that is not published yet.
        let news = !copies.is_empty() || !self.marked.is_published(&enabled(&list));
        if news {
            self.publish_copies(&list, &copies);
        }
        news
    }
}

/// The bits of those that are enabled.
fn enabled(list: &[Arc<DirtyBitmap>]) -> Vec<Arc<Bits>> {
    let enabled = list.iter().filter(|it| it.is_enabled());
    enabled.map(|it| it.bits()).collect()
}

/// Something was written of which the bitmap has no bits.
fn overflowed(bitmap: &DirtyBitmap, end: u64) {
    if !bitmap.is_inconsistent() {
        let name = bitmap.name();
        tracing::warn!(bitmap = name, end, "a bitmap cannot have so many bits");
        bitmap.set_inconsistent();
    }
}

/// A write in progress: marked when it ended, and also if nobody waits for its end.
///
/// Owns its way to the bitmaps, because what was begun ends without its requester.
pub(crate) struct Mark(Arc<NodeBitmaps>, ByteRange);

impl Mark {
    pub(crate) fn new(bitmaps: &Arc<NodeBitmaps>, range: ByteRange) -> Self {
        Self(bitmaps.clone(), range)
    }

    /// There is nothing to mark after all.
    pub(crate) fn forget(mut self) {
        self.1 = ByteRange::default();
    }

    /// Does the work, then marks.
    pub(crate) async fn after<T>(self, work: impl Future<Output = T>) -> T {
        let done = work.await;
        drop(self);
        done
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.mark(self.1);
    }
}
