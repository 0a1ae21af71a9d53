//! What a call queued: where metadata may lie, and how much of it.

use crate::ByteRange;
use crate::format::{Fault, Stage, TxnOp};

use super::super::files::ZERO_IN_OVERLAY_MAX;
use super::super::overlay::PAGE;
use super::ranges::Intervals;
use super::{Pending, Verifier, bad, bad_answer};

/// Bytes that one call may queue for the overlay, in its pages: the largest table that a
/// format rewrites at once is a qcow2 L1 table of 32 MiB.
const TXN_BYTES_MAX: u64 = 64 << 20;

/// Separate metadata ranges that are remembered per file; honest formats write
/// metadata in clusters, and those of one table touch.
const METADATA_RANGES_MAX: usize = 1 << 20;

impl Verifier {
    /// Check what a call queued.
    pub(crate) fn transaction(&self, txn: &[TxnOp]) -> Result<Pending, Fault> {
        let mut pending = Pending(
            (0..self.slots.len())
                .map(|_| Intervals::default())
                .collect(),
        );
        let mut bytes: u64 = 0;
        for op in txn {
            match op {
                TxnOp::Write {
                    slot, offset, data, ..
                } => {
                    let len = data.len() as u64;
                    let range = ByteRange::new(*offset, len).ok_or_else(|| {
                        bad_answer(format!("a metadata write at {offset:#x} overflows"))
                    })?;
                    self.metadata(*slot, range, &mut pending)?;
                    bytes = bytes.saturating_add(range.align_out(PAGE).len());
                }
                TxnOp::Zero { slot, stage, range } => {
                    self.metadata(*slot, *range, &mut pending)?;
                    // Large ones of the prepare stage are not kept in memory.
                    let kept = match stage {
                        Stage::Prepare => range.len().min(ZERO_IN_OVERLAY_MAX),
                        Stage::Mapping => range.len(),
                    };
                    bytes = bytes.saturating_add(kept.next_multiple_of(PAGE));
                }
                TxnOp::Grow { slot, size } | TxnOp::Truncate { slot, size } => {
                    self.slot(*slot)?;
                    if *size > ByteRange::END_MAX {
                        return Err(bad_answer(format!("a file of {size} bytes is impossible")));
                    }
                }
                TxnOp::Free(freed) => {
                    self.slot(freed.slot)?;
                }
            }
        }
        if bytes > TXN_BYTES_MAX {
            return Err(bad_answer(format!(
                "one call queued {bytes} bytes of metadata, at most {TXN_BYTES_MAX} are possible"
            )));
        }
        Ok(pending)
    }

    /// A plugin writes metadata here.
    fn metadata(&self, slot: u32, range: ByteRange, pending: &mut Pending) -> Result<(), Fault> {
        let facts = self.slot(slot)?;
        if let Some((at, guest)) = facts.owners.overlapping(range) {
            return Err(bad(format!(
                "metadata written at {range:?} of slot {slot} overlaps guest data at {at:?} \
                 (guest offset {guest:#x})"
            )));
        }
        if let Some(at) = facts.freed.overlapping(range) {
            return Err(bad(format!(
                "metadata written at {range:?} of slot {slot} overlaps {at:?}, which was freed \
                 and not given back yet"
            )));
        }
        pending.0[slot as usize].add(range);
        if facts.metadata.count() + pending.0[slot as usize].count() > METADATA_RANGES_MAX {
            return Err(bad_answer(format!(
                "metadata of slot {slot} lies in more than {METADATA_RANGES_MAX} places"
            )));
        }
        Ok(())
    }
}
