//! FLUSH: group-committed, in the host's order for every format.
//!
//! ```text
//!   plugin.flush -> seal overlay -> write prepare stage -> fdatasync
//!               -> write mapping stage -> fdatasync -> cut files
//!               -> grace period -> punch -> plugin.reclaim: freed space is free
//! ```
//!
//! One flush runs at a time; whoever asks meanwhile shares the next one. A
//! generation whose flush failed stays sealed and is written again first.
//! Invariant: when a flush returns, everything acknowledged before it was
//! called is durable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;

use crate::format::{FormatFiles, SlotRange, Stage};
use crate::tickets::Tickets;
use crate::{ByteRange, Errno};

use super::ask::Tries;
use super::overlay::DIRTY_MAX;
use super::verify::Claims;
use super::{Image, ImageState};

/// Freed ranges that wait; beyond it a writer settles them first.
const FREED_MAX: u64 = 65536;

/// How often somebody who waits for a grace period looks.
const GRACE_POLL: Duration = Duration::from_micros(200);

/// The flush in progress and those who wait for the next.
#[derive(Default)]
pub(super) struct Flusher {
    /// Held by the flush in progress.
    running: AsyncMutex<Limbo>,
    /// One that fails or panics covers nobody who waits for it.
    tickets: Tickets,
    /// Transactions that were queued, and how many of them are durable.
    changes: AtomicU64,
    durable: AtomicU64,
    /// Ranges that were freed, and how many of them the plugin has back.
    freed: AtomicU64,
    returned: AtomicU64,
}

/// What a flush leaves for the next one.
#[derive(Default)]
struct Limbo {
    /// The sealed generation is not durable yet: its number of changes, and
    /// what it freed.
    sealed: Option<(u64, Vec<SlotRange>)>,
    /// Unmapped durably; waits for the grace period in progress.
    ranges: Vec<SlotRange>,
    grace: Option<usize>,
    /// Waiting for the next one.
    next: Vec<SlotRange>,
}

impl Flusher {
    /// A transaction was queued. Plugin lock.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// A range was freed. Plugin lock.
    pub(super) fn freed(&self) {
        self.freed.fetch_add(1, Ordering::AcqRel);
    }

    /// Nothing that a plugin queued is waiting to become durable.
    pub(super) fn is_settled(&self) -> bool {
        self.durable.load(Ordering::Acquire) == self.changes.load(Ordering::Acquire)
    }

    /// Keeps every flush waiting, as a flush in progress does.
    #[cfg(test)]
    pub(super) async fn hold(&self) -> impl Sized + '_ {
        self.running.lock().await
    }

    fn waiting(&self) -> u64 {
        let returned = self.returned.load(Ordering::Acquire);
        self.freed.load(Ordering::Acquire).saturating_sub(returned)
    }
}

impl Image {
    /// Everything acknowledged so far becomes durable.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        if !self.is_writable() {
            return Ok(());
        }
        let tickets = &self.flusher.tickets;
        let ticket = tickets.take();
        let mut limbo = self.flusher.running.lock().await;
        if tickets.covers(&ticket) {
            return Ok(());
        }
        let round = tickets.begin();
        self.flush_round(&mut limbo).await?;
        tickets.ended_well(&round);
        Ok(())
    }

    async fn flush_round(&self, limbo: &mut Limbo) -> Result<(), Errno> {
        if limbo.sealed.is_some() {
            self.write_sealed(limbo).await?;
        }
        self.reclaim_if_over(limbo).await;
        let mut asked = Ok(());
        if !self.flusher.is_settled() {
            asked = self.plugin_flush().await;
        }
        // What is queued has its room, whatever the plugin still wanted.
        self.seal(limbo).await;
        self.write_sealed(limbo).await?;
        asked?;
        // Often nobody was inside, and the space is free at once.
        self.reclaim_if_over(limbo).await;
        Ok(())
    }

    async fn plugin_flush(&self) -> Result<(), Errno> {
        let mut plugin = self.plugin.lock().await;
        if self.state() != ImageState::Healthy || plugin.instance.is_none() {
            return Ok(());
        }
        let flush = self.ask(
            &mut plugin,
            Tries::Twice,
            |f| f.flush(),
            |_, (), _| Ok(Claims::default()),
        );
        flush.await.map_err(|e| e.errno())
    }

    async fn seal(&self, limbo: &mut Limbo) {
        let mut plugin = self.plugin.lock().await;
        self.files.overlay().seal();
        for cut in &mut plugin.cuts {
            cut.sealed = true;
        }
        let changes = self.flusher.changes.load(Ordering::Acquire);
        limbo.sealed = Some((changes, std::mem::take(&mut plugin.freed)));
    }

    /// Payload and prepare stage, then the mapping stage, then what waited for
    /// it.
    async fn write_sealed(&self, limbo: &mut Limbo) -> Result<(), Errno> {
        self.files.write_out(Stage::Prepare).await?;
        let nodes: Vec<_> = self.files.nodes().collect();
        let flushes = nodes.iter().map(|node| node.flush_as_child());
        for result in futures_util::future::join_all(flushes).await {
            result?;
        }
        let mut written = self.files.write_out(Stage::Mapping).await?;
        written.sort_unstable();
        written.dedup();
        for slot in written {
            self.files.node(slot)?.flush_as_child().await?;
        }
        self.files.overlay().retire();
        if let Some((changes, freed)) = limbo.sealed.take() {
            self.flusher.durable.store(changes, Ordering::Release);
            limbo.next.extend(freed);
        }
        self.cut_files().await;
        self.begin_grace(limbo);
        Ok(())
    }

    /// Placements are handed out under the plugin lock, so nothing comes to lie
    /// beyond the new end while it is held.
    async fn cut_files(&self) {
        let mut plugin = self.plugin.lock().await;
        let cuts: Vec<_> = plugin.cuts.extract_if(.., |c| c.sealed).collect();
        for cut in cuts {
            if let Err(e) = self.files.cut(cut.slot, cut.len).await {
                // A longer file than need be is no damage.
                tracing::warn!(node = self.files.node_name(), reason = %e, "a file was not cut");
            }
        }
    }

    fn begin_grace(&self, limbo: &mut Limbo) {
        if limbo.grace.is_none() && !limbo.next.is_empty() {
            limbo.ranges = std::mem::take(&mut limbo.next);
            limbo.grace = Some(self.gate.begin_grace());
        }
    }

    /// Freed space that nobody can be using goes back to the plugin.
    async fn reclaim_if_over(&self, limbo: &mut Limbo) {
        let Some(token) = limbo.grace else { return };
        if !self.gate.grace_over(token) {
            return;
        }
        let ranges = std::mem::take(&mut limbo.ranges);
        limbo.grace = None;
        self.begin_grace(limbo);
        // Not the plugin's again yet, so nobody needs the lock for this.
        self.decoded.clear();
        self.punch(&ranges).await;
        let count = ranges.len() as u64;
        if let Err(e) = self.give_back(ranges).await {
            tracing::warn!(
                node = self.files.node_name(),
                ranges = count,
                reason = e,
                "freed space was not given back and is leaked"
            );
        }
        self.flusher.returned.fetch_add(count, Ordering::AcqRel);
    }

    /// `discard=unmap` on the file decides whether this does anything.
    async fn punch(&self, ranges: &[SlotRange]) {
        for freed in joined(ranges) {
            let Ok(node) = self.files.node(freed.slot) else {
                continue;
            };
            self.files.room_known().forget(freed.slot, freed.range);
            if let Err(e) = node.discard(freed.range).await {
                // A hint: the space is free in the image all the same.
                tracing::debug!(node = node.name(), reason = %e, "a discard was refused");
            }
        }
    }

    async fn give_back(&self, ranges: Vec<SlotRange>) -> Result<(), String> {
        let mut plugin = self.plugin.lock().await;
        for freed in &ranges {
            self.files.overlay().forget(freed.slot, freed.range);
            plugin.verifier.released(*freed);
        }
        if self.state() != ImageState::Healthy {
            return Err("the node refuses writes".to_owned());
        }
        let reclaim = self.ask(
            &mut plugin,
            Tries::Twice,
            |f| f.reclaim(ranges.clone()),
            |_, (), _| Ok(Claims::default()),
        );
        reclaim.await.map_err(|e| e.to_string())
    }

    /// Flush until what is freed now can be used again.
    pub(super) async fn settle(&self) -> Result<(), Errno> {
        let target = self.flusher.freed.load(Ordering::Acquire);
        loop {
            self.flush().await?;
            if self.flusher.returned.load(Ordering::Acquire) >= target {
                return Ok(());
            }
            self.grace_over().await;
        }
    }

    /// Wait until everyone left who came before the grace period in progress.
    async fn grace_over(&self) {
        loop {
            {
                let limbo = self.flusher.running.lock().await;
                if limbo.grace.is_none_or(|token| self.gate.grace_over(token)) {
                    return;
                }
            }
            tokio::time::sleep(GRACE_POLL).await;
        }
    }

    /// What was freed and not given back is nobody's business any more: the image was put away.
    pub(super) async fn forget_freed(&self) {
        let mut limbo = self.flusher.running.lock().await;
        limbo.ranges.clear();
        limbo.next.clear();
        limbo.grace = None;
        let freed = self.flusher.freed.load(Ordering::Acquire);
        self.flusher.returned.store(freed, Ordering::Release);
    }

    /// Is there freed space that a flush may give back?
    pub(super) fn has_freed(&self) -> bool {
        self.flusher.waiting() > 0
    }

    /// Writers call this first: memory held for metadata stays bounded.
    pub(super) async fn make_room(&self) -> Result<(), Errno> {
        let full =
            self.files.overlay().active_bytes() > DIRTY_MAX || self.flusher.waiting() > FREED_MAX;
        if full { self.flush().await } else { Ok(()) }
    }

    /// Write everything back without asking the plugin.
    pub(super) async fn write_back(&self) -> Result<(), Errno> {
        let mut limbo = self.flusher.running.lock().await;
        if limbo.sealed.is_some() {
            self.write_sealed(&mut limbo).await?;
        }
        self.seal(&mut limbo).await;
        self.write_sealed(&mut limbo).await
    }
}

/// Neighbours joined: one punch for many clusters.
fn joined(ranges: &[SlotRange]) -> Vec<SlotRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|r| (r.slot, r.range.offset()));
    let mut out: Vec<SlotRange> = Vec::new();
    for next in sorted {
        match out.last_mut() {
            Some(last) if last.slot == next.slot && last.range.end() >= next.range.offset() => {
                let end = last.range.end().max(next.range.end());
                last.range = ByteRange::between(last.range.offset(), end);
            }
            _ => out.push(next),
        }
    }
    out
}
