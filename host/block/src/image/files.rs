//! The files of one image: slots, the overlay over them, and how far each was
//! ever written.
//!
//! Shared between the image and its plugin instance (which sees it as
//! [`FormatFiles`]). Invariant: bytes at or beyond `reach` of a slot were never
//! written through this image and lie past the end of the file, so they read as
//! zeroes.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::engine::buffer::Buf;
use crate::format::{FormatFiles, Stage};
use crate::node::Node;
use crate::{ByteRange, Errno};

use super::ImageEvent;
use super::overlay::{Bytes, Overlay, PAGE};

/// A zero range larger than this is not kept in memory: the file system zeroes
/// it at once, which the prepare stage allows.
const ZERO_IN_OVERLAY_MAX: u64 = 256 << 10;

/// Called when the image has something to say.
pub type EventSink = Arc<dyn Fn(ImageEvent) + Send + Sync>;

struct Slot {
    node: Arc<Node>,
    reach: AtomicU64,
}

/// Slots and overlay.
pub(crate) struct ImageFiles {
    node_name: String,
    slots: RwLock<Vec<Arc<Slot>>>,
    overlay: Mutex<Overlay>,
    events: EventSink,
}

impl ImageFiles {
    pub(crate) fn new(node_name: &str, primary: Arc<Node>, events: EventSink) -> Self {
        let files = Self {
            node_name: node_name.to_owned(),
            slots: RwLock::default(),
            overlay: Mutex::default(),
            events,
        };
        files.grant(primary);
        files
    }

    /// One more file; returns its slot.
    pub(crate) fn grant(&self, node: Arc<Node>) -> u32 {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let reach = AtomicU64::new(node.len_bytes());
        slots.push(Arc::new(Slot { node, reach }));
        (slots.len() - 1) as u32
    }

    fn slot(&self, slot: u32) -> Result<Arc<Slot>, Errno> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(slot as usize).cloned().ok_or(Errno::Inval)
    }

    /// The node behind a slot.
    pub(crate) fn node(&self, slot: u32) -> Result<Arc<Node>, Errno> {
        self.slot(slot).map(|s| s.node.clone())
    }

    /// All nodes, by slot.
    pub(crate) fn nodes(&self) -> Vec<Arc<Node>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().map(|s| s.node.clone()).collect()
    }

    /// Tell the control plane.
    pub(crate) fn announce(&self, make: impl FnOnce(String) -> ImageEvent) {
        (self.events)(make(self.node_name.clone()));
    }

    pub(crate) fn count(&self) -> usize {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    pub(crate) fn overlay(&self) -> MutexGuard<'_, Overlay> {
        self.overlay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the slot was ever written, or the file's end.
    pub(crate) fn reach(&self, slot: u32) -> u64 {
        self.slot(slot).map_or(0, |s| {
            s.reach.load(Ordering::Acquire).max(s.node.len_bytes())
        })
    }

    /// Bytes up to `end` will be written. Returns where the slot reached
    /// before.
    pub(crate) fn extend_reach(&self, slot: u32, end: u64) -> u64 {
        let Ok(slot) = self.slot(slot) else {
            return u64::MAX;
        };
        let len = slot.node.len_bytes();
        slot.reach
            .fetch_max(end.max(len), Ordering::AcqRel)
            .max(len)
    }

    /// Queue bytes in the overlay; reads what partial sectors need.
    pub(crate) async fn queue(
        &self,
        slot: u32,
        stage: Stage,
        offset: u64,
        data: Bytes<'_>,
    ) -> Result<(), Errno> {
        let len = match data {
            Bytes::Given(b) => b.len() as u64,
            Bytes::Zeroes(n) => n,
        };
        let range = ByteRange::new(offset, len).ok_or(Errno::Inval)?;
        if range.is_empty() {
            return Ok(());
        }
        if matches!(data, Bytes::Zeroes(_)) && stage == Stage::Prepare && len > ZERO_IN_OVERLAY_MAX
        {
            return self.zero_now(slot, range).await;
        }
        let needs = self.overlay().needs(slot, range);
        let node = self.node(slot)?;
        let mut base = BTreeMap::new();
        for page in needs {
            let buf = Buf::zeroed(PAGE as usize);
            node.read_mem(page, buf.io()).await?;
            base.insert(page, buf.as_slice().to_vec());
        }
        self.extend_reach(slot, range.end());
        self.overlay().write(slot, stage, offset, data, &base);
        Ok(())
    }

    async fn zero_now(&self, slot: u32, range: ByteRange) -> Result<(), Errno> {
        let reached = self.extend_reach(slot, range.end());
        self.overlay().forget(slot, range);
        let node = self.node(slot)?;
        if range.offset() >= reached {
            return node.grow_to(range.end());
        }
        node.write_zeroes(range, false).await
    }

    /// Write out one stage of the sealed generation; returns the slots written.
    pub(crate) async fn write_out(&self, stage: Stage) -> Result<Vec<u32>, Errno> {
        let parts = self.overlay().write_out(stage);
        let mut slots: Vec<u32> = parts.iter().map(|p| p.slot).collect();
        slots.dedup();
        let writes = parts.into_iter().map(|part| async move {
            let node = self.node(part.slot)?;
            let buf = Buf::from_slice(&part.data);
            node.write_mem(part.offset, buf.io(), false).await
        });
        for result in futures_util::future::join_all(writes).await {
            result?;
        }
        Ok(slots)
    }
}

impl FormatFiles for ImageFiles {
    fn size(&self, slot: u32) -> Result<u64, Errno> {
        self.slot(slot)?;
        Ok(self.reach(slot))
    }

    fn try_read(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Option<Result<(), Errno>> {
        let node = match self.node(slot) {
            Ok(node) => node,
            Err(e) => return Some(Err(e)),
        };
        ByteRange::new(offset, buf.len() as u64)?;
        if let Err(e) = node.try_read(offset, buf)? {
            return Some(Err(e));
        }
        self.overlay().patch(slot, offset, buf);
        Some(Ok(()))
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
            let buf = Buf::zeroed(len);
            node.read_mem(offset, buf.io()).await?;
            let mut bytes = buf.as_slice().to_vec();
            self.overlay().patch(slot, offset, &mut bytes);
            Ok(bytes)
        })
    }

    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>, Errno> {
        self.node(slot)?.next_data(offset)
    }

    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool) {
        (self.events)(ImageEvent::Corrupted {
            node_name: self.node_name.clone(),
            message: message.to_owned(),
            offset,
            size,
            fatal,
        });
    }

    fn node_name(&self) -> &str {
        &self.node_name
    }
}
