//! Comparing counted references with stored refcounts, one refcount block a
//! step, and mending the stored ones in place.

use outport_sdk::{Result, Stage, Txn};

use super::{Check, Phase};
use crate::pages::IMAGE;
use crate::refcount;

/// Changed parts of a block are written in pieces of this size.
const PIECE_BYTES: usize = 4096;

/// Clusters that are remembered because they hold a table and something else;
/// an image with more is beyond mending.
const MIXED_MAX: usize = 1 << 20;

impl Check {
    pub(super) fn compare_block(&mut self, txn: &mut dyn Txn, index: u64) -> Result<Phase> {
        let per_block = self.entries_per_block();
        let first = index.saturating_mul(per_block);
        let end = self.counts.end().min(first.saturating_add(per_block));
        if first >= end {
            return Ok(self.compared());
        }
        let offset = self.block_offset(txn.files(), index)?;
        let mut block = match offset {
            Some(offset) => self.read_table(txn.files(), offset)?,
            None => Vec::new(),
        };
        let old = block.clone();
        let alone = |o: &u64| !self.counts.kinds(o >> self.header.cluster_bits).mixed();
        let writable = offset.filter(alone);
        for (cluster, at) in (first..end).zip(0_usize..) {
            let stored = refcount::get(&block, at, self.header.refcount_order);
            let counted = self.counts.get(cluster);
            if cluster >= self.clusters && counted == 0 {
                continue;
            }
            if counted > 0 {
                self.plan.want_block(index);
                self.inspect(cluster, stored == counted);
            }
            let stored = match self.compare(cluster, stored, counted, writable.is_some()) {
                true => {
                    refcount::set(&mut block, at, self.header.refcount_order, counted);
                    counted
                }
                false => stored,
            };
            if stored > 0 || counted > 0 {
                let end = cluster
                    .saturating_add(1)
                    .saturating_mul(self.header.cluster_size());
                self.report.image_end = self.report.image_end.max(end);
            }
        }
        if let Some(offset) = writable.filter(|_| !self.plan.wanted) {
            self.write_pieces(txn, Stage::Prepare, offset, &old, &block)?;
        }
        Ok(Phase::Compare {
            index: index.saturating_add(1),
        })
    }

    /// Report a cluster whose counts differ; whether its refcount is to be set.
    fn compare(&mut self, cluster: u64, stored: u64, counted: u64, has_block: bool) -> bool {
        if stored == counted {
            return false;
        }
        let (low, fix) = match stored < counted {
            true => (true, self.fix.errors),
            false => (false, self.fix.leaks && has_block || self.plan.wanted),
        };
        let prefix = match (fix, low) {
            (true, _) => "Repairing",
            (false, true) => "ERROR",
            (false, false) => "Leaked",
        };
        self.say(|| format!("{prefix} cluster {cluster} refcount={stored} reference={counted}"));
        if low {
            self.report.corruptions += 1;
            self.report.corruptions_fixed += u64::from(fix);
            // A count without a block needs a new one; and with several windows
            // nobody knows yet what else lies in the cluster of this block.
            self.plan.wanted |= fix && (!has_block || self.clusters >= self.window);
        } else {
            self.report.leaks += 1;
            self.report.leaks_fixed += u64::from(fix);
        }
        fix
    }

    /// A cluster that metadata shares with something else is damage even if its
    /// refcount says two; only moving data could mend it.
    pub(super) fn inspect(&mut self, cluster: u64, consistent: bool) {
        let kinds = self.counts.kinds(cluster);
        if !kinds.mixed() || self.mixed.len().max(self.shared_tables.len()) >= MIXED_MAX {
            return;
        }
        if kinds.shared_table() {
            self.shared_tables.push(cluster);
        }
        // A repair says so at its end: a rebuild may take the table away.
        if consistent || self.fix.errors {
            self.mixed.push(cluster);
        }
    }

    /// The counts are as they will be: say what is left of mixed clusters.
    pub(super) fn start_flags(&mut self) -> Phase {
        for cluster in std::mem::take(&mut self.mixed) {
            self.corruption(0, || {
                format!("ERROR cluster {cluster} holds a table and something else as well")
            });
        }
        self.pages.clear();
        Phase::Flags { table: 0, index: 0 }
    }

    /// This L2 table has its cluster for itself, so that writing to it changes
    /// nothing else.
    pub(super) fn own_table(&self, offset: u64) -> bool {
        let cluster = offset >> self.header.cluster_bits;
        self.shared_tables.len() < MIXED_MAX && self.shared_tables.binary_search(&cluster).is_err()
    }

    fn compared(&mut self) -> Phase {
        if let Some(next) = self.next_window() {
            return next;
        }
        if self.plan.wanted {
            return self.start_rebuild();
        }
        self.start_flags()
    }

    /// Queue the pieces in which `new` differs from `old`.
    pub(super) fn write_pieces(
        &mut self,
        txn: &mut dyn Txn,
        stage: Stage,
        offset: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<()> {
        let pieces = old.chunks(PIECE_BYTES).zip(new.chunks(PIECE_BYTES));
        let mut at = offset;
        for (old, new) in pieces {
            if old != new {
                txn.write(IMAGE, stage, at, new)?;
                self.wrote = true;
            }
            at = at.saturating_add(PIECE_BYTES as u64);
        }
        Ok(())
    }
}
