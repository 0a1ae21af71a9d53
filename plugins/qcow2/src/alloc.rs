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

mod counts;
mod growth;

use std::collections::BTreeMap;

use outport_sdk::{Errno, Error, Files, Result, Txn};

use crate::header::HOST_OFFSET_MAX;
use crate::image::Qcow2;
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
