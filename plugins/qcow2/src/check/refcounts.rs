//! Counting the refcount table and its blocks, and looking up what is stored in
//! them.

use outport_sdk::{Files, Result};

use super::counts::Kind;
use super::{Check, Phase};
use crate::refcount;

/// Bits 0 to 8 of a refcount table entry.
const RESERVED: u64 = 0x1ff;

impl Check {
    pub(super) fn entries_per_block(&self) -> u64 {
        refcount::entries_in(self.header.cluster_size(), self.header.refcount_order)
    }

    fn table_len(&self) -> u64 {
        u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits
    }

    /// Entries of the refcount table.
    pub(super) fn blocks(&self) -> u64 {
        self.table_len() / 8
    }

    /// Count the blocks from table entry `index` on, as many as a step takes.
    pub(super) fn count_refcounts(&mut self, files: &dyn Files, index: u64) -> Result<Phase> {
        let table = self.header.refcount_table_offset;
        if index == 0 {
            self.count(table, self.table_len(), Kind::Other);
        }
        let chunk = self.read_words(files, table, index, self.blocks())?;
        for (raw, index) in chunk.iter().copied().zip(index..) {
            if raw != 0 {
                self.count_block(index, raw);
            }
        }
        let next = index.saturating_add(chunk.len() as u64);
        if next < self.blocks() {
            return Ok(Phase::Refcounts { index: next });
        }
        Ok(Phase::Compare {
            index: self.counts.first() / self.entries_per_block(),
        })
    }

    fn count_block(&mut self, index: u64, raw: u64) {
        let offset = raw & !RESERVED;
        if raw & RESERVED != 0 {
            self.table_fault(|| {
                format!("ERROR refcount table entry {index} has reserved bits set")
            });
            return;
        }
        if offset & (self.header.cluster_size() - 1) != 0 {
            self.table_fault(|| {
                format!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                     corrupted"
                )
            });
            return;
        }
        let cluster = offset >> self.header.cluster_bits;
        if cluster >= self.clusters {
            self.table_fault(|| format!("ERROR refcount block {index} is outside image"));
            return;
        }
        self.count(offset, self.header.cluster_size(), Kind::Other);
        let count = self.counts.get(cluster);
        if count > 1 {
            self.fault_of_table(|| format!("ERROR refcount block {index} refcount={count}"));
        }
    }

    /// Damage of the table itself, found in the first window.
    fn table_fault(&mut self, message: impl FnOnce() -> String) {
        if self.first_pass() {
            self.fault_of_table(message);
        }
    }

    /// Only a rebuild mends this.
    fn fault_of_table(&mut self, message: impl FnOnce() -> String) {
        self.corruption(u64::from(self.fix.errors), message);
        self.plan.wanted |= self.fix.errors;
    }

    /// Where block `index` lies, if its entry can be used.
    pub(super) fn block_offset(&mut self, files: &dyn Files, index: u64) -> Result<Option<u64>> {
        if index >= self.blocks() {
            return Ok(None);
        }
        let at = self
            .header
            .refcount_table_offset
            .saturating_add(index.saturating_mul(8));
        let raw = self.pages.read_u64(files, at)?;
        let offset = raw & !RESERVED;
        let aligned = offset & (self.header.cluster_size() - 1) == 0;
        let inside = offset >> self.header.cluster_bits < self.clusters;
        Ok((offset != 0 && aligned && inside).then_some(offset))
    }

    /// The stored refcount of a cluster; 0 where no block can be read.
    pub(super) fn stored(&mut self, files: &dyn Files, cluster: u64) -> Result<u64> {
        let per_block = self.entries_per_block();
        let Some(block) = self.block_offset(files, cluster / per_block)? else {
            return Ok(0);
        };
        let order = self.header.refcount_order;
        let bit = (cluster % per_block) << order;
        let (start, page) = self.pages.page(files, block.saturating_add(bit / 8))?;
        let page_bit = bit.saturating_sub((start.saturating_sub(block)) * 8);
        Ok(refcount::get(
            page,
            usize::try_from(page_bit >> order).unwrap_or(usize::MAX),
            order,
        ))
    }
}
