//! Where metadata lies: what no extent may touch and no allocation may take.

use std::collections::BTreeSet;

use outport_sdk::{Files, Result};

use crate::header::Header;
use crate::pages::IMAGE;
use crate::snapshot::Snapshot;
use crate::table::OFFSET_MASK;

/// L2 tables and refcount blocks that are remembered: 2 MiB of memory, enough
/// for 64 TiB in clusters of 64 KiB. Beyond it only the fixed tables are known.
const TABLES_MAX: usize = 131_072;

/// Table bytes read at a time.
const CHUNK_BYTES: u64 = 64 << 10;

/// What the bitmap directory is called.
const BITMAP_DIRECTORY: &str = "bitmap directory";

#[derive(Clone, Debug, Default)]
pub(crate) struct Regions {
    cluster_bits: u32,
    /// First byte, end, name; at most five.
    fixed: Vec<(u64, u64, &'static str)>,
    /// L1 tables of snapshots, sorted and merged.
    inactive: Vec<(u64, u64)>,
    /// Offsets of L2 tables and refcount blocks.
    tables: BTreeSet<u64>,
}

impl Regions {
    /// The header and the tables it names.
    pub(crate) fn fixed(header: &Header, snapshots: &[Snapshot], snapshot_table: u64) -> Self {
        let mut regions = Self {
            cluster_bits: header.cluster_bits,
            ..Self::default()
        };
        regions.add_fixed(0, 1, "header");
        regions.add_fixed(
            header.l1_offset,
            u64::from(header.l1_size) * 8,
            "active L1 table",
        );
        regions.add_fixed(
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) << header.cluster_bits,
            "refcount table",
        );
        regions.add_fixed(header.snapshots_offset, snapshot_table, "snapshot table");
        if let Some((_, len, offset)) = header.active_bitmaps() {
            regions.add_fixed(offset, len, BITMAP_DIRECTORY);
        }
        let mut inactive: Vec<_> = snapshots
            .iter()
            .map(|s| {
                (
                    s.l1_offset,
                    regions.end_of(s.l1_offset, u64::from(s.l1_size) * 8),
                )
            })
            .filter(|(start, end)| start < end)
            .collect();
        inactive.sort_unstable();
        for (start, end) in inactive {
            match regions.inactive.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => regions.inactive.push((start, end)),
            }
        }
        regions
    }

    /// The end of a table, rounded up to a cluster.
    fn end_of(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        end.checked_next_multiple_of(1 << self.cluster_bits)
            .unwrap_or(end)
    }

    fn add_fixed(&mut self, offset: u64, len: u64, name: &'static str) {
        if len > 0 {
            self.fixed.push((offset, self.end_of(offset, len), name));
        }
    }

    /// Remember the L2 tables and refcount blocks too. Entries that are damaged
    /// are left out here, and reported when they are used.
    pub(crate) fn add_tables(&mut self, files: &dyn Files, header: &Header) -> Result<()> {
        let refcount_table = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        self.scan(files, header.l1_offset, u64::from(header.l1_size) * 8)?;
        self.scan(files, header.refcount_table_offset, refcount_table)
    }

    fn scan(&mut self, files: &dyn Files, offset: u64, len: u64) -> Result<()> {
        let mut buf = vec![0; CHUNK_BYTES.min(len) as usize];
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(CHUNK_BYTES) as usize;
            files.read_into(IMAGE, offset + done, &mut buf[..chunk])?;
            for entry in buf[..chunk].as_chunks::<8>().0 {
                self.add_table(u64::from_be_bytes(*entry) & OFFSET_MASK);
            }
            done += chunk as u64;
        }
        Ok(())
    }

    /// A table of one cluster at `offset`.
    pub(crate) fn add_table(&mut self, offset: u64) {
        if offset != 0 && self.tables.len() < TABLES_MAX {
            self.tables.insert(offset & !((1 << self.cluster_bits) - 1));
        }
    }

    /// `offset..end` was given back: no table lies there any more.
    pub(crate) fn remove_tables(&mut self, offset: u64, end: u64) {
        while let Some(&table) = self.tables.range(offset..end).next() {
            self.tables.remove(&table);
        }
    }

    /// What metadata lies in `offset..offset + len`, if any.
    pub(crate) fn find(&self, offset: u64, len: u64) -> Option<&'static str> {
        if let Some(name) = self.find_fixed(offset, len) {
            return Some(name);
        }
        let first = offset & !((1 << self.cluster_bits) - 1);
        let end = offset.saturating_add(len);
        self.tables
            .range(first..end)
            .next()
            .map(|_| "L2 table or refcount block")
    }

    /// The same, among the tables that the header or the snapshot table name.
    pub(crate) fn find_fixed(&self, offset: u64, len: u64) -> Option<&'static str> {
        let end = offset.saturating_add(len);
        if let Some(f) = self.fixed.iter().find(|f| f.0 < end && offset < f.1) {
            return Some(f.2);
        }
        let next = self.inactive.partition_point(|i| i.1 <= offset);
        self.inactive
            .get(next)
            .filter(|i| i.0 < end)
            .map(|_| "L1 table of a snapshot")
    }

    /// All known tables of this image, as runs of clusters.
    pub(crate) fn clusters(&self) -> Vec<(u64, u64)> {
        let bits = self.cluster_bits;
        let fixed = self
            .fixed
            .iter()
            .map(|f| (f.0 >> bits, (f.1 - f.0) >> bits));
        fixed
            .chain(self.tables.iter().map(|t| (t >> bits, 1)))
            .collect()
    }

    /// A fixed table moved from `old` to `new`; both in bytes, `len` rounded up.
    pub(crate) fn move_fixed(&mut self, old: u64, new: u64, len: u64, name: &'static str) {
        if let Some(at) = self.fixed.iter().position(|f| f.0 == old && f.2 == name) {
            self.fixed.remove(at);
        }
        self.add_fixed(new, len, name);
    }

    /// Where the bitmap directory is now, and its bytes, if there is one.
    pub(crate) fn set_bitmap_directory(&mut self, place: Option<(u64, u64)>) {
        self.fixed.retain(|f| f.2 != BITMAP_DIRECTORY);
        if let Some((offset, len)) = place {
            self.add_fixed(offset, len, BITMAP_DIRECTORY);
        }
    }
}
