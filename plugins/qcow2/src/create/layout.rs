//! Where the parts of a new image lie, in clusters; all arithmetic is checked,
//! since the size is the operator's.

use outport_sdk::{ByteRange, Errno, Error, Result};

use super::options::{Options, Preallocation};
use crate::header::{L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX};
use crate::refcount;

/// A contiguous part of the image, in clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) clusters: u64,
}

impl Part {
    pub(super) fn offset(self, layout: &Layout) -> Result<u64> {
        layout.bytes(self.first)
    }

    pub(super) fn cluster_offset(self, layout: &Layout, index: u64) -> Result<u64> {
        layout.bytes(self.first.checked_add(index).ok_or_else(too_large)?)
    }

    pub(super) fn range(self, layout: &Layout) -> Result<ByteRange> {
        Ok(ByteRange::new(
            self.offset(layout)?,
            layout.bytes(self.clusters)?,
        ))
    }
}

/// A new image, part by part.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) cluster_size: u64,
    pub(super) refcount_order: u32,
    pub(super) extended_l2: bool,
    pub(super) external_data: bool,
    /// Entries in use of the L1 table.
    pub(super) l1_entries: u64,
    pub(super) guest_clusters: u64,
    pub(super) refcount_table: Part,
    pub(super) refcount_blocks: Part,
    pub(super) l1_table: Part,
    pub(super) l2_tables: Part,
    pub(super) data: Part,
}

impl Layout {
    /// The image that `options` ask for.
    pub(super) fn created(options: &Options) -> Result<Self> {
        // A raw data file can only be read alone if no cluster is unallocated.
        let tables = options.preallocation != Preallocation::Off || options.data_file_raw;
        let data = tables && options.data_file.is_none();
        Self::new(options, tables, data)
    }

    /// The same image with every guest cluster in it; a data file is counted
    /// here too, as `qemu-img measure` does.
    pub(super) fn measured(options: &Options) -> Result<Self> {
        Self::new(options, true, true)
    }

    fn new(options: &Options, with_tables: bool, with_data: bool) -> Result<Self> {
        let cluster_size = options.cluster_size();
        let l2_entry_len = if options.extended_l2 { 16 } else { 8 };
        let guest_clusters = options.size.div_ceil(cluster_size);
        let l1_entries = guest_clusters.div_ceil(cluster_size / l2_entry_len);
        let l1_len = l1_entries.checked_mul(8).ok_or_else(too_large)?;
        if l1_len > L1_BYTES_MAX || i64::try_from(options.size).is_err() {
            return Err(too_large());
        }
        let l1_clusters = l1_len.div_ceil(cluster_size);
        let l2_clusters = if with_tables { l1_entries } else { 0 };
        let data_clusters = if with_data { guest_clusters } else { 0 };
        let others = sum(&[1, l1_clusters, l2_clusters, data_clusters])?;

        let mut layout = Self {
            cluster_size,
            refcount_order: options.refcount_order,
            extended_l2: options.extended_l2,
            external_data: options.data_file.is_some(),
            l1_entries,
            guest_clusters,
            refcount_table: Part::default(),
            refcount_blocks: Part::default(),
            l1_table: Part::default(),
            l2_tables: Part::default(),
            data: Part::default(),
        };
        let (tables, blocks) = layout.refcount_clusters(others)?;
        let mut next = 1_u64;
        for (part, clusters) in [
            (&mut layout.refcount_table, tables),
            (&mut layout.refcount_blocks, blocks),
            (&mut layout.l1_table, l1_clusters),
            (&mut layout.l2_tables, l2_clusters),
            (&mut layout.data, data_clusters),
        ] {
            *part = Part {
                first: next,
                clusters,
            };
            next = sum(&[next, clusters])?;
        }
        Ok(layout)
    }

    /// Clusters of the refcount table and of its blocks that count `others`
    /// clusters and themselves: the least fixed point.
    fn refcount_clusters(&self, others: u64) -> Result<(u64, u64)> {
        let (mut tables, mut blocks) = (0, 0);
        loop {
            let counted = sum(&[others, tables, blocks])?;
            let blocks_needed = counted.div_ceil(self.refcount_entries());
            let tables_needed = blocks_needed.div_ceil(self.cluster_size / 8);
            if (tables_needed, blocks_needed) == (tables, blocks) {
                return Ok((tables, blocks));
            }
            (tables, blocks) = (tables_needed, blocks_needed);
        }
    }

    /// Reference counts in one refcount block.
    pub(super) fn refcount_entries(&self) -> u64 {
        refcount::entries_in(self.cluster_size, self.refcount_order)
    }

    /// Length of `clusters` clusters in bytes.
    pub(super) fn bytes(&self, clusters: u64) -> Result<u64> {
        let len = clusters
            .checked_mul(self.cluster_size)
            .ok_or_else(too_large)?;
        i64::try_from(len).map(|_| len).map_err(|_| too_large())
    }

    /// Clusters of the whole image.
    pub(super) fn clusters(&self) -> Result<u64> {
        sum(&[self.data.first, self.data.clusters])
    }

    /// Length of the file.
    pub(super) fn len(&self) -> Result<u64> {
        self.bytes(self.clusters()?)
    }

    /// Length of everything that is not guest data.
    pub(super) fn metadata_len(&self) -> Result<u64> {
        self.bytes(self.data.first)
    }

    /// Bytes of the tables that have content, which a transaction must carry.
    pub(super) fn queued_len(&self) -> Result<u64> {
        if self.bytes(self.refcount_table.clusters)? > REFCOUNT_TABLE_BYTES_MAX {
            return Err(too_large());
        }
        let l1 = if self.l2_tables.clusters > 0 {
            self.l1_table.clusters
        } else {
            0
        };
        self.bytes(sum(&[
            self.refcount_table.clusters,
            self.refcount_blocks.clusters,
            l1,
            self.l2_tables.clusters,
        ])?)
    }
}

fn sum(parts: &[u64]) -> Result<u64> {
    parts
        .iter()
        .try_fold(0_u64, |sum, part| sum.checked_add(*part))
        .ok_or_else(too_large)
}

pub(super) fn too_large() -> Error {
    Error::new(
        Errno::Efbig,
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
    )
}
