//! Host clusters: which are free, and taking them.
//!
//! Space is taken in file order: from a frontier that moves up, and from runs
//! that were given back below it. A cluster counts as taken as soon as its
//! refcount is queued, so no other list of reservations is needed.
//!
//! New refcount blocks and a new refcount table become reachable in stage
//! `mapping`, together with the L2 entries whose clusters they count. A crash
//! between the two would leave clusters in use that no refcount covers, so the
//! image is marked dirty beforehand (version 3), and the mark is taken away once
//! the mapping is durable: whoever opens the image after such a crash rebuilds
//! the refcounts first. Version 2 has no such mark; there the new block becomes
//! reachable in `prepare`, and a crash costs a leak or a check.

use std::collections::BTreeMap;

use outport_sdk::{ByteRange, Errno, Error, Files, Result, Stage, Txn};

use crate::header::{HOST_OFFSET_MAX, REFCOUNT_TABLE_BYTES_MAX, field, incompatible};
use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::refcount;

/// Runs of free clusters that are remembered; more are found again by looking.
const RECYCLED_MAX: usize = 4096;

/// Runs that a request for several clusters looks at before it takes new space.
const RECYCLED_TRIES: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Allocator {
    /// No cluster below is free but those in `recycled`.
    frontier: u64,
    /// Free runs below the frontier: first cluster to count.
    recycled: BTreeMap<u64, u64>,
    /// The next free byte in the last cluster of compressed data; 0: none.
    pub(crate) tail: u64,
    /// The refcount block used last: index in the table, and offset.
    block: Option<(u64, u64)>,
}

impl Allocator {
    /// A run of free clusters was found or given back.
    fn recycle(&mut self, first: u64, count: u64) {
        if first >= self.frontier {
            return;
        }
        if self.recycled.len() >= RECYCLED_MAX {
            // Look again from here; the runs above will be found again too.
            self.recycled.split_off(&first);
            self.frontier = first;
            return;
        }
        let mut run = (first, count);
        if let Some((&before, &len)) = self.recycled.range(..first).next_back()
            && before + len == first
        {
            self.recycled.remove(&before);
            run = (before, len + count);
        }
        if let Some(len) = self.recycled.remove(&(first + count)) {
            run.1 += len;
        }
        self.recycled.insert(run.0, run.1);
    }

    /// Take up to `want` clusters that were given back, if that serves well.
    fn take_recycled(&mut self, want: u64) -> Option<(u64, u64)> {
        let (&first, &len) = self
            .recycled
            .iter()
            .take(RECYCLED_TRIES)
            .find(|run| *run.1 >= want)?;
        self.recycled.remove(&first);
        if len > want {
            self.recycled.insert(first + want, len - want);
        }
        Some((first, want))
    }

    /// `cluster` is taken by its number.
    fn take_one(&mut self, cluster: u64) {
        let Some((&first, &len)) = self.recycled.range(..=cluster).next_back() else {
            return;
        };
        if cluster >= first + len {
            return;
        }
        self.recycled.remove(&first);
        if cluster > first {
            self.recycled.insert(first, cluster - first);
        }
        if cluster + 1 < first + len {
            self.recycled.insert(cluster + 1, first + len - cluster - 1);
        }
    }
}

/// What lies at the frontier.
enum Found {
    Run {
        first: u64,
        count: u64,
    },
    /// Free clusters that no refcount block covers yet.
    NoBlock {
        index: u64,
        first: u64,
    },
}

// === refcounts ===

impl Qcow2 {
    /// Clusters that one refcount block counts.
    pub(crate) const fn clusters_per_block(&self) -> u64 {
        refcount::entries_in(self.cluster_size(), self.header.refcount_order)
    }

    const fn refcount_table_entries(&self) -> u64 {
        ((self.header.refcount_table_clusters as u64) << self.header.cluster_bits) / 8
    }

    /// The refcount block with this index in the table.
    fn refcount_block(&mut self, files: &dyn Files, index: u64) -> Result<Option<u64>> {
        if let Some((known, offset)) = self.alloc.block
            && known == index
        {
            return Ok(Some(offset));
        }
        if index >= self.refcount_table_entries() {
            return Ok(None);
        }
        let at = self.header.refcount_table_offset + index * 8;
        let offset = self.pages.read_u64(files, at)?;
        if offset == 0 {
            return Ok(None);
        }
        if !offset.is_multiple_of(self.cluster_size()) {
            let message =
                format!("Refcount table entry {offset:#x} at offset {at:#x} is not aligned");
            return Err(self.damaged(files, message, at, 8));
        }
        self.check_table(files, offset, "Refcount block")?;
        self.alloc.block = Some((index, offset));
        Ok(Some(offset))
    }

    pub(crate) fn has_refcount_block(&mut self, files: &dyn Files, cluster: u64) -> Result<bool> {
        Ok(self
            .refcount_block(files, cluster / self.clusters_per_block())?
            .is_some())
    }

    /// How many references there are to `cluster`.
    pub(crate) fn refcount(&mut self, files: &dyn Files, cluster: u64) -> Result<u64> {
        let per_block = self.clusters_per_block();
        let Some(block) = self.refcount_block(files, cluster / per_block)? else {
            return Ok(0);
        };
        let order = self.header.refcount_order;
        let entry = cluster % per_block;
        let (_, page) = self.pages.page(files, block + (entry << order) / 8)?;
        let index = entry % refcount::entries_in(page.len() as u64, order);
        Ok(refcount::get(page, index as usize, order))
    }

    /// Change the refcounts of a run of clusters, all of which have a block.
    /// `change` gets cluster and count, and returns the new count, at most
    /// [`refcount::max`].
    pub(crate) fn change_refcounts(
        &mut self,
        files: &dyn Files,
        first: u64,
        count: u64,
        mut change: impl FnMut(u64, u64) -> u64,
    ) -> Result<()> {
        let order = self.header.refcount_order;
        let per_block = self.clusters_per_block();
        let per_page = refcount::entries_in(self.pages.page_bytes(), order);
        let (mut cluster, end) = (first, first + count);
        while cluster < end {
            let block = self
                .refcount_block(files, cluster / per_block)?
                .ok_or_else(|| Error::io(format!("Cluster {cluster} has no refcount block")))?;
            let entry = cluster % per_block;
            let in_page = entry % per_page;
            let n = (end - cluster).min(per_page - in_page);
            // The bytes that hold these entries.
            let from = (entry << order) / 8;
            let upto = ((entry + n) << order).div_ceil(8);
            let skip = entry - ((from * 8) >> order);
            self.pages
                .change(files, Stage::Prepare, block + from, upto - from, |bytes| {
                    for i in 0..n {
                        let at = (skip + i) as usize;
                        let new = change(cluster + i, refcount::get(bytes, at, order));
                        refcount::set(bytes, at, order, new);
                    }
                })?;
            cluster += n;
        }
        Ok(())
    }

    /// Take one reference from each cluster of a run; what nobody refers to any
    /// more can be allocated again. Only for space that is unreachable on disk.
    pub(crate) fn drop_references(
        &mut self,
        files: &dyn Files,
        first: u64,
        count: u64,
    ) -> Result<()> {
        let mut free: Vec<(u64, u64)> = Vec::new();
        self.change_refcounts(files, first, count, |cluster, n| {
            if n == 1 {
                match free.last_mut() {
                    Some(run) if run.0 + run.1 == cluster => run.1 += 1,
                    _ => free.push((cluster, 1)),
                }
            }
            n.saturating_sub(1)
        })?;
        let bits = self.header.cluster_bits;
        for (first, count) in free {
            let last = first + count;
            if (first..last).contains(&(self.alloc.tail >> bits)) {
                self.alloc.tail = 0;
            }
            self.regions.remove_tables(first << bits, last << bits);
            self.alloc.recycle(first, count);
        }
        Ok(())
    }
}

// === taking space ===

impl Qcow2 {
    /// Take 1 to `want` clusters in a row: first cluster and count. Their
    /// refcount is one from now on.
    pub(crate) fn allocate(&mut self, txn: &mut dyn Txn, want: u64) -> Result<(u64, u64)> {
        if let Some((first, count)) = self.alloc.take_recycled(want) {
            self.take(txn, first, count)?;
            return Ok((first, count));
        }
        loop {
            match self.look(txn.files(), self.alloc.frontier, want)? {
                Found::Run { first, count } => {
                    self.alloc.frontier = first + count;
                    self.take(txn, first, count)?;
                    return Ok((first, count));
                }
                Found::NoBlock { index, first } => {
                    self.alloc.frontier = first;
                    self.add_block(txn, index)?;
                }
            }
        }
    }

    /// Take this very cluster, if it is free and has a refcount block.
    pub(crate) fn allocate_at(&mut self, txn: &mut dyn Txn, cluster: u64) -> Result<bool> {
        if !self.has_refcount_block(txn.files(), cluster)?
            || self.refcount(txn.files(), cluster)? != 0
        {
            return Ok(false);
        }
        self.alloc.take_one(cluster);
        self.take(txn, cluster, 1)?;
        Ok(true)
    }

    /// The first free clusters at or after `from`.
    fn look(&mut self, files: &dyn Files, from: u64, want: u64) -> Result<Found> {
        let order = self.header.refcount_order;
        let per_block = self.clusters_per_block();
        let per_page = refcount::entries_in(self.pages.page_bytes(), order);
        let mut cluster = from;
        let mut run: Option<(u64, u64)> = None;
        loop {
            let index = cluster / per_block;
            let Some(block) = self.refcount_block(files, index)? else {
                return Ok(match run {
                    Some((first, count)) => Found::Run { first, count },
                    None => Found::NoBlock {
                        index,
                        first: cluster,
                    },
                });
            };
            let entry = cluster % per_block;
            let (_, page) = self.pages.page(files, block + (entry << order) / 8)?;
            let mut ended = false;
            for i in entry % per_page..per_page {
                let free = refcount::get(page, i as usize, order) == 0;
                match &mut run {
                    None if free => run = Some((cluster, 1)),
                    Some(run) if free => run.1 += 1,
                    None => {}
                    Some(_) => {
                        ended = true;
                        break;
                    }
                }
                cluster += 1;
                if run.is_some_and(|r| r.1 >= want) {
                    ended = true;
                    break;
                }
            }
            // A run that ends with its page may go on in the next one.
            if let Some((first, count)) = run.filter(|_| ended) {
                return Ok(Found::Run { first, count });
            }
        }
    }

    /// Mark free clusters as used.
    fn take(&mut self, txn: &mut dyn Txn, first: u64, count: u64) -> Result<()> {
        self.check_fresh(txn.files(), first, count)?;
        self.change_refcounts(txn.files(), first, count, |_, _| 1)
    }

    /// Free clusters must not be tables, whatever the refcounts say.
    fn check_fresh(&mut self, files: &dyn Files, first: u64, count: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let end = first.saturating_add(count);
        if end > HOST_OFFSET_MAX >> bits {
            return Err(Error::new(
                Errno::Efbig,
                "The image file has reached its largest size",
            ));
        }
        if let Some(name) = self.regions.find(first << bits, count << bits) {
            let message = format!(
                "Preventing invalid allocation of {name} at offset {:#x}",
                first << bits
            );
            files.corrupt(&message, Some(first << bits), Some(count << bits), true);
            return Err(Error::io(message));
        }
        self.file_end = self.file_end.max(end << bits);
        Ok(())
    }

    // === growth ===

    /// Give the clusters with this block index a refcount block: the first of
    /// them.
    fn add_block(&mut self, txn: &mut dyn Txn, index: u64) -> Result<()> {
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

    /// Take exactly `count` clusters in a row.
    pub(crate) fn allocate_row(&mut self, txn: &mut dyn Txn, count: u64) -> Result<u64> {
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

    /// New refcount blocks are on their way: see the head of this file. Returns
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_given_back_join_and_are_taken_from_the_front() {
        let mut a = Allocator {
            frontier: 100,
            ..Allocator::default()
        };
        a.recycle(10, 2);
        a.recycle(14, 2);
        a.recycle(12, 2);
        a.recycle(100, 5);
        assert_eq!(a.recycled, BTreeMap::from([(10, 6)]));
        a.take_one(12);
        assert_eq!(a.take_recycled(3), Some((13, 3)));
        assert_eq!(a.take_recycled(3), None);
        assert_eq!(a.take_recycled(1), Some((10, 1)));
        assert_eq!(a.recycled, BTreeMap::from([(11, 1)]));
    }

    #[test]
    fn too_many_runs_are_looked_for_again() {
        let mut a = Allocator {
            frontier: 1 << 20,
            ..Allocator::default()
        };
        for i in 0..RECYCLED_MAX as u64 {
            a.recycle(i * 2 + 1000, 1);
        }
        a.recycle(2001, 1);
        assert_eq!(a.frontier, 2001);
        assert!(a.recycled.keys().all(|first| *first < 2001));
    }
}
