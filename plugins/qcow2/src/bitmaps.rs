//! Persistent dirty bitmaps (qcow2.rst: Bitmaps): what the image has, and its bits.
//!
//! ```text
//!  header extension --> directory --> table of each bitmap --> clusters of bits
//! ```
//! An image that is opened for writing marks its bitmaps as in use; how they were before is
//! remembered here, as the host asks for bits afterwards. Storing them is the business of `store`.
//! Invariant: what was in use before, or is not understood, is never handed out, and stays as it
//! is until it is removed.

mod directory;
mod extension;
mod store;

use std::collections::{BTreeMap, HashMap};

use outport_sdk::{Bits, Errno, Error, Files, KeptBitmap, LogLevel, Result, Stage, Txn};

use crate::header::{Extension, autoclear};
use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::table::OFFSET_MASK;

pub(crate) use directory::{BITMAPS_MAX, DIRECTORY_BYTES_MAX, Entry, FIXED, parse};
use directory::{BITS_BYTES_MAX, FLAGS_AT, GRANULARITY_BITS, NAME_BYTES_MAX, TABLE_ENTRIES_MAX};
use directory::{flag, serialise};
use extension::Target;
use store::Keeping;

/// Bits that cross to or from the host at a time.
const STRETCH_BYTES: u64 = 2 << 20;

/// Bitmaps named in one answer: with the longest names half a megabyte.
const LISTED_MAX: usize = 512;

/// A table entry without a cluster: bit 0 says all ones.
const ALL_ONES: u64 = 1;

/// What an instance knows of bitmaps.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    /// As they were when the image was opened for writing.
    at_open: Vec<KeptBitmap>,
    /// Where the bits of those that are consistent are. The directory may have 64 MiB: it is read
    /// once, not for each of its bitmaps.
    stored: HashMap<String, Stored>,
    /// Tables of bits that were put away, by name.
    pub(crate) staged: BTreeMap<String, Vec<u64>>,
    /// The list is being changed, over several calls.
    pub(crate) keeping: Option<Box<Keeping>>,
}

/// The bits of a bitmap.
#[derive(Clone, Copy, Debug)]
struct Stored {
    table: u64,
    entries: u32,
    granularity: u32,
}

impl Bitmaps {
    /// These are the image's.
    fn found(&mut self, entries: &[Entry]) {
        self.at_open = entries.iter().filter_map(Entry::kept).collect();
        let stored = |entry: &Entry| {
            let kept = entry.kept().filter(|kept| kept.consistent)?;
            let stored = Stored {
                table: entry.table,
                entries: entry.entries,
                granularity: kept.granularity,
            };
            Some((kept.name, stored))
        };
        self.stored = entries.iter().filter_map(stored).collect();
    }

    /// The image has others now.
    pub(crate) fn forget_stored(&mut self) {
        self.stored.clear();
    }
}

impl Qcow2 {
    /// The directory as it is now; empty without a valid one.
    pub(crate) fn bitmap_directory(&self, files: &dyn Files) -> Result<Vec<Entry>> {
        let Some((count, bytes, offset)) = self.header.active_bitmaps() else {
            return Ok(Vec::new());
        };
        if count > BITMAPS_MAX || bytes > DIRECTORY_BYTES_MAX || count == 0 {
            return Err(Error::invalid(format!(
                "bitmaps_ext: {count} bitmaps in a directory of {bytes} bytes"
            )));
        }
        let end = offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= files.size(IMAGE).unwrap_or(0));
        if !offset.is_multiple_of(self.cluster_size()) || !inside {
            return Err(Error::invalid("bitmaps_ext: invalid bitmap directory"));
        }
        let mut content = vec![0; bytes as usize];
        for (i, chunk) in content.chunks_mut(STRETCH_BYTES as usize).enumerate() {
            files.read_into(IMAGE, offset + i as u64 * STRETCH_BYTES, chunk)?;
        }
        parse(&content, count, self.header.cluster_bits)
    }

    // === opening ===

    /// The image is ours to write: from now on its bitmaps are in use.
    pub(crate) fn take_bitmaps(&mut self, txn: &mut dyn Txn) -> Result<()> {
        if self.header.has_bitmaps() && self.header.autoclear & autoclear::BITMAPS == 0 {
            txn.log(
                LogLevel::Warn,
                "A program lacking bitmap support modified this file, so all bitmaps are now \
                 considered inconsistent; some clusters may be leaked",
            );
            // Nobody need be told again.
            self.put_extension(txn, None)?;
        }
        let entries = self.bitmap_directory(txn.files())?;
        let Some((_, _, offset)) = self.header.active_bitmaps() else {
            return Ok(());
        };
        let mut at = offset;
        for entry in &entries {
            if !entry.is_in_use() {
                let flags = (entry.flags | flag::IN_USE).to_be_bytes();
                txn.write(IMAGE, Stage::Prepare, at + FLAGS_AT, &flags)?;
            }
            at += entry.stored_len();
        }
        self.bitmaps.found(&entries);
        Ok(())
    }

    /// The bitmaps from number `first` on.
    pub(crate) fn listed_bitmaps(
        &mut self,
        files: &dyn Files,
        first: u32,
    ) -> Result<Vec<KeptBitmap>> {
        if !self.writable && first == 0 {
            let entries = self.bitmap_directory(files)?;
            self.bitmaps.found(&entries);
        }
        let rest = self.bitmaps.at_open.iter().skip(first as usize);
        Ok(rest.take(LISTED_MAX).cloned().collect())
    }

    // === bits ===

    /// Bits that one cluster holds.
    const fn bits_per_cluster(&self) -> u64 {
        self.cluster_size() * 8
    }

    /// Entries of the table of a bitmap for the image as long as it is.
    fn table_entries(&self, granularity: u32) -> u64 {
        let bits = self.header.size.div_ceil(u64::from(granularity));
        bits.div_ceil(self.bits_per_cluster())
    }

    /// The image may have grown since such a bitmap was added.
    fn check_table_fits(&self, granularity: u32) -> Result<()> {
        let entries = self.table_entries(granularity);
        if entries > TABLE_ENTRIES_MAX || entries << self.header.cluster_bits > BITS_BYTES_MAX {
            return Err(Error::new(
                Errno::Efbig,
                "Too much space will be occupied by the bitmap. Use larger granularity",
            ));
        }
        Ok(())
    }

    /// The first stretch of a bitmap at or after bit `from` that is not all clear.
    pub(crate) fn stored_bits(
        &self,
        files: &dyn Files,
        name: &str,
        from: u64,
    ) -> Result<Option<Bits>> {
        let unreadable = || {
            let why = "Invalid argument";
            Error::invalid(format!("Could not read bitmap '{name}' from image: {why}"))
        };
        let stored = self.bitmaps.stored.get(name).ok_or_else(unreadable)?;
        let entries = self.table_entries(stored.granularity);
        if u64::from(stored.entries) != entries {
            return Err(unreadable());
        }
        let bits = self.header.size.div_ceil(u64::from(stored.granularity));
        // What the image's last cluster of bits has behind them is nobody's.
        let bytes = bits.div_ceil(64) * 8;
        let per_cluster = self.bits_per_cluster();
        let mut index = from / per_cluster;
        let step = STRETCH_BYTES / self.cluster_size();
        while index < entries {
            let count = (entries - index).min(step);
            let table = self.read_bitmap_table(files, stored.table, index, count)?;
            let Some(first) = table.iter().position(|raw| *raw != 0) else {
                index += count;
                continue;
            };
            let last = table.iter().rposition(|raw| *raw != 0).unwrap_or(first);
            let start = (index + first as u64) << self.header.cluster_bits;
            let end = (index + last as u64 + 1) << self.header.cluster_bits;
            let mut data = vec![0; (end.min(bytes) - start) as usize];
            let pieces = data.chunks_mut(self.cluster_size() as usize);
            for (&raw, piece) in table[first..=last].iter().zip(pieces) {
                let offset = raw & OFFSET_MASK;
                let known = if offset == 0 { ALL_ONES } else { OFFSET_MASK };
                let end = offset.saturating_add(self.cluster_size());
                let inside = end <= self.rounded_len(files)?;
                if raw & !known != 0 || !offset.is_multiple_of(self.cluster_size()) || !inside {
                    return Err(unreadable());
                }
                match raw {
                    0 => {}
                    ALL_ONES => piece.fill(0xff),
                    _ => files.read_into(IMAGE, offset, piece)?,
                }
            }
            let first = start * 8;
            return Ok(Some(Bits { first, data }));
        }
        Ok(None)
    }

    fn rounded_len(&self, files: &dyn Files) -> Result<u64> {
        let size = files.size(IMAGE)?;
        Ok(size.div_ceil(self.cluster_size()) * self.cluster_size())
    }

    /// Some entries of a table.
    fn read_bitmap_table(
        &self,
        files: &dyn Files,
        table: u64,
        index: u64,
        count: u64,
    ) -> Result<Vec<u64>> {
        let bytes = files.read(IMAGE, table + index * 8, count as usize * 8)?;
        let words = bytes.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_be_bytes(*word)).collect())
    }

    // === new ones ===

    /// May a bitmap like this be kept, too?
    pub(crate) fn may_keep(&self, bitmap: &KeptBitmap, kept: &[String]) -> Result<()> {
        if self.header.version < 3 {
            return Err(Error::unsupported(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        let bits = bitmap.granularity.trailing_zeros() as u8;
        if bits < *GRANULARITY_BITS.start() {
            return Err(Error::invalid("Granularity is under minimum (512 bytes)"));
        }
        if bits > *GRANULARITY_BITS.end() {
            return Err(Error::invalid(
                "Granularity exceeds maximum (2147483648 bytes)",
            ));
        }
        self.check_table_fits(bitmap.granularity)?;
        if bitmap.name.len() > NAME_BYTES_MAX {
            return Err(Error::invalid(format!(
                "Name length exceeds maximum ({NAME_BYTES_MAX} characters)"
            )));
        }
        if kept.len() >= BITMAPS_MAX as usize {
            return Err(Error::new(
                Errno::Efbig,
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        let names = kept.iter().chain([&bitmap.name]);
        let bytes = names.map(|name| (FIXED + name.len()).next_multiple_of(8) as u64);
        if bytes.sum::<u64>() > DIRECTORY_BYTES_MAX {
            return Err(Error::new(
                Errno::Efbig,
                "Not enough space in the bitmap directory",
            ));
        }
        Ok(())
    }

    /// One step towards a header that names this directory; `true`: that was the last one.
    fn put_extension(&mut self, txn: &mut dyn Txn, target: Option<Target>) -> Result<bool> {
        let mut cluster = vec![0; self.cluster_size() as usize];
        txn.read_into(IMAGE, 0, &mut cluster)?;
        let step = extension::step(&cluster, &self.header, target)?;
        for (stage, at, bytes) in &step.writes {
            txn.write(IMAGE, *stage, *at, bytes)?;
            let at = *at as usize;
            cluster[at..at + bytes.len()].copy_from_slice(bytes);
        }
        self.header = crate::header::Header::parse(&cluster)?;
        Ok(step.done)
    }
}

/// For fuzzers: a directory there and back.
pub(crate) fn fuzz_directory(bytes: &[u8]) {
    let Some((&[bits, count], rest)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    if let Ok(entries) = parse(rest, u32::from(count), 9 + u32::from(bits) % 13) {
        let again = serialise(&entries);
        let parsed = parse(&again, u32::from(count), 9 + u32::from(bits) % 13);
        assert_eq!(parsed.ok(), Some(entries));
    }
}

/// For fuzzers: a header on its way to other bitmaps, until it is there.
pub(crate) fn fuzz_extension(bytes: &[u8]) {
    let target = Some(Target {
        count: 1,
        bytes: 32,
        offset: 1 << 20,
    });
    for target in [target, None] {
        let Ok(bits) = crate::header::Header::peek_cluster_bits(bytes) else {
            return;
        };
        let mut cluster = bytes.to_vec();
        cluster.resize(1 << bits, 0);
        let before = cluster.clone();
        for _ in 0..4 {
            let Ok(header) = crate::header::Header::parse(&cluster) else {
                return;
            };
            let Ok(step) = extension::step(&cluster, &header, target) else {
                break;
            };
            for (_, at, bytes) in &step.writes {
                cluster[*at as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            if step.done {
                break;
            }
        }
        let others = |header: crate::header::Header| {
            let mut all = header.extensions;
            all.retain(|it| !matches!(it, Extension::Bitmaps { .. }));
            (header.backing_file, all)
        };
        let kept = crate::header::Header::parse(&cluster).map(others);
        let before = crate::header::Header::parse(&before).map(others);
        assert_eq!(kept.ok(), before.ok());
    }
}
