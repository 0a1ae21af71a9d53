//! The files of one image: slots, the overlay over them, and how far each was
//! ever written.
//!
//! Shared between the image and its plugin instance (which sees it as
//! [`FormatFiles`]). Slots are granted while the image opens; a request finds its
//! file without a lock, and only a reopen, while nobody is inside, puts another
//! one in its place. Invariant: bytes at or beyond
//! `reach` of a slot were never written through this image and lay past the end
//! of the file when it was opened, so they read as zeroes. A device has no bytes past its end: none
//! of its space is ever taken for unwritten.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::engine::buffer::Buf;
use crate::error::{Error, ErrorKind};
use crate::filter::blkdebug::Event;
use crate::format::{FormatFiles, Stage, TxnOp};
use crate::node::Node;
use crate::{ByteRange, Errno};

use super::map::SLOTS_MAX;
use super::overlay::{Bytes, Overlay, PAGE};
use super::room::Room;
use super::{ImageEvent, ImageState};

/// A zero range larger than this is not kept in memory: the file system zeroes
/// it at once, which the prepare stage allows.
pub(super) const ZERO_IN_OVERLAY_MAX: u64 = 256 << 10;

/// Operations of one write-out in flight at one time.
const WRITE_OUT_DEPTH: usize = 64;

/// Called when the image has something to say.
pub type EventSink = Arc<dyn Fn(ImageEvent) + Send + Sync>;

struct Slot {
    node: ArcSwap<Node>,
    reach: AtomicU64,
}

/// Slots and overlay.
pub(crate) struct ImageFiles {
    node_name: String,
    slots: Box<[OnceLock<Slot>]>,
    overlay: Mutex<Overlay>,
    room: Mutex<Room>,
    /// The storage refused space since it gave some for a write.
    short: AtomicBool,
    state: AtomicU8,
    events: EventSink,
}

impl ImageFiles {
    pub(crate) fn new(node_name: &str, primary: Arc<Node>, events: EventSink) -> Self {
        let slot = Slot::new(primary);
        let mut slots: Vec<OnceLock<Slot>> = vec![OnceLock::from(slot)];
        slots.resize_with(SLOTS_MAX as usize, OnceLock::new);
        Self {
            node_name: node_name.to_owned(),
            slots: slots.into(),
            overlay: Mutex::default(),
            room: Mutex::default(),
            short: AtomicBool::new(false),
            state: AtomicU8::new(0),
            events,
        }
    }

    /// One more file; returns its slot.
    ///
    /// # Errors
    /// There are as many as an extent-map entry can name.
    pub(crate) fn grant(&self, node: Arc<Node>) -> Result<u32, Error> {
        let mut node = Some(node);
        for (index, slot) in self.slots.iter().enumerate() {
            slot.get_or_init(|| match node.take() {
                Some(node) => Slot::new(node),
                None => unreachable!("the loop ends when the node is placed"),
            });
            if node.is_none() {
                return Ok(index as u32);
            }
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("Node '{}': more than {SLOTS_MAX} files", self.node_name),
        ))
    }

    fn slot(&self, slot: u32) -> Result<&Slot, Errno> {
        let slot = self.slots.get(slot as usize).and_then(OnceLock::get);
        slot.ok_or(Errno::Inval)
    }

    /// The node behind a slot.
    pub(crate) fn node(&self, slot: u32) -> Result<Guard<Arc<Node>>, Errno> {
        self.slot(slot).map(|s| s.node.load())
    }

    /// All nodes, by slot.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = Arc<Node>> {
        let slots = self.slots.iter().map_while(OnceLock::get);
        slots.map(|s| s.node.load_full())
    }

    /// Another image file, for everyone; returns the one before. Nobody is inside, and nothing is
    /// queued.
    pub(crate) fn exchange_primary(&self, node: Arc<Node>) -> Result<Arc<Node>, Errno> {
        let slot = self.slot(0)?;
        let len = node.len_bytes();
        let old = slot.node.swap(node);
        slot.reach.store(len, Ordering::Release);
        *self.room_known() = Room::default();
        self.note_short(false);
        Ok(old)
    }

    /// Tell the control plane.
    pub(crate) fn announce(&self, make: impl FnOnce(String) -> ImageEvent) {
        (self.events)(make(self.node_name.clone()));
    }

    pub(crate) fn count(&self) -> usize {
        self.nodes().count()
    }

    pub(crate) fn overlay(&self) -> MutexGuard<'_, Overlay> {
        self.overlay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn room_known(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why writers start over in vain: instances were replaced for want of space, or they broke.
    pub(super) fn why_in_vain(&self) -> Errno {
        match self.short.load(Ordering::Relaxed) {
            true => Errno::NoSpc,
            false => Errno::Io,
        }
    }

    /// Whether the storage refused space for what a call queued.
    pub(super) fn note_short(&self, short: bool) {
        self.short.store(short, Ordering::Relaxed);
    }

    // === state ===

    /// What can still be used.
    pub(crate) fn state(&self) -> ImageState {
        match self.state.load(Ordering::Acquire) {
            0 => ImageState::Healthy,
            1 => ImageState::WritesRefused,
            _ => ImageState::Failed,
        }
    }

    /// States only get worse.
    pub(crate) fn set_state(&self, state: ImageState) {
        let number = match state {
            ImageState::Healthy => 0,
            ImageState::WritesRefused => 1,
            ImageState::Failed => 2,
        };
        if self.state.fetch_max(number, Ordering::AcqRel) < number {
            self.announce(|node_name| ImageEvent::State { node_name, state });
        }
    }

    /// The files may have changed behind our back, and damage with them.
    pub(crate) fn look_again(&self) {
        self.state.store(0, Ordering::Release);
        *self.room_known() = Room::default();
        for slot in self.slots.iter().map_while(OnceLock::get) {
            let node = slot.node.load();
            node.look_again();
            slot.reach.store(node.len_bytes(), Ordering::Release);
        }
    }

    // === reach ===

    /// How far the slot was ever written, or the file's end.
    pub(crate) fn reach(&self, slot: u32) -> u64 {
        self.slot(slot).map_or(0, Slot::reach)
    }

    /// Bytes up to `end` will be written. Returns where the slot reached
    /// before.
    pub(crate) fn extend_reach(&self, slot: u32, end: u64) -> u64 {
        let Ok(slot) = self.slot(slot) else {
            return u64::MAX;
        };
        // Not the file's length: a plugin grows the file before it hands out
        // space there, and what was only grown is still zero.
        slot.reach.fetch_max(end, Ordering::AcqRel)
    }

    /// Cut the file. Nobody writes beyond `len`.
    pub(crate) async fn cut(&self, number: u32, len: u64) -> Result<(), Errno> {
        let slot = self.slot(number)?;
        let node = slot.node.load();
        if len < node.len_bytes() {
            self.room_known()
                .forget(number, ByteRange::between(len, ByteRange::END_MAX));
            node.resize_storage(len).await?;
        }
        slot.reach.store(node.len_bytes(), Ordering::Release);
        Ok(())
    }

    // === transactions ===

    /// Is there room for what a call asked for, where files cannot grow? Of slots that there are.
    pub(crate) fn room(&self, txn: &[TxnOp]) -> Result<(), Errno> {
        let fits = |op: &TxnOp| match op {
            TxnOp::Grow { slot, size } => self.holds(*slot, *size),
            op => queued_bytes(op).is_none_or(|(slot, _, range, _)| self.holds(slot, range.end())),
        };
        if txn.iter().all(fits) {
            Ok(())
        } else {
            Err(Errno::NoSpc)
        }
    }

    /// Can the slot have bytes up to `end`?
    pub(crate) fn holds(&self, slot: u32, end: u64) -> bool {
        self.node(slot).ok().is_none_or(|node| node.holds(end))
    }

    /// Queue what a call asked for; all of it, or on an error nothing that
    /// anyone would notice. Plugin lock.
    pub(crate) async fn queue(&self, txn: &[TxnOp]) -> Result<(), Errno> {
        self.room(txn)?;
        let direct: Vec<_> = (0..txn.len()).map(|at| is_zeroed_now(txn, at)).collect();
        let kept = txn.iter().zip(&direct).filter(|(_, direct)| !**direct);
        let writes: Vec<_> = kept.filter_map(|(op, _)| queued_bytes(op)).collect();
        self.reserve(writes.iter().map(|&(slot, _, range, _)| (slot, range)))
            .await?;
        for (op, direct) in txn.iter().zip(&direct) {
            match op {
                TxnOp::Grow { slot, size } => self.node(*slot)?.grow_to(*size).await?,
                TxnOp::Zero { slot, range, .. } if *direct => self.zero_now(*slot, *range).await?,
                _ => {}
            }
        }
        loop {
            let (pages, retired) = {
                let overlay = self.overlay();
                let needs = writes.iter().flat_map(|&(slot, _, range, _)| {
                    overlay.needs(slot, range).map(move |page| (slot, page))
                });
                (needs.collect::<Vec<_>>(), overlay.retired())
            };
            let mut base = BTreeMap::new();
            for (slot, page) in pages {
                if let std::collections::btree_map::Entry::Vacant(entry) = base.entry((slot, page))
                {
                    let buf = Buf::zeroed(PAGE as usize);
                    self.node(slot)?.read_mem(page, buf.io()).await?;
                    entry.insert(buf.as_slice().to_vec());
                }
            }
            let mut overlay = self.overlay();
            if overlay.retired() != retired {
                // A flush ended meanwhile: sectors that were known are not any
                // more, and what was read may be older than the file.
                continue;
            }
            for &(slot, stage, range, bytes) in &writes {
                self.extend_reach(slot, range.end());
                overlay.write(slot, stage, range.offset(), bytes, &base);
            }
            return Ok(());
        }
    }

    async fn zero_now(&self, slot: u32, range: ByteRange) -> Result<(), Errno> {
        let reached = self.extend_reach(slot, range.end());
        let sealed = {
            let mut overlay = self.overlay();
            overlay.forget(slot, range);
            overlay.sealed_within(slot, range)
        };
        let node = self.node(slot)?;
        if range.offset() >= reached {
            node.grow_to(range.end()).await?;
        } else {
            node.write_zeroes(range, false).await?;
        }
        // The flush in progress may still write over these.
        let mut overlay = self.overlay();
        for part in sealed {
            let zeroes = Bytes::Zeroes(part.len());
            overlay.write(
                slot,
                Stage::Prepare,
                part.offset(),
                zeroes,
                &BTreeMap::new(),
            );
        }
        Ok(())
    }

    /// Write out one stage of the sealed generation; returns the slots written.
    pub(crate) async fn write_out(&self, stage: Stage) -> Result<Vec<u32>, Errno> {
        let parts = self.overlay().write_out(stage);
        let mut slots: Vec<u32> = parts.iter().map(|p| p.slot).collect();
        slots.dedup();
        for some in parts.chunks(WRITE_OUT_DEPTH) {
            let writes = some.iter().map(|part| async move {
                let buf = Buf::from_slice(&part.data);
                let node = self.node(part.slot)?;
                let event = match stage {
                    Stage::Prepare => Event::REFBLOCK_UPDATE,
                    Stage::Mapping => Event::L2_UPDATE,
                };
                node.write_as(event, part.offset, buf.io(), false).await
            });
            for result in futures_util::future::join_all(writes).await {
                result?;
            }
        }
        Ok(slots)
    }
}

impl Slot {
    fn new(node: Arc<Node>) -> Self {
        Self {
            reach: AtomicU64::new(node.len_bytes()),
            node: ArcSwap::new(node),
        }
    }

    /// Not further than the file can get: what is behind is not there.
    fn reach(&self) -> u64 {
        let reach = self.reach.load(Ordering::Acquire);
        let node = self.node.load();
        let reach = reach.max(node.len_bytes());
        node.len_max().map_or(reach, |max| reach.min(max))
    }
}

/// The bytes that an operation keeps in the overlay.
fn queued_bytes(op: &TxnOp) -> Option<(u32, Stage, ByteRange, Bytes<'_>)> {
    match op {
        TxnOp::Write {
            slot,
            stage,
            offset,
            data,
        } => {
            let range = ByteRange::new(*offset, data.len() as u64)?;
            Some((*slot, *stage, range, Bytes::Given(data)))
        }
        TxnOp::Zero { slot, stage, range } => {
            Some((*slot, *stage, *range, Bytes::Zeroes(range.len())))
        }
        TxnOp::Grow { .. } | TxnOp::Free(_) | TxnOp::Truncate { .. } => None,
    }
}

/// Is the operation carried out at once instead of queued?
fn is_zeroed_now(txn: &[TxnOp], at: usize) -> bool {
    match &txn[at] {
        TxnOp::Zero {
            slot,
            stage: Stage::Prepare,
            range,
        } => range.len() > ZERO_IN_OVERLAY_MAX && !touched(&txn[..at], *slot, *range),
        _ => false,
    }
}

/// Did an earlier operation of the transaction write there? It would come
/// after what is done at once.
fn touched(earlier: &[TxnOp], slot: u32, range: ByteRange) -> bool {
    let writes = earlier.iter().filter_map(queued_bytes);
    writes
        .into_iter()
        .any(|(s, _, r, _)| s == slot && r.overlaps(range))
}

impl FormatFiles for ImageFiles {
    fn size(&self, slot: u32) -> Result<u64, Errno> {
        self.slot(slot).map(Slot::reach)
    }

    fn try_read(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Option<Result<(), Errno>> {
        let node = match self.node(slot) {
            Ok(node) => node,
            Err(e) => return Some(Err(e)),
        };
        ByteRange::new(offset, buf.len() as u64)?;
        let retired = self.overlay().retired();
        if let Err(e) = node.try_read(offset, buf)? {
            return Some(Err(e));
        }
        let overlay = self.overlay();
        // A flush ended in between: the file is newer than what was read.
        (overlay.retired() == retired).then(|| {
            overlay.patch(slot, offset, buf);
            Ok(())
        })
    }

    fn read(
        &self,
        slot: u32,
        offset: u64,
        len: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Errno>> + Send + '_>> {
        Box::pin(async move {
            let node = self.node(slot)?;
            ByteRange::new(offset, len as u64).ok_or(Errno::Inval)?;
            loop {
                let retired = self.overlay().retired();
                let buf = Buf::zeroed(len);
                node.read_mem(offset, buf.io()).await?;
                let mut bytes = buf.as_slice().to_vec();
                let overlay = self.overlay();
                if overlay.retired() == retired {
                    overlay.patch(slot, offset, &mut bytes);
                    return Ok(bytes);
                }
            }
        })
    }

    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>, Errno> {
        let in_file = self.node(slot)?.next_data(offset)?;
        let queued = self.overlay().next_dirty(slot, offset);
        Ok(match (in_file, queued) {
            (Some(a), Some(b)) if b.offset() < a.offset() => Some(b),
            (a, b) => a.or(b),
        })
    }

    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool) {
        self.announce(|node_name| ImageEvent::Corrupted {
            node_name,
            message: message.to_owned(),
            offset,
            size,
            fatal,
        });
        if fatal {
            self.set_state(ImageState::WritesRefused);
        }
    }

    fn node_name(&self) -> &str {
        &self.node_name
    }
}
