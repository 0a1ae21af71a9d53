//! The second walk through the tables: COPIED flags against the refcounts that
//! are stored by now, and entries that are mended.
//!
//! A flag says that a refcount is exactly one, and counts only in what the
//! active L1 table reaches. In a table whose cluster is used for something else
//! too nothing is mended, because that would damage the other use.

use outport_sdk::{Result, Stage, Txn};

use super::mapping::entries;
use super::{Check, L1, Phase, STEP_ENTRIES};
use crate::pages::IMAGE;
use crate::table::COPIED;

impl Check {
    /// L1 entries from `index` up to and with the first that has a table.
    pub(super) fn check_flags(
        &mut self,
        txn: &mut dyn Txn,
        table: usize,
        index: u64,
    ) -> Result<Phase> {
        let Some(l1) = self.tables.get(table).copied() else {
            return Ok(Phase::Finish);
        };
        let next_table = Phase::Flags {
            table: table + 1,
            index: 0,
        };
        let inactive_is_needless = !l1.active && !self.fix.errors;
        if inactive_is_needless || self.exceeds(l1.offset, l1.entries * 8) {
            return Ok(next_table);
        }
        let end = l1.entries.min(index.saturating_add(STEP_ENTRIES));
        for index in index..end {
            let raw = self.read_l1(txn.files(), l1, index)?;
            if raw == 0 {
                continue;
            }
            if let Some(offset) = self.check_l1_entry(txn, l1, index, raw)? {
                self.check_l2_flags(txn, offset, index, l1.active)?;
                return Ok(Phase::Flags {
                    table,
                    index: index + 1,
                });
            }
        }
        Ok(if end < l1.entries {
            Phase::Flags { table, index: end }
        } else {
            next_table
        })
    }

    /// One L1 entry; the L2 table that can be gone through.
    fn check_l1_entry(
        &mut self,
        txn: &mut dyn Txn,
        l1: L1,
        index: u64,
        raw: u64,
    ) -> Result<Option<u64>> {
        let mut verdict = self.judge().l1(raw);
        let mut entry = raw;
        if let Some(mended) = verdict.mended.filter(|_| self.fix.errors) {
            entry = mended;
            verdict = self.judge().l1(entry);
        }
        if let Some(offset) = verdict.flagged.filter(|_| l1.active) {
            let refcount = self.stored(txn.files(), offset >> self.header.cluster_bits)?;
            entry = self.check_flag(entry, refcount, true, || {
                format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} \
                     refcount={refcount}"
                )
            });
        }
        if entry != raw {
            let at = l1.offset.saturating_add(index.saturating_mul(8));
            txn.write(IMAGE, Stage::Mapping, at, &entry.to_be_bytes())?;
            self.wrote = true;
        }
        let aligned = |offset: &u64| offset & (self.header.cluster_size() - 1) == 0;
        Ok(verdict.region.map(|(offset, _)| offset).filter(aligned))
    }

    /// The entries of one L2 table.
    fn check_l2_flags(
        &mut self,
        txn: &mut dyn Txn,
        offset: u64,
        index: u64,
        active: bool,
    ) -> Result<()> {
        let old = self.read_table(txn.files(), offset)?;
        let mut new = old.clone();
        let entry_size = self.coding.entry_size();
        let own = self.own_table(offset);
        let slots = new.chunks_exact_mut(usize::try_from(entry_size).unwrap_or(8));
        for ((raw, at), slot) in entries(&old, entry_size).zip(0_u64..).zip(slots) {
            if raw == [0, 0] {
                continue;
            }
            let guest = self.guest_offset(index, at);
            let mut verdict = self.judge().l2(raw, guest);
            let mut entry = raw;
            if let Some(mended) = verdict.mended.filter(|_| self.fix.errors) {
                if own {
                    entry = mended;
                    verdict = self.judge().l2(entry, guest);
                } else {
                    // The count took it for mended.
                    let faults = verdict.faults.len() as u64;
                    self.report.corruptions_fixed =
                        self.report.corruptions_fixed.saturating_sub(faults);
                }
            }
            if let Some(offset) = verdict.flagged.filter(|_| active) {
                // A cluster of a data file counts as one by definition.
                let refcount = match self.header.has_data_file() {
                    true => 1,
                    false => self.stored(txn.files(), offset >> self.header.cluster_bits)?,
                };
                entry[0] = self.check_flag(entry[0], refcount, own, || {
                    format!(
                        "OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                        raw[0]
                    )
                });
            }
            if entry != raw {
                let words = [entry[0].to_be_bytes(), entry[1].to_be_bytes()];
                let bytes = words.as_flattened();
                slot.iter_mut()
                    .zip(bytes)
                    .for_each(|(to, from)| *to = *from);
            }
        }
        self.write_pieces(txn, Stage::Mapping, offset, &old, &new)
    }

    /// Compare the flag of `entry` with the refcount of what it names; the entry
    /// with the flag as it is to be.
    fn check_flag(
        &mut self,
        entry: u64,
        refcount: u64,
        mendable: bool,
        words: impl FnOnce() -> String,
    ) -> u64 {
        if (refcount == 1) == (entry & COPIED != 0) {
            return entry;
        }
        let fix = self.fix.errors && mendable;
        let prefix = if fix { "Repairing" } else { "ERROR" };
        self.corruption(u64::from(fix), || format!("{prefix} {}", words()));
        if fix { entry ^ COPIED } else { entry }
    }
}
