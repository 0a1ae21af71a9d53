//! Persistent dirty bitmaps: loaded when the image is opened, stored when it is put away.
//!
//! ```text
//!   open: activate marks them in use -> list, read bits -> marks durable -> writes
//!   put away: settle -> bits, stretch by stretch -> the list, step by step -> settle -> close
//! ```
//! On the iothread that opens or closes; the gate is drained, or nobody has the image yet. While
//! it is open the bits are the node's ([`NodeBitmaps`]), and the file says that it is in use: who
//! is killed leaves bitmaps that say nothing. Invariant: no write comes before these marks.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::Errno;
use crate::bitmap::{Bits, DirtyBitmap, NodeBitmaps};
use crate::format::{
    Fault, FaultKind, FormatError, FormatFiles, KeptBitmap, STRETCH_BYTES, Stretch,
};

use super::ask::Tries;
use super::verify::Claims;
use super::{Image, ImageState, Plugin};

/// Bits that the bitmaps of one image have in all: 1 GiB of memory if they are all different. An
/// image may name one cluster of bits a million times.
const BITS_MAX: u64 = 1 << 33;

/// Bytes that are read of the bitmaps of one image in all: their bits, and that much again of
/// what a format has behind the last of them.
const STORED_BYTES_MAX: u64 = BITS_MAX / 4;

/// Bitmaps of one image, as in QEMU.
const BITMAPS_MAX: usize = 65_535;

/// Calls that a new list of bitmaps takes at most: a handful, and one for each thousand of them.
const KEEP_STEPS_MAX: usize = 256;

/// Why a bitmap cannot be kept in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CannotKeep {
    /// Its format keeps none.
    Unsupported,
    /// The format's words.
    Refused(String),
}

/// What became of the persistent bitmaps of an image that is put away.
pub(super) enum Stored {
    /// The image has none, or cannot be changed.
    Nothing,
    /// They are in the image.
    All,
    /// Not all of them; the image may have changed.
    Lost(FormatError),
}

fn refused(code: Errno) -> FormatError {
    let message = code.to_string();
    FormatError::Refused { code, message }
}

impl Image {
    /// The bitmaps of its node.
    #[must_use]
    pub const fn bitmaps(&self) -> &Arc<NodeBitmaps> {
        &self.bitmaps
    }

    /// Those that are kept, newest first.
    fn persistent(&self) -> Vec<Arc<DirtyBitmap>> {
        let mut all = self.bitmaps.all();
        all.retain(|bitmap| bitmap.is_persistent());
        all
    }

    // === loading ===

    /// Those that the image has, in place of those that were known. After `activate`.
    pub(super) async fn load_bitmaps(&self, plugin: &mut Plugin) -> Result<(), FormatError> {
        for bitmap in self.persistent() {
            self.bitmaps.remove(&bitmap);
        }
        let keeps = plugin
            .instance
            .as_ref()
            .is_some_and(|it| it.keeps_bitmaps());
        if !keeps {
            return Ok(());
        }
        let mut listed = Vec::new();
        loop {
            let first = listed.len() as u32;
            // Once: another instance would find the marks that this one has made.
            let some = self.call_once(plugin, &|f| f.list_bitmaps(first)).await?;
            if some.is_empty() {
                break;
            }
            listed.extend(some);
            if listed.len() > BITMAPS_MAX {
                return Err(self.lie(plugin, bad(format!("{} bitmaps", listed.len()))));
            }
        }
        let mut left = BITS_MAX;
        let mut bytes_left = STORED_BYTES_MAX;
        let size = self.size().next_multiple_of(512);
        let known = self.bitmaps.all();
        let mut names: HashSet<_> = known.iter().map(|it| it.name().to_owned()).collect();
        let mut loaded = Vec::new();
        for kept in listed {
            let too_many = || FormatError::Refused {
                code: Errno::FBig,
                message: format!(
                    "Its bitmaps take more than {} MiB of memory",
                    (BITS_MAX / 8) >> 20
                ),
            };
            let bits = Bits::new(size, kept.granularity).ok_or_else(too_many)?;
            left = left.checked_sub(bits.granules()).ok_or_else(too_many)?;
            if kept.consistent {
                let read = self
                    .load_bits(plugin, &kept.name, &bits, bytes_left)
                    .await?;
                bytes_left = bytes_left.checked_sub(read).ok_or_else(too_many)?;
            }
            if !names.insert(kept.name.clone()) {
                let message = format!("Bitmap already exists: {}", kept.name);
                return Err(self.lie(plugin, bad(message)));
            }
            let enabled = kept.enabled && kept.consistent;
            let bitmap = DirtyBitmap::with_bits(&kept.name, kept.granularity, bits, enabled);
            bitmap.set_persistent(true);
            if !kept.consistent {
                bitmap.set_inconsistent();
            }
            loaded.push(bitmap);
            // An image may have thousands, and there are others on this thread.
            tokio::task::yield_now().await;
        }
        if !loaded.is_empty() {
            self.has_stored.store(true, Ordering::Relaxed);
        }
        self.bitmaps.insert_all(loaded);
        self.bitmaps.publish();
        Ok(())
    }

    async fn load_bits(
        &self,
        plugin: &mut Plugin,
        name: &str,
        bits: &Bits,
        bytes_max: u64,
    ) -> Result<u64, FormatError> {
        let mut from = 0;
        let mut bytes = 0;
        while from < bits.granules() && bytes <= bytes_max {
            let read = self
                .call_once(plugin, &|f| f.read_bits(name.to_owned(), from))
                .await?;
            let Some(Stretch { first, data }) = read else {
                break;
            };
            let next = first.saturating_add(data.len() as u64 * 8);
            if first < from || next <= from {
                let message = format!("bits from {first} on, asked for those from {from} on");
                return Err(self.lie(plugin, bad(message)));
            }
            bits.set_stretch(first, &data);
            bytes += data.len() as u64;
            from = next;
        }
        Ok(bytes)
    }

    /// The marks that loading has made are in the file when this returns.
    pub(super) async fn make_marks_durable(&self) -> Result<(), Errno> {
        let marked = self.has_stored.load(Ordering::Relaxed);
        if !marked || !self.is_writable() || self.flusher.is_settled() {
            return Ok(());
        }
        self.write_back().await
    }

    /// The image is left to somebody else: what was stored is not ours any more.
    pub(super) fn drop_loaded_bitmaps(&self) {
        for bitmap in self.persistent() {
            if !bitmap.is_inconsistent() {
                self.bitmaps.remove(&bitmap);
            }
        }
        self.bitmaps.publish();
    }

    // === storing ===

    /// Stores the persistent bitmaps in the image, which is settled. Bitmaps that cannot be stored
    /// are lost, as after a crash: the image itself is closed all the same.
    pub(super) async fn put_bitmaps_away(&self) -> Stored {
        let kept = self.persistent();
        let any = !kept.is_empty() || self.has_stored.load(Ordering::Relaxed);
        if !any || self.state() != ImageState::Healthy {
            return Stored::Nothing;
        }
        let mut stored = self.store_bitmaps(&kept).await;
        if stored.is_err() {
            // Once more with an instance that looks for free space from the start: what was given
            // back meanwhile is found, and what an instance that failed was given is lost.
            self.drop_instance(&mut *self.plugin.lock().await);
            if self.settle().await.is_ok() {
                stored = self.store_bitmaps(&kept).await;
            }
        }
        match stored {
            Ok(()) => Stored::All,
            Err(error) => {
                let node = self.files.node_name();
                tracing::warn!(node, %error, "lost persistent bitmaps");
                Stored::Lost(error)
            }
        }
    }

    async fn store_bitmaps(&self, kept: &[Arc<DirtyBitmap>]) -> Result<(), FormatError> {
        let size = self.size().next_multiple_of(512);
        let generation = {
            let mut plugin = self.plugin.lock().await;
            self.ensure_instance(&mut plugin).await?;
            plugin.generation
        };
        for bitmap in kept.iter().filter(|it| !it.is_inconsistent()) {
            let mut bits = bitmap.bits();
            if bits.size() != size {
                bits = Arc::new(bits.resized(size));
            }
            let bitmap = described(bitmap, true);
            self.store_bits(&bitmap, &bits, generation).await?;
        }
        let described = |it: &Arc<DirtyBitmap>| described(it, !it.is_inconsistent());
        let kept_now = kept.iter().map(described).collect();
        self.keep_only(kept_now, Some(generation)).await?;
        self.has_stored.store(!kept.is_empty(), Ordering::Relaxed);
        Ok(())
    }

    /// `generation` is the instance that has what was put away so far: another one has nothing,
    /// and would keep bitmaps that are all clear.
    async fn store_bits(
        &self,
        bitmap: &KeptBitmap,
        bits: &Bits,
        generation: u64,
    ) -> Result<(), FormatError> {
        let step = STRETCH_BYTES as u64 * 8;
        let mut dirty = bits.next_set(0);
        while let Some(bit) = dirty {
            let first = bit / step * step;
            let data = bits.stretch(first, STRETCH_BYTES);
            let stretch = Stretch { first, data };
            let mut plugin = self.plugin.lock().await;
            self.still_the_same(&mut plugin, generation).await?;
            let store = self.ask(
                &mut plugin,
                Tries::Once,
                |f| f.store_bits(bitmap.clone(), stretch.clone()),
                |_, (), _| Ok(Claims::default()),
            );
            store.await?;
            drop(plugin);
            self.write_back_if_full().await?;
            dirty = bits.next_set(first + step);
        }
        Ok(())
    }

    /// The instance that began it still lives.
    async fn still_the_same(
        &self,
        plugin: &mut Plugin,
        generation: u64,
    ) -> Result<(), FormatError> {
        self.ensure_instance(plugin).await?;
        if plugin.generation == generation {
            return Ok(());
        }
        let message = "The plugin failed while bitmaps were stored".to_owned();
        let code = Errno::Io;
        Err(FormatError::Refused { code, message })
    }

    /// The image has these and no other, durably. With bits that this `generation` was given.
    async fn keep_only(
        &self,
        kept: Vec<KeptBitmap>,
        generation: Option<u64>,
    ) -> Result<(), FormatError> {
        for _ in 0..KEEP_STEPS_MAX {
            let mut plugin = self.plugin.lock().await;
            if let Some(generation) = generation {
                self.still_the_same(&mut plugin, generation).await?;
            }
            let keep = self.ask(
                &mut plugin,
                Tries::Once,
                |f| f.keep_bitmaps(kept.clone()),
                |_, _, _| Ok(Claims::default()),
            );
            let done = keep.await?;
            drop(plugin);
            self.write_back().await.map_err(refused)?;
            if done {
                return Ok(());
            }
        }
        let fault = bad("a list of bitmaps that is never done".to_owned());
        Err(FormatError::Fault(fault))
    }

    // === commands ===

    /// Whether one more bitmap could be kept.
    ///
    /// # Errors
    /// Why not.
    pub async fn can_keep(&self, name: &str, granularity: u32) -> Result<(), CannotKeep> {
        let mut plugin = self.plugin.lock().await;
        let made = self.ensure_instance(&mut plugin).await;
        made.map_err(|error| CannotKeep::Refused(error.to_string()))?;
        let keeps = plugin
            .instance
            .as_ref()
            .is_some_and(|it| it.keeps_bitmaps());
        if !keeps {
            return Err(CannotKeep::Unsupported);
        }
        let bitmap = KeptBitmap {
            name: name.to_owned(),
            granularity,
            enabled: true,
            consistent: true,
        };
        let kept: Vec<_> = self.persistent();
        let kept: Vec<_> = kept.iter().map(|it| it.name().to_owned()).collect();
        let checked = self
            .call(&mut plugin, |f| {
                f.check_bitmap(bitmap.clone(), kept.clone())
            })
            .await;
        checked.map_err(|error| CannotKeep::Refused(error.to_string()))
    }

    /// Bitmaps that were removed go from the image, too; the others stay as it has them.
    ///
    /// # Errors
    /// What could not be written; the bitmaps are there, in use, until the image is closed.
    pub async fn forget_removed(&self) -> Result<(), FormatError> {
        if !self.is_writable() || !self.has_stored.load(Ordering::Relaxed) {
            return Ok(());
        }
        let kept = self.persistent();
        let kept = kept.iter().map(|it| described(it, false)).collect();
        self.keep_only(kept, None).await?;
        self.flush().await.map_err(refused)
    }

    /// Whether the bitmaps that the image has can get another length.
    pub(super) fn check_bitmaps_follow(&self) -> Result<(), FormatError> {
        let kept = self.persistent();
        match kept.iter().rev().find(|it| it.is_inconsistent()) {
            None => Ok(()),
            Some(bitmap) => Err(FormatError::Refused {
                code: Errno::NotSup,
                message: format!(
                    "Bitmap '{}' is inconsistent and cannot be used",
                    bitmap.name()
                ),
            }),
        }
    }
}

fn bad(message: String) -> Fault {
    let kind = FaultKind::BadAnswer;
    Fault { kind, message }
}

fn described(bitmap: &DirtyBitmap, consistent: bool) -> KeptBitmap {
    KeptBitmap {
        name: bitmap.name().to_owned(),
        granularity: bitmap.granularity(),
        enabled: bitmap.is_enabled(),
        consistent,
    }
}
