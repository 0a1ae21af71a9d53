//! Counting what the bitmaps extension refers to: the directory, the tables and
//! their clusters (qcow2.rst: Bitmaps).
//!
//! Only while the autoclear bit says that the extension is consistent: if it is
//! not, its clusters are nobody's.

use outport_sdk::{Files, Reader, Result};

use super::counts::Kind;
use super::{Check, Phase};
use crate::bitmaps::{BITMAPS_MAX, DIRECTORY_BYTES_MAX, FIXED as ENTRY_BYTES};
use crate::pages::IMAGE;
use crate::table::OFFSET_MASK;

/// Bit 0 of a table entry without a cluster: all ones.
const ALL_ONES: u64 = 1;

/// Where the count stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BitmapCursor {
    /// Directory entries done, and their bytes.
    bitmap: u32,
    directory_at: u64,
    /// The table of the current bitmap: offset, entries, entries done.
    table: Option<(u64, u64, u64)>,
}

impl Check {
    pub(super) fn count_bitmaps(
        &mut self,
        files: &dyn Files,
        cursor: BitmapCursor,
    ) -> Result<Phase> {
        let Some((count, len, directory)) = self.header.active_bitmaps() else {
            return Ok(self.counted());
        };
        if cursor.bitmap == 0 && cursor.table.is_none() {
            if count > BITMAPS_MAX || len > DIRECTORY_BYTES_MAX {
                self.found(1, || {
                    format!("ERROR bitmap directory: {count} bitmaps, {len} bytes")
                });
                return Ok(self.counted());
            }
            if !self.count(directory, len, Kind::Other) {
                return Ok(self.counted());
            }
        }
        if let Some((table, entries, done)) = cursor.table {
            let done = self.count_bitmap_table(files, table, entries, done)?;
            let table = (done < entries).then_some((table, entries, done));
            return Ok(Phase::Bitmaps(BitmapCursor { table, ..cursor }));
        }
        if cursor.bitmap >= count {
            return Ok(self.counted());
        }
        self.count_directory_entry(files, cursor, directory, len)
    }

    fn count_directory_entry(
        &mut self,
        files: &dyn Files,
        cursor: BitmapCursor,
        directory: u64,
        len: u64,
    ) -> Result<Phase> {
        let at = directory.saturating_add(cursor.directory_at);
        let entry = files.read(IMAGE, at, ENTRY_BYTES)?;
        let mut r = Reader::new(&entry);
        let (offset, entries) = (r.be_u64()?, u64::from(r.be_u32()?));
        r.skip(6)?;
        let (name_len, extra_len) = (u64::from(r.be_u16()?), u64::from(r.be_u32()?));
        let entry_len = (ENTRY_BYTES as u64 + name_len + extra_len).next_multiple_of(8);
        let next = cursor.directory_at.saturating_add(entry_len);
        if next > len || offset & (self.header.cluster_size() - 1) != 0 {
            let number = cursor.bitmap;
            self.found(1, || {
                format!("ERROR bitmap directory entry {number} is corrupt")
            });
            return Ok(self.counted());
        }
        let counted = self.count(offset, entries * 8, Kind::Other);
        Ok(Phase::Bitmaps(BitmapCursor {
            bitmap: cursor.bitmap.saturating_add(1),
            directory_at: next,
            table: (counted && entries > 0).then_some((offset, entries, 0)),
        }))
    }

    /// Count table entries from `done` on; how many are done then.
    fn count_bitmap_table(
        &mut self,
        files: &dyn Files,
        table: u64,
        entries: u64,
        done: u64,
    ) -> Result<u64> {
        let chunk = self.read_words(files, table, done, entries)?;
        for &raw in &chunk {
            let offset = raw & OFFSET_MASK;
            let known = if offset == 0 { ALL_ONES } else { OFFSET_MASK };
            if raw & !known != 0 {
                self.found(1, || {
                    format!("ERROR found bitmap table entry with reserved bits set: {raw:x}")
                });
            } else if offset != 0 {
                self.count(offset, self.header.cluster_size(), Kind::Other);
            }
        }
        Ok(done.saturating_add(chunk.len() as u64))
    }
}
