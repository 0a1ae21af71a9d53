//! Storing bitmaps: bits and tables first, to which nothing points; then a new directory; then the
//! header, step by step; and only with its last step what was there before becomes free.
//!
//! A power cut on the way leaves leaked clusters, and bitmaps that are in use.

use std::collections::HashMap;

use outport_sdk::{Bits, Error, Files, KeptBitmap, Result, Stage, Txn};

use super::directory::{Entry, flag, serialise};
use super::extension::Target;
use super::{ALL_ONES, BITMAPS_MAX, DIRECTORY_BYTES_MAX, STRETCH_BYTES};
use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::table::OFFSET_MASK;

/// Tables written by one call: each is an operation of its transaction.
const TABLES_PER_CALL: usize = 1024;

/// A list of bitmaps on its way into the image.
#[derive(Debug)]
pub(crate) struct Keeping {
    entries: Vec<Entry>,
    /// Entries whose tables are still to be written, last first.
    fresh: Vec<usize>,
    /// The new directory, when it was written; the inner `None`: there are no bitmaps.
    target: Option<Option<Target>>,
    /// Clusters that are free when the header says so: first and count.
    releases: Vec<(u64, u64)>,
}

impl Qcow2 {
    // === bits ===

    /// Puts the clusters of one stretch away; their table entries.
    pub(crate) fn place_bits(
        &mut self,
        txn: &mut dyn Txn,
        bitmap: &KeptBitmap,
        bits: &Bits,
    ) -> Result<Vec<u64>> {
        let cluster_size = self.cluster_size() as usize;
        let entries = bits.data.len().div_ceil(cluster_size) as u64;
        let index = bits.first / self.bits_per_cluster();
        self.check_table_fits(bitmap.granularity)?;
        let fits = bits.first.is_multiple_of(self.bits_per_cluster())
            && bits.data.len() as u64 <= STRETCH_BYTES
            && index + entries <= self.table_entries(bitmap.granularity);
        if !fits {
            return Err(Error::invalid(format!(
                "{} bytes of bits from bit {} on do not fit bitmap '{}'",
                bits.data.len(),
                bits.first,
                bitmap.name
            )));
        }
        let mut placed = Vec::with_capacity(entries as usize);
        let (mut next, mut left) = (0, 0);
        for piece in bits.data.chunks(cluster_size) {
            let whole = piece.len() == cluster_size;
            placed.push(match piece {
                _ if piece.iter().all(|byte| *byte == 0) => 0,
                _ if whole && piece.iter().all(|byte| *byte == 0xff) => ALL_ONES,
                _ => {
                    if left == 0 {
                        (next, left) = self.allocate(txn, entries - placed.len() as u64)?;
                    }
                    let offset = next << self.header.cluster_bits;
                    (next, left) = (next + 1, left - 1);
                    let mut cluster = piece.to_vec();
                    cluster.resize(cluster_size, 0);
                    self.pages
                        .write_fresh(txn, Stage::Prepare, offset, &cluster)?;
                    offset
                }
            });
        }
        if left > 0 {
            // Taken, and not needed: nothing of it was ever reachable.
            self.drop_references(txn.files(), next, left)?;
        }
        Ok(placed)
    }

    /// The stretch was queued: its bitmap's table gets the entries.
    pub(crate) fn stage_bits(&mut self, bitmap: &KeptBitmap, bits: &Bits, placed: &[u64]) {
        let entries = self.table_entries(bitmap.granularity) as usize;
        let index = (bits.first / self.bits_per_cluster()) as usize;
        let name = bitmap.name.clone();
        let table = self.bitmaps.staged.entry(name).or_default();
        table.resize(entries, 0);
        table[index..index + placed.len()].copy_from_slice(placed);
    }

    // === the list ===

    /// One step towards an image with these bitmaps; `None`: it was the last.
    pub(crate) fn keep(
        &mut self,
        txn: &mut dyn Txn,
        kept: &[KeptBitmap],
        keeping: Option<Box<Keeping>>,
    ) -> Result<Option<Box<Keeping>>> {
        let keeping = match keeping {
            Some(keeping) => Some(keeping),
            None => self.begin_keeping(txn.files(), kept)?,
        };
        let Some(mut keeping) = keeping else {
            return Ok(None);
        };
        if !self.write_tables(txn, &mut keeping)? {
            return Ok(Some(keeping));
        }
        let target = match keeping.target {
            Some(target) => target,
            None => *keeping
                .target
                .insert(self.write_directory(txn, &keeping.entries)?),
        };
        if !self.put_extension(txn, target)? {
            return Ok(Some(keeping));
        }
        for &(first, count) in &keeping.releases {
            self.releases.add(first, count);
        }
        self.regions
            .set_bitmap_directory(target.map(|it| (it.offset, it.bytes)));
        Ok(None)
    }

    /// What is to become of each bitmap; `None`: nothing changes.
    fn begin_keeping(
        &mut self,
        files: &dyn Files,
        kept: &[KeptBitmap],
    ) -> Result<Option<Box<Keeping>>> {
        let old = self.bitmap_directory(files)?;
        let mut wanted: HashMap<&str, &KeptBitmap> =
            kept.iter().map(|it| (it.name.as_str(), it)).collect();
        let mut keeping = Box::new(Keeping {
            entries: Vec::with_capacity(old.len()),
            fresh: Vec::new(),
            target: None,
            releases: Vec::new(),
        });
        let mut changed = false;
        for entry in old {
            let name = entry.name().map(str::to_owned);
            let Some(name) = name else {
                keeping.entries.push(entry);
                continue;
            };
            let keep = wanted.remove(name.as_str());
            match keep {
                Some(keep) if !keep.consistent => {
                    keeping.entries.push(entry);
                    continue;
                }
                Some(keep) => {
                    self.release_bitmap(files, &entry, &mut keeping.releases)?;
                    let mut fresh = self.fresh_entry(keep, entry.extra);
                    fresh.flags |= entry.flags & flag::EXTRA_COMPATIBLE;
                    keeping.fresh.push(keeping.entries.len());
                    keeping.entries.push(fresh);
                }
                None => self.release_bitmap(files, &entry, &mut keeping.releases)?,
            }
            changed = true;
        }
        for keep in kept.iter().filter(|it| it.consistent) {
            self.check_table_fits(keep.granularity)?;
        }
        let new = kept.iter().filter(|it| it.consistent);
        for keep in new.filter(|it| wanted.contains_key(it.name.as_str())) {
            keeping.fresh.push(keeping.entries.len());
            keeping.entries.push(self.fresh_entry(keep, Vec::new()));
            changed = true;
        }
        if !changed {
            return Ok(None);
        }
        if keeping.entries.len() > BITMAPS_MAX as usize {
            return Err(Error::invalid("Too many bitmaps"));
        }
        if let Some((_, bytes, offset)) = self.header.active_bitmaps() {
            keeping.releases.push(self.cluster_run(offset, bytes));
        }
        keeping.fresh.reverse();
        Ok(Some(keeping))
    }

    fn fresh_entry(&self, keep: &KeptBitmap, extra: Vec<u8>) -> Entry {
        Entry {
            table: 0,
            entries: self.table_entries(keep.granularity) as u32,
            flags: auto(keep),
            granularity_bits: keep.granularity.trailing_zeros() as u8,
            extra,
            name: keep.name.clone().into_bytes(),
        }
    }

    fn cluster_run(&self, offset: u64, bytes: u64) -> (u64, u64) {
        let bits = self.header.cluster_bits;
        (offset >> bits, bytes.div_ceil(self.cluster_size()))
    }

    /// The clusters of a bitmap that goes. What its table should not say leaks.
    fn release_bitmap(
        &self,
        files: &dyn Files,
        entry: &Entry,
        releases: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let entries = u64::from(entry.entries);
        releases.push(self.cluster_run(entry.table, entries * 8));
        let mut done = 0;
        while done < entries {
            let count = (entries - done).min(STRETCH_BYTES / 8);
            for raw in self.read_bitmap_table(files, entry.table, done, count)? {
                let offset = raw & OFFSET_MASK;
                if offset == 0 || raw != offset || !offset.is_multiple_of(self.cluster_size()) {
                    continue;
                }
                let cluster = offset >> self.header.cluster_bits;
                match releases.last_mut() {
                    Some(run) if run.0 + run.1 == cluster => run.1 += 1,
                    _ => releases.push((cluster, 1)),
                }
            }
            done += count;
        }
        Ok(())
    }

    /// Tables of new entries, as many as one call takes; `true`: all are written.
    fn write_tables(&mut self, txn: &mut dyn Txn, keeping: &mut Keeping) -> Result<bool> {
        let staged = std::mem::take(&mut self.bitmaps.staged);
        let mut written = Ok(());
        for _ in 0..TABLES_PER_CALL {
            let Some(at) = keeping.fresh.pop() else { break };
            let entry = &mut keeping.entries[at];
            let table = entry.name().and_then(|name| staged.get(name));
            let mut content = vec![0; entry.entries as usize * 8];
            let words = content.as_chunks_mut::<8>().0.iter_mut();
            for (word, raw) in words.zip(table.into_iter().flatten()) {
                *word = raw.to_be_bytes();
            }
            // An image without a single byte has bitmaps without a table.
            content.resize(content.len().max(8), 0);
            match self.write_row(txn, &content) {
                Ok(offset) => entry.table = offset,
                Err(error) => {
                    written = Err(error);
                    break;
                }
            }
        }
        self.bitmaps.staged = staged;
        written.map(|()| keeping.fresh.is_empty())
    }

    /// New clusters in a row with this content, to which nothing points.
    fn write_row(&mut self, txn: &mut dyn Txn, content: &[u8]) -> Result<u64> {
        let clusters = (content.len() as u64).div_ceil(self.cluster_size());
        let first = self.allocate_row(txn, clusters)?;
        let offset = first << self.header.cluster_bits;
        self.pages
            .write_fresh(txn, Stage::Prepare, offset, content)?;
        txn.grow(IMAGE, offset + (clusters << self.header.cluster_bits))?;
        Ok(offset)
    }

    /// The new directory; `None`: there are no bitmaps any more.
    fn write_directory(&mut self, txn: &mut dyn Txn, entries: &[Entry]) -> Result<Option<Target>> {
        if entries.is_empty() {
            return Ok(None);
        }
        let content = serialise(entries);
        if content.len() as u64 > DIRECTORY_BYTES_MAX {
            return Err(Error::invalid("Not enough space in the bitmap directory"));
        }
        let offset = self.write_row(txn, &content)?;
        Ok(Some(Target {
            count: entries.len() as u32,
            bytes: content.len() as u64,
            offset,
        }))
    }
}

const fn auto(keep: &KeptBitmap) -> u32 {
    if keep.enabled { flag::AUTO } else { 0 }
}
