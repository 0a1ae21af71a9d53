//! Counting what the L1 and L2 tables refer to, one L1 entry with its L2 table
//! a step.

use outport_sdk::{Files, Result};

use super::bitmaps::BitmapCursor;
use super::counts::Kind;
use super::entry::{Class, Judge, Verdict};
use super::{CHUNK_BYTES, Check, L1, Phase, STEP_ENTRIES};
use crate::pages::IMAGE;
use crate::table::RawEntry;

impl Check {
    pub(super) fn judge(&self) -> Judge {
        Judge::new(&self.header, self.file_len)
    }

    /// Count L1 entries from `index` up to and with the first that has a table.
    pub(super) fn count_l1(
        &mut self,
        files: &dyn Files,
        table: usize,
        index: u64,
    ) -> Result<Phase> {
        let Some(l1) = self.tables.get(table).copied() else {
            return Ok(Phase::Bitmaps(BitmapCursor::default()));
        };
        let next_table = Phase::Mapping {
            table: table + 1,
            index: 0,
        };
        if index == 0 && !self.count(l1.offset, l1.entries * 8, Kind::Other) {
            return Ok(next_table);
        }
        let end = l1.entries.min(index.saturating_add(STEP_ENTRIES));
        for index in index..end {
            let raw = self.read_l1(files, l1, index)?;
            if raw == 0 {
                continue;
            }
            let verdict = self.judge().l1(raw);
            let (verdict, fixed) = self.settle(verdict, |judge, mended| judge.l1(mended));
            self.note(&verdict.faults, fixed);
            let Some((offset, len)) = verdict.region else {
                continue;
            };
            self.count(offset, len, Kind::L2Table);
            // A table that is not aligned cannot be used: what it would refer
            // to stays uncounted.
            if offset & (len - 1) == 0 {
                self.count_l2(files, offset, index, l1.active)?;
            }
            return Ok(Phase::Mapping {
                table,
                index: index + 1,
            });
        }
        Ok(if end < l1.entries {
            Phase::Mapping { table, index: end }
        } else {
            next_table
        })
    }

    pub(super) fn read_l1(&mut self, files: &dyn Files, l1: L1, index: u64) -> Result<u64> {
        self.examined += 8;
        self.pages
            .read_u64(files, l1.offset.saturating_add(index.saturating_mul(8)))
    }

    /// Count what the L2 table at `offset`, the one of L1 entry `index`, refers to.
    fn count_l2(&mut self, files: &dyn Files, offset: u64, index: u64, active: bool) -> Result<()> {
        let table = self.read_table(files, offset)?;
        let mut contiguous = 0;
        for (raw, at) in entries(&table, self.coding.entry_size()).zip(0_u64..) {
            if raw == [0, 0] {
                continue;
            }
            let verdict = self.judge().l2(raw, self.guest_offset(index, at));
            if active && self.first_pass() {
                self.tally(verdict.class, &mut contiguous);
            }
            let (verdict, fixed) = self.settle(verdict, |judge, mended| judge.l2(mended, 0));
            self.note(&verdict.faults, fixed);
            if let Some((offset, len)) = verdict.region {
                self.count(offset, len, Kind::Data);
            }
        }
        Ok(())
    }

    /// The verdict whose references count: if errors are mended, that of the
    /// mended entry, with the faults of the entry as it is.
    fn settle<T: Copy>(
        &self,
        verdict: Verdict<T>,
        again: impl FnOnce(Judge, T) -> Verdict<T>,
    ) -> (Verdict<T>, bool) {
        match verdict.mended {
            Some(mended) if self.fix.errors => {
                let after = again(self.judge(), mended);
                (
                    Verdict {
                        faults: verdict.faults,
                        ..after
                    },
                    true,
                )
            }
            _ => (verdict, false),
        }
    }

    /// Report faults; the flags phase will mend them if `fixed`.
    fn note(&mut self, faults: &[String], fixed: bool) {
        if self.first_pass() {
            for fault in faults {
                self.corruption(u64::from(fixed), || fault.clone());
            }
        }
    }

    fn tally(&mut self, class: Class, contiguous: &mut u64) {
        match class {
            Class::None => {}
            Class::Compressed => {
                // Packed without regard to clusters, and so always in fragments.
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += 1;
                self.report.fragmented_clusters += 1;
            }
            Class::Standard(offset) => {
                self.report.allocated_clusters += 1;
                if *contiguous != 0 && *contiguous != offset {
                    self.report.fragmented_clusters += 1;
                }
                *contiguous = offset.saturating_add(self.header.cluster_size());
            }
        }
    }

    /// Guest offset of entry `at` of the L2 table of L1 entry `index`.
    pub(super) fn guest_offset(&self, index: u64, at: u64) -> u64 {
        let cluster = index
            .saturating_mul(self.header.l2_entries())
            .saturating_add(at);
        cluster.saturating_mul(self.header.cluster_size())
    }

    /// Words `index..` of a table of `len` words: as many as one step takes.
    pub(super) fn read_words(
        &mut self,
        files: &dyn Files,
        offset: u64,
        index: u64,
        len: u64,
    ) -> Result<Vec<u64>> {
        let bytes = len.saturating_sub(index).saturating_mul(8).min(CHUNK_BYTES);
        let mut buf = vec![0; usize::try_from(bytes).unwrap_or(0)];
        if !buf.is_empty() {
            let at = offset.saturating_add(index.saturating_mul(8));
            files.read_into(IMAGE, at, &mut buf)?;
        }
        self.examined += bytes;
        Ok(buf
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_be_bytes(*word))
            .collect())
    }

    /// A table of one cluster.
    pub(super) fn read_table(&mut self, files: &dyn Files, offset: u64) -> Result<Vec<u8>> {
        let len = 1_usize << self.header.cluster_bits;
        self.examined += len as u64;
        files.read(IMAGE, offset, len)
    }
}

/// The entries of an L2 table.
pub(super) fn entries(table: &[u8], entry_size: u64) -> impl Iterator<Item = RawEntry> {
    let words = table.as_chunks::<8>().0;
    let stride = if entry_size == 16 { 2 } else { 1 };
    words.chunks_exact(stride).map(move |entry| {
        let word = |at: usize| entry.get(at).map_or(0, |word| u64::from_be_bytes(*word));
        [word(0), word(1)]
    })
}
