//! FLUSH: group-committed, in the host's order for every format.
//!
//! ```text
//!   plugin.flush -> seal overlay -> write prepare stage -> fdatasync
//!               -> write mapping stage -> fdatasync -> freed space may go
//! ```
//!
//! One flush runs at a time; whoever asks meanwhile shares the next one.
//! Invariant: when a flush returns, everything acknowledged before it was
//! called is durable.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;

use crate::Errno;
use crate::format::{SlotRange, Stage};

use super::overlay::DIRTY_MAX;
use super::{Image, ImageState, Plugin};

/// Freed ranges that wait; beyond it a writer settles them first.
const FREED_MAX: usize = 65536;

/// The flush in progress and those who wait for the next.
#[derive(Default)]
pub(super) struct Flusher {
    /// Held by the flush in progress.
    running: AsyncMutex<Limbo>,
    /// Number of the last flush that began.
    begun: AtomicU64,
    /// Number of the last flush that failed; 0: none.
    failed: AtomicU64,
    /// Freed ranges that were not reclaimed yet.
    waiting: AtomicUsize,
}

/// Freed space between "unmapped durably" and "nobody can be using it".
#[derive(Default)]
struct Limbo {
    /// Waiting for the grace period in progress.
    ranges: Vec<SlotRange>,
    grace: Option<usize>,
    /// Waiting for the next one.
    next: Vec<SlotRange>,
}

impl Image {
    /// Everything acknowledged so far becomes durable.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        if !self.writable {
            return Ok(());
        }
        let ticket = self.flusher.begun.load(Ordering::Acquire);
        let mut limbo = self.flusher.running.lock().await;
        // A flush that began after we took the ticket covers us, and it has
        // ended, since we hold the lock.
        let begun = self.flusher.begun.load(Ordering::Acquire);
        if begun > ticket && self.flusher.failed.load(Ordering::Acquire) != begun {
            return Ok(());
        }
        let number = self.flusher.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let result = self.flush_round(&mut limbo).await;
        if result.is_err() {
            self.flusher.failed.store(number, Ordering::Release);
        }
        result
    }

    async fn flush_round(&self, limbo: &mut Limbo) -> Result<(), Errno> {
        let (freed, truncated) = {
            let mut plugin = self.plugin.lock().await;
            if self.reclaim_if_over(&mut plugin, limbo).await? || !self.overlay_is_idle(&plugin) {
                self.plugin_flush(&mut plugin).await?;
            }
            self.files.overlay().seal();
            (
                std::mem::take(&mut plugin.freed),
                std::mem::take(&mut plugin.truncated),
            )
        };
        match self.write_sealed().await {
            Ok(()) => {}
            Err(e) => {
                self.files.overlay().unseal();
                let mut plugin = self.plugin.lock().await;
                plugin.freed.extend(freed);
                plugin.truncated.extend(truncated);
                return Err(e);
            }
        }
        for (slot, size) in truncated {
            self.files.node(slot)?.resize_storage(size)?;
        }
        limbo.next.extend(freed);
        if limbo.grace.is_none() && !limbo.next.is_empty() {
            limbo.ranges = std::mem::take(&mut limbo.next);
            limbo.grace = Some(self.gate.begin_grace());
        }
        let waiting = limbo.ranges.len() + limbo.next.len();
        self.flusher.waiting.store(waiting, Ordering::Release);
        Ok(())
    }

    fn overlay_is_idle(&self, plugin: &Plugin) -> bool {
        plugin.freed.is_empty() && self.files.overlay().is_clean()
    }

    async fn plugin_flush(&self, plugin: &mut Plugin) -> Result<(), Errno> {
        if self.state() != ImageState::Healthy || plugin.instance.is_none() {
            return Ok(());
        }
        let call = self
            .call(plugin, |f| f.flush())
            .await
            .map_err(|e| e.errno())?;
        self.apply(plugin, call).await.map_err(|e| e.errno())
    }

    /// Payload and prepare stage, then the mapping stage.
    async fn write_sealed(&self) -> Result<(), Errno> {
        let nodes = self.files.nodes();
        self.files.write_out(Stage::Prepare).await?;
        for node in &nodes {
            node.flush().await?;
        }
        let mut written = self.files.write_out(Stage::Mapping).await?;
        written.sort_unstable();
        written.dedup();
        for slot in written {
            self.files.node(slot)?.flush().await?;
        }
        self.files.overlay().retire();
        Ok(())
    }

    /// Freed space that nobody can be using goes back to the plugin.
    async fn reclaim_if_over(&self, plugin: &mut Plugin, limbo: &mut Limbo) -> Result<bool, Errno> {
        let Some(token) = limbo.grace else {
            return Ok(false);
        };
        if !self.gate.grace_over(token) {
            return Ok(false);
        }
        let ranges = std::mem::take(&mut limbo.ranges);
        limbo.grace = None;
        self.decoded.clear();
        for freed in &ranges {
            self.files.overlay().forget(freed.slot, freed.range);
            if let Some(verifier) = &mut plugin.verifier {
                verifier.released(freed.slot, freed.range);
            }
            // `discard=unmap` on the file decides whether this does anything.
            self.files.node(freed.slot)?.discard(freed.range).await?;
        }
        let call = self.call(plugin, |f| f.reclaim(ranges.clone())).await;
        let call = call.map_err(|e| e.errno())?;
        self.apply(plugin, call).await.map_err(|e| e.errno())?;
        Ok(true)
    }

    /// Flush until no freed space is left to reclaim.
    pub(super) async fn settle(&self) -> Result<(), Errno> {
        loop {
            self.flush().await?;
            let idle = {
                let plugin = self.plugin.lock().await;
                plugin.freed.is_empty() && self.files.overlay().is_clean()
            };
            if idle && self.flusher.waiting.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            if self.flusher.waiting.load(Ordering::Acquire) > 0 {
                // Someone is still inside who came before the space was freed.
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
    }

    /// Is there freed space that a flush may give back?
    pub(super) async fn has_freed(&self) -> bool {
        self.flusher.waiting.load(Ordering::Acquire) > 0
            || !self.plugin.lock().await.freed.is_empty()
    }

    /// Writers call this first: memory held for metadata stays bounded.
    pub(super) async fn make_room(&self) -> Result<(), Errno> {
        let full = self.files.overlay().active_bytes() > DIRTY_MAX
            || self.flusher.waiting.load(Ordering::Relaxed) > FREED_MAX;
        if full { self.flush().await } else { Ok(()) }
    }

    /// The last write-out of a close: no plugin is asked any more.
    pub(super) async fn write_back(&self) -> Result<(), Errno> {
        let _limbo = self.flusher.running.lock().await;
        self.files.overlay().seal();
        let result = self.write_sealed().await;
        if result.is_err() {
            self.files.overlay().unseal();
        }
        result
    }
}
