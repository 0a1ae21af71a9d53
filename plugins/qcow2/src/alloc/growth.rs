//! More refcount blocks, and a longer table of them.

use outport_sdk::{ByteRange, Errno, Error, Result, Stage, Txn};

use super::Found;
use crate::header::{REFCOUNT_TABLE_BYTES_MAX, field, incompatible};
use crate::image::Qcow2;
use crate::pages::IMAGE;

impl Qcow2 {
    /// Give the clusters with this block index a refcount block: the first of
    /// them.
    pub(super) fn add_block(&mut self, txn: &mut dyn Txn, index: u64) -> Result<()> {
        if index >= self.refcount_table_entries() {
            return self.grow_table(txn, index);
        }
        self.add_blocks(txn, index, 1, 0)
    }

    /// Give `blocks` block indices from `index` on refcount blocks, in a row at
    /// the start of the space that they count, and take `further` clusters
    /// behind them.
    fn add_blocks(
        &mut self,
        txn: &mut dyn Txn,
        index: u64,
        blocks: u64,
        further: u64,
    ) -> Result<()> {
        let bits = self.header.cluster_bits;
        let first = index * self.clusters_per_block();
        self.check_fresh(txn.files(), first, blocks + further)?;
        let range = ByteRange::new(first << bits, blocks << bits);
        self.pages.zero_fresh(txn, Stage::Prepare, range)?;
        let stage = self.mark_growing(txn)?;
        for i in 0..blocks {
            let at = self.header.refcount_table_offset + (index + i) * 8;
            let offset = (first + i) << bits;
            self.pages.write_u64(txn.files(), stage, at, offset)?;
            self.regions.add_table(offset);
        }
        self.change_refcounts(txn.files(), first, blocks + further, |_, _| 1)
    }

    /// Take exactly `count` clusters in a row: of those that were given back, or behind the
    /// frontier.
    pub(crate) fn allocate_row(&mut self, txn: &mut dyn Txn, count: u64) -> Result<u64> {
        if let Some((first, _)) = self.alloc.take_recycled(count) {
            self.take(txn, first, count)?;
            return Ok(first);
        }
        let per_block = self.clusters_per_block();
        let mut from = self.alloc.frontier;
        loop {
            match self.look(txn.files(), from, count)? {
                Found::Run { first, count: n } if n >= count => {
                    if first == self.alloc.frontier {
                        self.alloc.frontier = first + count;
                    }
                    self.take(txn, first, count)?;
                    return Ok(first);
                }
                Found::Run { first, count: n } => from = first + n,
                Found::NoBlock { index, .. } => {
                    // Behind everything that is counted: blocks, then the row.
                    let mut blocks = 1;
                    while (blocks + count).div_ceil(per_block) > blocks {
                        blocks = (blocks + count).div_ceil(per_block);
                    }
                    let last = index + blocks - 1;
                    if last >= self.refcount_table_entries() {
                        let end = self.refcount_table_entries().max(index);
                        self.grow_table_for(txn, end, last + 1)?;
                        continue;
                    }
                    let mut free = true;
                    for i in index..=last {
                        free &= self.refcount_block(txn.files(), i)?.is_none();
                    }
                    if !free {
                        self.add_block(txn, index)?;
                        continue;
                    }
                    self.add_blocks(txn, index, blocks, count)?;
                    return Ok(index * per_block + blocks);
                }
            }
        }
    }

    /// Move the refcount table to where there is room for `index`: behind the
    /// space that it covers now, after blocks that count it and themselves.
    fn grow_table(&mut self, txn: &mut dyn Txn, index: u64) -> Result<()> {
        self.grow_table_for(txn, index, index + 1)
    }

    /// The same, with room for at least `entries` entries.
    fn grow_table_for(&mut self, txn: &mut dyn Txn, index: u64, entries: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let cluster_size = self.cluster_size();
        let per_block = self.clusters_per_block();
        let first = index * per_block;
        let (blocks, table) = self.table_layout(index, entries)?;
        self.check_fresh(txn.files(), first, blocks + table)?;
        let blocks_at = first << bits;
        let table_at = (first + blocks) << bits;

        self.pages.emit(txn)?;
        let old_at = self.header.refcount_table_offset;
        let old_clusters = u64::from(self.header.refcount_table_clusters);
        let mut content = vec![0; (table << bits) as usize];
        for (i, chunk) in content[..(old_clusters << bits) as usize]
            .chunks_mut(1 << 20)
            .enumerate()
        {
            txn.read_into(IMAGE, old_at + ((i as u64) << 20), chunk)?;
        }
        for block in 0..blocks {
            let entry = ((index + block) * 8) as usize;
            let offset = blocks_at + (block << bits);
            content[entry..entry + 8].copy_from_slice(&offset.to_be_bytes());
            self.regions.add_table(offset);
        }
        self.pages.zero_fresh(
            txn,
            Stage::Prepare,
            ByteRange::new(blocks_at, blocks << bits),
        )?;
        self.pages
            .write_fresh(txn, Stage::Prepare, table_at, &content)?;

        self.mark_growing(txn)?;
        let mut pointer = table_at.to_be_bytes().to_vec();
        pointer.extend((table as u32).to_be_bytes());
        txn.write(IMAGE, Stage::Mapping, field::REFCOUNT_TABLE, &pointer)?;
        self.header.refcount_table_offset = table_at;
        self.header.refcount_table_clusters = table as u32;
        self.alloc.block = None;
        self.regions
            .move_fixed(old_at, table_at, table * cluster_size, "refcount table");
        self.change_refcounts(txn.files(), first, blocks + table, |_, _| 1)?;
        self.releases.add(old_at >> bits, old_clusters);
        Ok(())
    }

    /// Refcount blocks and table clusters for a table that has entry `index`,
    /// both placed where block `index` begins.
    fn table_layout(&self, index: u64, entries: u64) -> Result<(u64, u64)> {
        let per_block = self.clusters_per_block();
        let entry_bytes = 8;
        let entries_max = REFCOUNT_TABLE_BYTES_MAX / entry_bytes;
        // Half as much again, so that growing stays rare.
        let wanted = (self.refcount_table_entries() * 3 / 2)
            .min(entries_max)
            .max(entries);
        let (mut blocks, mut table) = (1, 1);
        loop {
            let entries = wanted.max(index + blocks);
            let clusters = (entries * entry_bytes).div_ceil(self.cluster_size());
            let needed = (blocks + clusters).div_ceil(per_block);
            if needed == blocks && clusters == table {
                break;
            }
            (blocks, table) = (needed.max(blocks), clusters);
        }
        if table << self.header.cluster_bits > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Error::new(
                Errno::Efbig,
                "The refcount table has reached its largest size (8 MiB)",
            ));
        }
        Ok((blocks, table))
    }

    /// New refcount blocks are on their way: see the head of `alloc`. Returns
    /// the stage in which they become reachable.
    fn mark_growing(&mut self, txn: &mut dyn Txn) -> Result<Stage> {
        if self.header.version < 3 {
            return Ok(Stage::Prepare);
        }
        self.releases.await_growth();
        if self.header.incompatible & incompatible::DIRTY == 0 {
            self.header.incompatible |= incompatible::DIRTY;
            self.write_incompatible(txn, Stage::Prepare)?;
        }
        Ok(Stage::Mapping)
    }

    pub(crate) fn write_incompatible(&mut self, txn: &mut dyn Txn, stage: Stage) -> Result<()> {
        let bits = self.header.incompatible.to_be_bytes();
        txn.write(IMAGE, stage, field::INCOMPATIBLE, &bits)
    }
}
