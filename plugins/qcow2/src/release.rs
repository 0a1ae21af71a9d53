//! References that end.
//!
//! A cluster that loses its last reference is freed in the transaction; its
//! refcount goes down when the host gives it back ([`Qcow2::reclaim_ranges`]).
//! One that others still refer to must not be freed, and still its count may go
//! down only when the mapping is durable. Such counts wait for a *ticket*: a
//! cluster freed by the same call, whose return says just that. If the call
//! frees none, it takes one cluster and frees it at once.

use std::collections::BTreeMap;

use outport_sdk::{ByteRange, Errno, Error, LogLevel, Result, SlotRange, Stage, Txn};

use crate::header::incompatible;
use crate::image::Qcow2;
use crate::pages::IMAGE;

/// What to do when a freed cluster comes back.
#[derive(Debug, Default)]
struct Ticket {
    /// Cluster, and how many references of it ended.
    ended: Vec<(u64, u64)>,
    /// New refcount blocks are durable too.
    growth: bool,
}

/// Disjoint runs of clusters: first to count.
#[derive(Debug, Default)]
struct Runs(BTreeMap<u64, u64>);

impl Runs {
    fn insert(&mut self, first: u64, count: u64) {
        self.0.insert(first, count);
    }

    /// Take what is known of `first..first + count` out.
    fn remove(&mut self, first: u64, count: u64) -> Vec<(u64, u64)> {
        let end = first + count;
        let touched: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .rev()
            .map(|(&start, &n)| (start, n))
            .take_while(|run| run.0 + run.1 > first)
            .collect();
        let mut taken = Vec::with_capacity(touched.len());
        for (start, n) in touched {
            self.0.remove(&start);
            let (from, to) = (start.max(first), (start + n).min(end));
            if start < from {
                self.0.insert(start, from - start);
            }
            if to < start + n {
                self.0.insert(to, start + n - to);
            }
            taken.push((from, to - from));
        }
        taken
    }
}

#[derive(Debug, Default)]
pub(crate) struct Releases {
    /// Clusters that lost a reference in the running call.
    staged: Vec<u64>,
    staged_growth: bool,
    staged_ticket: Option<(u64, Ticket)>,
    staged_done: Vec<u64>,
    /// By the cluster whose return they wait for.
    tickets: BTreeMap<u64, Ticket>,
    /// References that ended, not yet in the refcounts.
    pending: BTreeMap<u64, u64>,
    /// Tickets with `growth`, and one that never comes back for those of an earlier instance.
    growing: usize,
    /// What this instance freed and has not got back.
    freed: Runs,
    /// The counts were rebuilt: what an earlier instance freed is not counted
    /// any more, and must not be counted down when it comes back.
    only_ours: bool,
}

impl Releases {
    /// A run of clusters loses one reference each.
    pub(crate) fn add(&mut self, first: u64, count: u64) {
        self.staged.extend(first..first + count);
    }

    /// The dirty bit stays until the mapping of this call is durable.
    pub(crate) const fn await_growth(&mut self) {
        self.staged_growth = true;
    }

    /// An earlier instance let the image grow, and its tickets went with it.
    pub(crate) const fn inherit_growth(&mut self) {
        self.growing += 1;
    }

    /// The call succeeded.
    pub(crate) fn keep(&mut self) {
        for cluster in std::mem::take(&mut self.staged_done) {
            let Some(ticket) = self.tickets.remove(&cluster) else {
                continue;
            };
            self.growing -= usize::from(ticket.growth);
            for (cluster, n) in ticket.ended {
                if let Some(left) = self.pending.get_mut(&cluster) {
                    *left = left.saturating_sub(n);
                    if *left == 0 {
                        self.pending.remove(&cluster);
                    }
                }
            }
        }
        if let Some((cluster, ticket)) = self.staged_ticket.take() {
            self.growing += usize::from(ticket.growth);
            for &(cluster, n) in &ticket.ended {
                *self.pending.entry(cluster).or_default() += n;
            }
            self.tickets.insert(cluster, ticket);
        }
        self.discard();
    }

    /// The call failed.
    pub(crate) fn discard(&mut self) {
        self.staged.clear();
        self.staged_growth = false;
        self.staged_ticket = None;
        self.staged_done.clear();
    }

    /// The counts were rebuilt: what comes back from before is counted already.
    pub(crate) fn after_repair(&mut self) {
        self.only_ours = true;
    }

    /// Freed space is under way: only what it still counts keeps it from reuse.
    pub(crate) fn are_under_way(&self) -> bool {
        !self.freed.0.is_empty()
    }

    fn pending(&self, cluster: u64) -> u64 {
        self.pending.get(&cluster).copied().unwrap_or(0)
    }
}

impl Qcow2 {
    /// The end of every call that changes something: free what lost its last
    /// reference, and let the rest wait.
    pub(crate) fn settle_releases(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let mut free: Vec<(u64, u64)> = Vec::new();
        let mut ended = Vec::new();
        loop {
            self.sort_releases(txn, &mut free, &mut ended)?;
            let waiting = !ended.is_empty() || self.releases.staged_growth;
            if !waiting || !free.is_empty() {
                break;
            }
            // This may move the refcount table, which frees the old one.
            free.push((self.allocate(txn, 1)?.0, 1));
        }
        if !ended.is_empty() || self.releases.staged_growth {
            let ticket = Ticket {
                ended,
                growth: self.releases.staged_growth,
            };
            self.releases.staged_ticket = free.first().map(|run| (run.0, ticket));
        }
        let bits = self.header.cluster_bits;
        for (first, count) in free {
            self.releases.freed.insert(first, count);
            txn.free(IMAGE, ByteRange::new(first << bits, count << bits))?;
        }
        Ok(())
    }

    /// Sort the references that ended into clusters to free and counts to lower.
    fn sort_releases(
        &mut self,
        txn: &mut dyn Txn,
        free: &mut Vec<(u64, u64)>,
        ended: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let mut staged = std::mem::take(&mut self.releases.staged);
        staged.sort_unstable();
        for group in staged.chunk_by(|a, b| a == b) {
            let (cluster, n) = (group[0], group.len() as u64);
            let left = self
                .refcount(txn.files(), cluster)?
                .saturating_sub(self.releases.pending(cluster));
            if left == 0 {
                let offset = cluster << self.header.cluster_bits;
                let message =
                    format!("Cluster at offset {offset:#x} is in use, but its refcount is 0");
                txn.corrupt(&message, Some(offset), Some(self.cluster_size()), false);
            } else if n < left {
                ended.push((cluster, n));
            } else {
                if left > 1 {
                    ended.push((cluster, left - 1));
                }
                match free.last_mut() {
                    Some(run) if run.0 + run.1 == cluster => run.1 += 1,
                    _ => free.push((cluster, 1)),
                }
                if self.alloc.tail >> self.header.cluster_bits == cluster {
                    self.alloc.tail = 0;
                }
            }
        }
        if self.releases.staged.is_empty() {
            staged.clear();
            self.releases.staged = staged;
        }
        Ok(())
    }

    /// Freed ranges came back: what the mapping on disk no longer shows loses
    /// its count.
    pub(crate) fn reclaim_ranges(&mut self, txn: &mut dyn Txn, freed: &[SlotRange]) -> Result<()> {
        let bits = self.header.cluster_bits;
        for range in freed.iter().filter(|r| r.slot == IMAGE).map(|r| r.range) {
            if !range.offset.is_multiple_of(self.cluster_size())
                || !range.len.is_multiple_of(self.cluster_size())
            {
                return Err(Error::new(
                    Errno::Einval,
                    "A reclaimed range is not made of clusters",
                ));
            }
            let (first, count) = (range.offset >> bits, range.len >> bits);
            let ours = self.releases.freed.remove(first, count);
            let back = if self.releases.only_ours {
                ours
            } else {
                vec![(first, count)]
            };
            for (first, count) in back {
                self.drop_counted(txn, first, count)?;
            }
            let done: Vec<u64> = self
                .releases
                .tickets
                .range(first..first + count)
                .map(|t| *t.0)
                .collect();
            for ticket in &done {
                let ended = self.releases.tickets.get(ticket).map(|t| t.ended.clone());
                for (cluster, n) in ended.unwrap_or_default() {
                    for _ in 0..n {
                        self.drop_counted(txn, cluster, 1)?;
                    }
                }
            }
            self.releases.staged_done.extend(done);
        }
        self.clear_dirty(txn)
    }

    /// [`Qcow2::drop_references`] for clusters that may have lost their count by
    /// other means (an older instance freed them, a check repaired them).
    fn drop_counted(&mut self, txn: &mut dyn Txn, first: u64, count: u64) -> Result<()> {
        let per_block = self.clusters_per_block();
        let (mut cluster, end) = (first, first + count);
        while cluster < end {
            let next = (cluster / per_block + 1).saturating_mul(per_block).min(end);
            if self.has_refcount_block(txn.files(), cluster)? {
                self.drop_references(txn.files(), cluster, next - cluster)?;
            } else {
                txn.log(LogLevel::Warn, "Reclaimed space has no refcount");
            }
            cluster = next;
        }
        Ok(())
    }

    /// The mapping of every growth is durable: the image is clean again.
    fn clear_dirty(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let done = &self.releases.staged_done;
        let growth_done = done
            .iter()
            .filter(|t| self.releases.tickets.get(t).is_some_and(|t| t.growth))
            .count();
        let dirty = self.header.incompatible & incompatible::DIRTY != 0;
        if dirty && growth_done == self.releases.growing && !self.releases.staged_growth {
            self.header.incompatible &= !incompatible::DIRTY;
            self.write_incompatible(txn, Stage::Prepare)?;
        }
        Ok(())
    }

    /// Everything is durable: the image may be marked clean.
    pub(crate) fn close_image(&mut self, txn: &mut dyn Txn) -> Result<()> {
        if self.header.incompatible & incompatible::DIRTY != 0 {
            self.header.incompatible &= !incompatible::DIRTY;
            self.write_incompatible(txn, Stage::Mapping)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_back_in_any_pieces() {
        let mut runs = Runs::default();
        runs.insert(10, 5);
        runs.insert(20, 5);
        assert_eq!(runs.remove(12, 1), [(12, 1)]);
        assert_eq!(runs.remove(0, 11), [(10, 1)]);
        assert_eq!(runs.remove(13, 10), [(20, 3), (13, 2)]);
        assert_eq!(runs.remove(12, 100), [(23, 2)]);
        assert_eq!(runs.remove(11, 1), [(11, 1)]);
        assert!(runs.0.is_empty());
    }
}
