//! Writing the reference counts anew, when the old table or its blocks cannot
//! be mended in place.
//!
//! The new table and blocks follow the end of the file, where nothing is; the
//! references are counted again without the old ones, window by window, and the
//! header changes last. Until then the image is what it was.

use outport_sdk::{Errno, Error, Result, Stage, Txn};

use super::{Check, Phase, Round};
use crate::header::{REFCOUNT_TABLE_BYTES_MAX, field};
use crate::pages::IMAGE;
use crate::refcount;

/// Words of table handed over at a time.
const TABLE_CHUNK_WORDS: usize = 128 << 10;

/// What will be written.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// A rebuild was asked for.
    pub(super) wanted: bool,
    /// One bit for each block that counts anything.
    needed: Vec<u64>,
    /// First cluster of the new table; the blocks follow it.
    base: u64,
    table_clusters: u64,
    block_clusters: u64,
    /// Blocks written so far.
    written: u64,
}

impl Plan {
    /// Block `index` is needed.
    pub(super) fn want_block(&mut self, index: u64) {
        // Beyond what a table may hold nothing is remembered; `place` refuses.
        if index >= REFCOUNT_TABLE_BYTES_MAX {
            return;
        }
        let word = usize::try_from(index / 64).unwrap_or(0);
        if word >= self.needed.len() {
            self.needed.resize(word + 1, 0);
        }
        if let Some(bits) = self.needed.get_mut(word) {
            *bits |= 1 << (index % 64);
        }
    }

    fn needs(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64)
            .ok()
            .and_then(|word| self.needed.get(word));
        word.is_some_and(|bits| bits >> (index % 64) & 1 != 0)
    }

    fn end(&self) -> u64 {
        self.base
            .saturating_add(self.table_clusters)
            .saturating_add(self.block_clusters)
    }

    /// The table, up to its last block.
    fn blocks(&self) -> u64 {
        let words = self
            .needed
            .iter()
            .rposition(|bits| *bits != 0)
            .map_or(0, |word| word + 1);
        words as u64 * 64
    }

    /// Find the size of everything, new clusters included: the least fixed point.
    fn place(&mut self, base: u64, per_block: u64, cluster_size: u64) -> Result<()> {
        self.base = base;
        loop {
            let before = self.end();
            self.block_clusters = self
                .needed
                .iter()
                .map(|bits| u64::from(bits.count_ones()))
                .sum();
            self.table_clusters = self.blocks().saturating_mul(8).div_ceil(cluster_size);
            if self.table_clusters.saturating_mul(cluster_size) > REFCOUNT_TABLE_BYTES_MAX {
                return Err(Error::new(
                    Errno::Efbig,
                    "The image is too large for a refcount table of 8 MiB: it cannot be rebuilt",
                ));
            }
            if self.end() == before {
                return Ok(());
            }
            let blocks = base / per_block..=self.end().saturating_sub(1) / per_block;
            blocks.for_each(|index| self.want_block(index));
        }
    }
}

impl Check {
    /// Everything is known; count again for the new blocks.
    pub(super) fn start_rebuild(&mut self) -> Phase {
        self.say(|| "Rebuilding refcount structure".to_owned());
        self.round = Round::Rebuild;
        self.mixed.clear();
        self.shared_tables.clear();
        self.start_window(0)
    }

    /// Write block `index`, if it is needed and this window counts for it.
    pub(super) fn write_block(&mut self, txn: &mut dyn Txn, index: u64) -> Result<Phase> {
        let per_block = self.entries_per_block();
        if self.plan.base == 0 {
            // A compressed cluster may reach one cluster past the end of the file.
            let base = self.clusters.saturating_add(1);
            self.plan
                .place(base, per_block, self.header.cluster_size())?;
            txn.grow(IMAGE, self.offset_of(self.plan.end())?)?;
        }
        let first = index.saturating_mul(per_block);
        if first >= self.counts.end() {
            if let Some(next) = self.next_window() {
                return Ok(next);
            }
            if first >= self.plan.end() {
                return Ok(Phase::Table);
            }
        }
        if self.plan.needs(index) {
            let cluster_size = usize::try_from(self.header.cluster_size()).unwrap_or(0);
            let mut block = vec![0; cluster_size];
            for (cluster, at) in (first..first.saturating_add(per_block)).zip(0_usize..) {
                let count = match cluster {
                    new if new >= self.plan.base => u64::from(new < self.plan.end()),
                    old => self.counts.get(old),
                };
                if count > 0 {
                    self.inspect(cluster, true);
                    refcount::set(&mut block, at, self.header.refcount_order, count);
                }
            }
            let at = self.plan.base + self.plan.table_clusters + self.plan.written;
            txn.write(IMAGE, Stage::Prepare, self.offset_of(at)?, &block)?;
            self.plan.written += 1;
            self.examined += self.header.cluster_size();
            self.wrote = true;
        }
        Ok(Phase::Blocks {
            index: index.saturating_add(1),
        })
    }

    /// Write the table, and point the header at it.
    pub(super) fn write_table(&mut self, txn: &mut dyn Txn) -> Result<Phase> {
        let mut block = self.plan.base + self.plan.table_clusters;
        let table = self.offset_of(self.plan.base)?;
        let words = self.plan.table_clusters * self.header.cluster_size() / 8;
        let mut at = table;
        let mut chunk = Vec::new();
        for index in 0..words {
            let entry = if self.plan.needs(index) {
                self.offset_of(block)?
            } else {
                0
            };
            block += u64::from(entry != 0);
            chunk.extend_from_slice(&entry.to_be_bytes());
            if chunk.len() == TABLE_CHUNK_WORDS * 8 || index + 1 == words {
                txn.write(IMAGE, Stage::Prepare, at, &chunk)?;
                at = at.saturating_add(chunk.len() as u64);
                chunk.clear();
            }
        }
        let clusters = u32::try_from(self.plan.table_clusters)
            .map_err(|_| Error::new(Errno::Efbig, "The new refcount table is too large"))?;
        let mut fields = table.to_be_bytes().to_vec();
        fields.extend_from_slice(&clusters.to_be_bytes());
        txn.write(IMAGE, Stage::Mapping, field::REFCOUNT_TABLE, &fields)?;
        self.wrote = true;
        self.header.refcount_table_offset = table;
        self.header.refcount_table_clusters = clusters;
        self.report.image_end = self.offset_of(self.plan.end())?;
        self.clusters = self.plan.end();
        // `file_len` stays: entries are judged by the file as it was.
        Ok(self.start_flags())
    }

    fn offset_of(&self, cluster: u64) -> Result<u64> {
        cluster
            .checked_mul(self.header.cluster_size())
            .filter(|offset| i64::try_from(*offset).is_ok())
            .ok_or_else(|| Error::new(Errno::Efbig, "The image is too large to be rebuilt"))
    }
}
