//! The host believes no plugin: every answer is checked before it is used.
//!
//! Owned by the node's plugin lock. Knows which file ranges hold metadata (a
//! plugin wrote them), which are mapped for writing in place and by which guest
//! range, and which were freed and are not given back yet. A check changes
//! nothing: it gives [`Claims`], which [`Verifier::adopt`] takes once the whole
//! answer was believed. Invariant: no two guest ranges that the extent map holds
//! are in place on the same byte, and none of them touches metadata.

pub(crate) mod fuzzing;
mod ranges;
#[cfg(test)]
mod tests;

use crate::ByteRange;
use crate::format::{
    Child, ChildKind, Extent, Fault, FaultKind, Geometry, Location, Placement, SlotRange, Stage,
    TxnOp, WriteIntent, WriteKind,
};

use super::files::ZERO_IN_OVERLAY_MAX;
use super::map::SLOTS_MAX;
use super::overlay::PAGE;
use ranges::{Intervals, Owners};

/// Children that an image may ask for.
pub(crate) const CHILDREN_MAX: usize = SLOTS_MAX as usize - 1;

/// A decoded unit is kept in memory, so it has a limit; qcow2's largest
/// cluster.
const UNIT_LEN_MAX: u32 = 2 << 20;

/// Stored bytes of a unit: incompressible data may grow a little.
const STORED_LEN_MAX: u32 = UNIT_LEN_MAX + (64 << 10);

/// Bytes that one call may queue for the overlay, in its pages: the largest table that a
/// format rewrites at once is a qcow2 L1 table of 32 MiB.
const TXN_BYTES_MAX: u64 = 64 << 20;

/// Separate metadata ranges that are remembered per file; honest formats write
/// metadata in clusters, and those of one table touch.
const METADATA_RANGES_MAX: usize = 1 << 20;

/// The largest block that a format allocates at once (VHDX).
const CLUSTER_MAX: u32 = 256 << 20;

/// The largest unit of mapping.
const UNIT_MAX: u32 = 2 << 20;

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

/// File ranges that an answer maps in place, and for which guest offset.
#[derive(Debug, Default)]
pub(crate) struct Claims(Vec<(u32, ByteRange, u64)>);

impl Claims {
    /// Both.
    pub(crate) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

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

/// Is this geometry one that the host can serve?
pub(crate) fn geometry(g: &Geometry) -> Result<(), Fault> {
    let power = |n: u32, max: u32| n.is_power_of_two() && (512..=max).contains(&n);
    let optional = |n: u32| n == 0 || (n.is_power_of_two() && n >= g.unit);
    if g.size > ByteRange::END_MAX - (2 * u64::from(CLUSTER_MAX)) {
        return Err(bad(format!("the size {} is too large", g.size)));
    }
    if !power(g.unit, UNIT_MAX) || !power(g.cluster_size, CLUSTER_MAX) || g.cluster_size < g.unit {
        return Err(bad(format!(
            "unit {} and cluster size {} are not powers of two from 512 to 2 MiB and 256 MiB",
            g.unit, g.cluster_size
        )));
    }
    if !optional(g.zero_granularity) || !optional(g.discard_granularity) {
        return Err(bad(
            "a zero or discard granularity is no power of two".to_owned()
        ));
    }
    Ok(())
}

/// Are these children ones that the host can grant?
pub(crate) fn children(list: &[Child]) -> Result<(), Fault> {
    if list.len() > CHILDREN_MAX {
        return Err(bad(format!(
            "{} children, at most {CHILDREN_MAX} are possible",
            list.len()
        )));
    }
    let backings = list.iter().filter(|c| c.kind == ChildKind::Backing);
    if backings.count() > 1 {
        return Err(bad("more than one backing child".to_owned()));
    }
    for (i, child) in list.iter().enumerate() {
        if list[..i].iter().any(|c| c.id == child.id) {
            return Err(bad(format!("two children are called '{}'", child.id)));
        }
    }
    Ok(())
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

    // === transactions ===

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
        pending.0[slot as usize].add(range);
        if facts.metadata.count() + pending.0[slot as usize].count() > METADATA_RANGES_MAX {
            return Err(bad_answer(format!(
                "metadata of slot {slot} lies in more than {METADATA_RANGES_MAX} places"
            )));
        }
        Ok(())
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

    // === extents ===

    /// Check an answer about `asked`: contiguous, aligned, covering its first
    /// unit, inside the files of `lens` bytes. What it maps in place `near`
    /// becomes claims.
    pub(crate) fn extents(
        &self,
        asked: ByteRange,
        extents: &[Extent],
        near: ByteRange,
        pending: &Pending,
        lens: &dyn Fn(u32) -> u64,
    ) -> Result<Claims, Fault> {
        let Some(first) = extents.first() else {
            return Err(bad(format!("no extent for {asked:?}")));
        };
        if first.range.offset() > asked.offset() {
            return Err(bad(format!(
                "the answer for {asked:?} starts at {:?}",
                first.range
            )));
        }
        let mut claims = Claims::default();
        let mut at = first.range.offset();
        for extent in extents {
            if extent.range.offset() != at || extent.range.is_empty() {
                return Err(bad(format!(
                    "extent {:?} does not follow {at:#x}",
                    extent.range
                )));
            }
            at = extent.range.end();
            if at > self.size {
                return Err(bad(format!(
                    "extent {:?} passes the end at {:#x}",
                    extent.range, self.size
                )));
            }
            let end_aligned = at.is_multiple_of(self.unit) || at == self.size;
            if !extent.range.offset().is_multiple_of(self.unit) || !end_aligned {
                return Err(bad(format!(
                    "extent {:?} is not aligned to {} bytes",
                    extent.range, self.unit
                )));
            }
            self.location(extent, near, lens, &mut claims)?;
        }
        if at <= asked.offset() {
            return Err(bad(format!("the answer for {asked:?} ends at {at:#x}")));
        }
        self.claimable(&mut claims, pending)?;
        Ok(claims)
    }

    fn location(
        &self,
        extent: &Extent,
        near: ByteRange,
        lens: &dyn Fn(u32) -> u64,
        claims: &mut Claims,
    ) -> Result<(), Fault> {
        match extent.at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => {
                let Some(file) = ByteRange::new(offset, extent.range.len()) else {
                    return Err(bad(format!("file offset {offset:#x} overflows")));
                };
                self.inside(slot, file, lens)?;
                if let Some(part) = extent.range.intersect(near).filter(|_| in_place) {
                    let at = offset + (part.offset() - extent.range.offset());
                    let file = ByteRange::between(at, at + part.len());
                    claims.0.push((slot, file, part.offset()));
                }
                Ok(())
            }
            Location::Coded(c) => {
                let Some(file) = ByteRange::new(c.offset, 1) else {
                    return Err(bad(format!("file offset {:#x} overflows", c.offset)));
                };
                self.inside(c.slot, file, lens)?;
                let unit = ByteRange::new(c.unit_offset, u64::from(c.unit_len));
                if c.unit_len > UNIT_LEN_MAX
                    || c.stored_len > STORED_LEN_MAX
                    || c.unit_offset >= 1 << 56
                    || !unit.is_some_and(|u| u.contains(extent.range))
                {
                    return Err(bad(format!("compressed unit {c:?} cannot hold {extent:?}")));
                }
                Ok(())
            }
            Location::Special(id) if id >= 1 << 56 => {
                Err(bad(format!("special id {id:#x} is larger than 56 bits")))
            }
            Location::Backing(offset) => match ByteRange::new(offset, extent.range.len()) {
                Some(r) if r.end() < 1 << 56 => Ok(()),
                _ => Err(bad(format!("backing offset {offset:#x} overflows"))),
            },
            Location::Special(_) | Location::Zero | Location::Hole => Ok(()),
        }
    }

    /// An extent must begin inside the file; a cluster at its end may be partly
    /// written only.
    fn inside(&self, slot: u32, file: ByteRange, lens: &dyn Fn(u32) -> u64) -> Result<(), Fault> {
        self.slot(slot)?;
        let len = lens(slot);
        let end = len.min(ByteRange::END_MAX).next_multiple_of(self.cluster);
        if file.end() > end.saturating_add(self.cluster) || file.offset() >= end.max(1) {
            return Err(bad(format!(
                "{file:?} is outside of slot {slot}, which has {len} bytes"
            )));
        }
        if file.end() >= 1 << 56 {
            return Err(bad(format!(
                "file offset {:#x} is larger than 56 bits",
                file.end()
            )));
        }
        Ok(())
    }

    /// No claim may touch metadata, freed space, what another guest range owns,
    /// or another claim of the same answer.
    fn claimable(&self, claims: &mut Claims, pending: &Pending) -> Result<(), Fault> {
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

    // === placements ===

    /// Check space offered for writes; plain ones become claims.
    pub(crate) fn placements(
        &self,
        intents: &[WriteIntent],
        placements: &[Placement],
        pending: &Pending,
        is_taken: &dyn Fn(u64) -> bool,
    ) -> Result<Claims, Fault> {
        let mut claims = Claims::default();
        let mut packed = Vec::new();
        for (i, p) in placements.iter().enumerate() {
            let Some(intent) = intents.get(p.intent as usize) else {
                return Err(bad(format!(
                    "placement for intent {} of {}",
                    p.intent,
                    intents.len()
                )));
            };
            let locked = intent.range.align_out(self.cluster);
            if !locked.contains(p.covers) || !p.covers.overlaps(intent.range) {
                return Err(bad(format!(
                    "placement covers {:?}, the intent was {:?}",
                    p.covers, intent.range
                )));
            }
            if is_taken(p.token) || placements[..i].iter().any(|q| q.token == p.token) {
                return Err(bad(format!("token {} was given out twice", p.token)));
            }
            match intent.kind {
                WriteKind::Data => claims.0.push(self.placement(p)?),
                WriteKind::Compressed => packed.push(self.compressed(p, intent, pending)?),
            }
        }
        self.claimable(&mut claims, pending)?;
        self.alone(&claims, &packed)?;
        Ok(claims)
    }

    fn placement(&self, p: &Placement) -> Result<(u32, ByteRange, u64), Fault> {
        self.slot(p.slot)?;
        let aligned = p.covers.offset().is_multiple_of(self.unit)
            && (p.covers.end().is_multiple_of(self.unit) || p.covers.end() == self.size);
        let file = ByteRange::new(p.offset, p.covers.len()).filter(|f| f.end() < 1 << 56);
        let Some(file) = file.filter(|_| aligned && !p.covers.is_empty()) else {
            return Err(bad(format!("placement {p:?} is not aligned or overflows")));
        };
        Ok((p.slot, file, p.covers.offset()))
    }

    /// Compressed units lie side by side anywhere, but on nothing else.
    fn compressed(
        &self,
        p: &Placement,
        intent: &WriteIntent,
        pending: &Pending,
    ) -> Result<(u32, ByteRange), Fault> {
        let facts = self.slot(p.slot)?;
        let file = ByteRange::new(p.offset, u64::from(intent.stored_len));
        let Some(file) = file.filter(|f| f.end() < 1 << 56) else {
            return Err(bad(format!("placement {p:?} overflows")));
        };
        let queued = pending.0[p.slot as usize].overlapping(file);
        let metadata = facts.metadata.overlapping(file).or(queued);
        let taken = metadata
            .or_else(|| facts.owners.overlapping(file).map(|(at, _)| at))
            .or_else(|| facts.freed.overlapping(file));
        match taken {
            None => Ok((p.slot, file)),
            Some(at) => Err(bad(format!(
                "compressed data at {file:?} of slot {} overlaps {at:?}, which is in use",
                p.slot
            ))),
        }
    }

    /// Compressed units share no byte with each other, nor with claims of the same answer.
    fn alone(&self, claims: &Claims, packed: &[(u32, ByteRange)]) -> Result<(), Fault> {
        if packed.is_empty() {
            return Ok(());
        }
        let mut taken: Vec<_> = self.slots.iter().map(|_| Intervals::default()).collect();
        for (slot, file, _) in &claims.0 {
            taken[*slot as usize].add(*file);
        }
        for (slot, file) in packed {
            let taken = &mut taken[*slot as usize];
            if let Some(at) = taken.overlapping(*file) {
                return Err(bad(format!(
                    "compressed data at {file:?} of slot {slot} overlaps {at:?} of the same answer"
                )));
            }
            taken.add(*file);
        }
        Ok(())
    }
}

fn double(slot: u32, file: ByteRange, guest: u64, owner: u64) -> Fault {
    bad(format!(
        "{file:?} of slot {slot} is mapped for guest offset {guest:#x} and for {owner:#x}"
    ))
}
