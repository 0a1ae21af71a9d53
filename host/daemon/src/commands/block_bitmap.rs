//! Dirty bitmaps (`block-core.json`): each command is an action of a transaction, alone or among
//! others.
//!
//! Preparing changes the list of bitmaps; what writers mark changes when all was prepared, for
//! each node at once, and only then bits are merged. So of writes that run meanwhile each is in the
//! bitmaps as they were before or as they are after, and undoing loses none.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use outport_block::Node;
use outport_block::bitmap::{Bits, DirtyBitmap, Held};
use outport_block::node::Kind;
use outport_qmp::Error;
use outport_qmp::types::block_bitmap::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapOrStr,
    BlockDirtyBitmapSha256,
};
use sha2::{Digest, Sha256};

use super::transaction::{Action, Committed};
use crate::bitmaps::{self, check_changeable, check_idle, check_storable, check_usable};
use crate::daemon::Daemon;

/// The longest name, as in QEMU: what qcow2 can store.
const NAME_BYTES_MAX: usize = 1023;

/// Granules of nodes that do not say what suits them; also the largest one that is chosen.
const GRANULARITY: u32 = 64 << 10;

/// The smallest granule that is chosen.
const GRANULARITY_MIN: u32 = 4 << 10;

type Found = (Arc<Node>, Arc<DirtyBitmap>);

fn find(daemon: &Daemon, bitmap: &BlockDirtyBitmap) -> Result<Found, Error> {
    bitmaps::find(daemon, &bitmap.node, &bitmap.name)
}

// === add ===

struct Add {
    wanted: BlockDirtyBitmapAdd,
    /// Whether the image can keep it, if it is to.
    storable: Result<(), Error>,
    added: Option<Found>,
}

/// `block-dirty-bitmap-add`.
pub(super) fn add(arguments: BlockDirtyBitmapAdd) -> Box<dyn Action> {
    Box::new(Add {
        wanted: arguments,
        storable: Ok(()),
        added: None,
    })
}

impl Action for Add {
    fn inquire<'a>(&'a mut self, daemon: &'a Daemon) -> LocalBoxFuture<'a, ()> {
        Box::pin(async move {
            let wanted = &self.wanted;
            if wanted.persistent != Some(true) {
                return;
            }
            let node = daemon.graph.borrow().lookup(&wanted.node, &wanted.node);
            let Ok(node) = node else { return };
            if let Ok(granularity) = granularity(wanted, &node) {
                let asked = bitmaps::check_can_store(daemon, &node, &wanted.name, granularity);
                self.storable = asked.await;
            }
        })
    }

    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let Self {
            wanted,
            storable,
            added,
        } = self;
        let name = &wanted.name;
        if name.is_empty() {
            return Err(Error::generic("Bitmap name cannot be empty"));
        }
        let node = daemon.graph.borrow().lookup(&wanted.node, &wanted.node)?;
        let granularity = granularity(wanted, &node)?;
        let persistent = wanted.persistent.unwrap_or(false);
        storable.clone()?;
        if node.bitmaps().find(name).is_some() {
            return Err(Error::generic(format!("Bitmap already exists: {name}")));
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(Error::generic(format!("Bitmap name too long: {name}")));
        }
        let enabled = !wanted.disabled.unwrap_or(false);
        let bitmap = DirtyBitmap::new(name, granularity, node.size(), enabled);
        let bitmap = bitmap.ok_or_else(|| {
            Error::generic(format!(
                "Bitmap '{name}' would have too many granules; choose a larger granularity"
            ))
        })?;
        bitmap.set_persistent(persistent);
        node.bitmaps().insert(bitmap.clone());
        *added = Some((node, bitmap));
        Ok(())
    }

    fn commit(self: Box<Self>, done: &mut Committed) {
        if let Some((node, _)) = self.added {
            done.touch(&node);
        }
    }

    fn abort(self: Box<Self>) {
        if let Some((node, bitmap)) = self.added {
            node.bitmaps().remove(&bitmap);
        }
    }
}

/// What was asked for, or what suits the node.
fn granularity(wanted: &BlockDirtyBitmapAdd, node: &Arc<Node>) -> Result<u32, Error> {
    match wanted.granularity {
        Some(bytes) if bytes < 512 || !bytes.is_power_of_two() => Err(Error::generic(
            "Granularity must be power of 2 and at least 512",
        )),
        Some(bytes) => Ok(bytes),
        None => Ok(granularity_of(node)),
    }
}

/// What suits a node: an image's clusters, within bounds.
fn granularity_of(node: &Arc<Node>) -> u32 {
    let mut node = node.clone();
    while let Kind::Filter(filter) = node.kind() {
        node = filter.child().1.clone();
    }
    let clusters = node.image().map(|image| image.cluster_size());
    clusters.map_or(GRANULARITY, |bytes| {
        bytes.clamp(GRANULARITY_MIN, GRANULARITY)
    })
}

// === remove ===

struct Remove(BlockDirtyBitmap, Option<(Arc<Node>, Held)>);

/// `block-dirty-bitmap-remove`.
pub(super) fn remove(bitmap: BlockDirtyBitmap) -> Box<dyn Action> {
    Box::new(Remove(bitmap, None))
}

impl Action for Remove {
    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let (node, bitmap) = find(daemon, &self.0)?;
        check_idle(&bitmap)?;
        check_storable(&node, &bitmap)?;
        // Later actions of the transaction may not use it, nor its name.
        self.1 = Some((node, bitmap.hold()));
        Ok(())
    }

    fn commit(self: Box<Self>, done: &mut Committed) {
        if let Some((node, held)) = self.1 {
            node.bitmaps().remove(held.bitmap());
            done.touch(&node);
            if held.bitmap().is_persistent() {
                done.forgetting.push(node);
            }
        }
    }

    fn abort(self: Box<Self>) {}
}

// === clear ===

struct Clear(BlockDirtyBitmap, Option<(Found, Arc<Bits>)>);

/// `block-dirty-bitmap-clear`.
pub(super) fn clear(bitmap: BlockDirtyBitmap) -> Box<dyn Action> {
    Box::new(Clear(bitmap, None))
}

impl Action for Clear {
    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let (node, bitmap) = find(daemon, &self.0)?;
        check_changeable(&node, &bitmap)?;
        let before = bitmap.replace_bits(Arc::new(bitmap.bits().cleaned()));
        self.1 = Some(((node, bitmap), before));
        Ok(())
    }

    fn commit(self: Box<Self>, done: &mut Committed) {
        if let Some(((node, _), _)) = self.1 {
            done.touch(&node);
        }
    }

    fn abort(self: Box<Self>) {
        if let Some(((_, bitmap), before)) = self.1 {
            bitmap.replace_bits(before);
        }
    }
}

// === enable, disable ===

struct Switch {
    bitmap: BlockDirtyBitmap,
    enable: bool,
    switched: Option<(Found, bool)>,
}

/// `block-dirty-bitmap-enable`.
pub(super) fn enable(bitmap: BlockDirtyBitmap) -> Box<dyn Action> {
    let (enable, switched) = (true, None);
    Box::new(Switch {
        bitmap,
        enable,
        switched,
    })
}

/// `block-dirty-bitmap-disable`.
pub(super) fn disable(bitmap: BlockDirtyBitmap) -> Box<dyn Action> {
    let (enable, switched) = (false, None);
    Box::new(Switch {
        bitmap,
        enable,
        switched,
    })
}

impl Action for Switch {
    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let (node, bitmap) = find(daemon, &self.bitmap)?;
        check_usable(&bitmap)?;
        let before = bitmap.set_enabled(self.enable);
        self.switched = Some(((node, bitmap), before));
        Ok(())
    }

    fn commit(self: Box<Self>, done: &mut Committed) {
        if let Some(((node, _), _)) = self.switched {
            done.touch(&node);
        }
    }

    fn abort(self: Box<Self>) {
        if let Some(((_, bitmap), before)) = self.switched {
            bitmap.set_enabled(before);
        }
    }
}

// === merge ===

struct Merge(BlockDirtyBitmapMerge, Vec<(Arc<Bits>, Arc<Bits>)>);

/// `block-dirty-bitmap-merge`.
pub(super) fn merge(arguments: BlockDirtyBitmapMerge) -> Box<dyn Action> {
    Box::new(Merge(arguments, Vec::new()))
}

impl Action for Merge {
    fn prepare(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let Self(wanted, merges) = self;
        let (node, target) = bitmaps::find(daemon, &wanted.node, &wanted.target)?;
        let into = target.bits();
        for from in &wanted.bitmaps {
            let source = match from {
                BlockDirtyBitmapOrStr::Local(name) => bitmaps::find(daemon, &wanted.node, name)?.1,
                BlockDirtyBitmapOrStr::External(bitmap) => find(daemon, bitmap)?.1,
            };
            check_changeable(&node, &target)?;
            check_usable(&source)?;
            let bits = source.bits();
            if bits.size() != into.size() {
                return Err(Error::generic(format!(
                    "Bitmaps are of different sizes (destination size is {}, source size is {}) \
                     and can't be merged",
                    into.size(),
                    bits.size()
                )));
            }
            merges.push((into.clone(), bits));
        }
        Ok(())
    }

    fn commit(self: Box<Self>, done: &mut Committed) {
        done.merges.extend(self.1);
    }

    fn abort(self: Box<Self>) {}
}

// === x-debug-block-dirty-bitmap-sha256 ===

/// `x-debug-block-dirty-bitmap-sha256`: over the bits in words of 64, little-endian.
pub(super) fn sha256(
    daemon: &Daemon,
    bitmap: &BlockDirtyBitmap,
) -> Result<BlockDirtyBitmapSha256, Error> {
    let bits = find(daemon, bitmap)?.1.bits();
    let mut digest = Sha256::new();
    for at in 0..bits.words() {
        digest.update(bits.word(at).to_le_bytes());
    }
    let sha256 = digest.finalize();
    let sha256 = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(BlockDirtyBitmapSha256 { sha256 })
}
