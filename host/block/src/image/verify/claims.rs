//! What is in place is there for one guest range only, and on nothing else.

use crate::ByteRange;
use crate::format::Fault;

use super::{Pending, Verifier, bad};

/// File ranges that an answer maps in place, and for which guest offset.
#[derive(Debug, Default)]
pub(crate) struct Claims(pub(super) Vec<(u32, ByteRange, u64)>);

impl Claims {
    /// Both.
    pub(crate) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

impl Verifier {
    /// No claim may touch metadata, freed space, what another guest range owns,
    /// or another claim of the same answer.
    pub(super) fn claimable(&self, claims: &mut Claims, pending: &Pending) -> Result<(), Fault> {
        for &(slot, file, guest) in &claims.0 {
            let facts = self.slot(slot)?;
            let queued = pending.0.get(slot as usize);
            let queued = queued.and_then(|p| p.overlapping(file));
            if let Some(at) = facts.metadata.overlapping(file).or(queued) {
                return Err(bad(format!(
                    "guest data at {file:?} of slot {slot} overlaps metadata at {at:?}"
                )));
            }
            if let Some(at) = facts.freed.overlapping(file) {
                return Err(bad(format!(
                    "guest data at {file:?} of slot {slot} overlaps {at:?}, which was freed and \
                     not given back yet"
                )));
            }
            if let Some(owner) = facts.owners.conflict(file, guest) {
                return Err(double(slot, file, guest, owner));
            }
        }
        claims
            .0
            .sort_unstable_by_key(|(slot, file, _)| (*slot, file.offset()));
        let mut far: Option<(u32, ByteRange, u64)> = None;
        for &(slot, file, guest) in &claims.0 {
            if let Some((_, before, owner)) = far.filter(|(s, ..)| *s == slot) {
                let same = guest.wrapping_sub(file.offset()) == owner.wrapping_sub(before.offset());
                if before.end() > file.offset() && !same {
                    return Err(double(slot, file, guest, owner));
                }
            }
            if far.is_none_or(|(s, before, _)| s != slot || file.end() > before.end()) {
                far = Some((slot, file, guest));
            }
        }
        Ok(())
    }
}

fn double(slot: u32, file: ByteRange, guest: u64, owner: u64) -> Fault {
    bad(format!(
        "{file:?} of slot {slot} is mapped for guest offset {guest:#x} and for {owner:#x}"
    ))
}
