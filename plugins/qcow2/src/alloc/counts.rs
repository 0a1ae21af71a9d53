//! Refcounts: read, and changed in stage `prepare`.

use outport_sdk::{Error, Files, Result, Stage};

use crate::image::Qcow2;
use crate::refcount;

impl Qcow2 {
    /// Clusters that one refcount block counts.
    pub(crate) const fn clusters_per_block(&self) -> u64 {
        refcount::entries_in(self.cluster_size(), self.header.refcount_order)
    }

    pub(super) const fn refcount_table_entries(&self) -> u64 {
        ((self.header.refcount_table_clusters as u64) << self.header.cluster_bits) / 8
    }

    /// The refcount block with this index in the table.
    pub(super) fn refcount_block(&mut self, files: &dyn Files, index: u64) -> Result<Option<u64>> {
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
