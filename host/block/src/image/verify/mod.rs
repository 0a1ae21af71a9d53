//! The host believes no plugin: every answer is checked before it is used.
//!
//! Owned by the node's plugin lock. Knows which file ranges hold metadata (a
//! plugin wrote them), which are mapped for writing in place and by which guest
//! range, and which were freed and are not given back yet. A check changes
//! nothing: it gives [`Claims`], which [`Verifier::adopt`] takes once the whole
//! answer was believed. Invariant: no two guest ranges that the extent map holds
//! are in place on the same byte, and none of them touches metadata.

mod claims;
mod extents;
pub(crate) mod fuzzing;
mod image;
mod placements;
mod ranges;
#[cfg(test)]
mod tests;
mod transaction;

use crate::ByteRange;
use crate::format::{Fault, FaultKind, Geometry, SlotRange};

pub(crate) use claims::Claims;
pub(crate) use image::{children, geometry};

pub(super) use ranges::Intervals;
use ranges::Owners;

/// What is known of one file.
#[derive(Debug, Default)]
struct SlotFacts {
    metadata: Intervals,
    owners: Owners,
    freed: Intervals,
}

/// The verifier of one image.
#[derive(Debug)]
pub(crate) struct Verifier {
    slots: Vec<SlotFacts>,
    unit: u64,
    cluster: u64,
    size: u64,
}

/// What a transaction turns into metadata, by slot.
#[derive(Debug, Default)]
pub(crate) struct Pending(Vec<Intervals>);

fn bad(message: String) -> Fault {
    Fault {
        kind: FaultKind::BadExtent,
        message,
    }
}

fn bad_answer(message: String) -> Fault {
    Fault {
        kind: FaultKind::BadAnswer,
        message,
    }
}

impl Verifier {
    /// For `slots` files and a verified geometry.
    pub(crate) fn new(slots: usize, g: &Geometry) -> Self {
        Self {
            slots: (0..slots).map(|_| SlotFacts::default()).collect(),
            unit: u64::from(g.unit),
            cluster: u64::from(g.cluster_size),
            size: g.size,
        }
    }

    /// The image has another length now.
    pub(crate) fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// The range holds nothing any more, and may be used again.
    pub(crate) fn released(&mut self, freed: SlotRange) {
        if let Some(facts) = self.slots.get_mut(freed.slot as usize) {
            facts.metadata.remove(freed.range);
            facts.owners.remove(freed.range);
            facts.freed.remove(freed.range);
        }
    }

    /// Nobody holds this file range in place any more: the extent map evicted
    /// it, or a placement came to nothing.
    pub(crate) fn disown(&mut self, slot: u32, range: ByteRange) {
        if let Some(facts) = self.slots.get_mut(slot as usize) {
            facts.owners.remove(range);
        }
    }

    /// The extent map forgot everything of this guest range, which is rare:
    /// looks at all that is owned.
    pub(crate) fn evict(&mut self, guest: ByteRange) {
        for facts in &mut self.slots {
            facts.owners.evict(guest);
        }
    }

    fn slot(&self, slot: u32) -> Result<&SlotFacts, Fault> {
        let count = self.slots.len();
        self.slots
            .get(slot as usize)
            .ok_or_else(|| bad(format!("slot {slot} was not granted, there are {count}")))
    }

    /// The answer was believed and its transaction queued.
    pub(crate) fn adopt(&mut self, pending: &Pending, claims: Claims) {
        for (facts, ranges) in self.slots.iter_mut().zip(&pending.0) {
            for range in ranges.iter() {
                facts.metadata.add(range);
            }
        }
        for (slot, file, guest) in claims.0 {
            if let Some(facts) = self.slots.get_mut(slot as usize) {
                facts.owners.add(file, guest);
            }
        }
    }

    /// The range waits for its unmapping to be durable.
    pub(crate) fn freed(&mut self, freed: SlotRange) {
        if let Some(facts) = self.slots.get_mut(freed.slot as usize) {
            facts.freed.add(freed.range);
        }
    }
}
