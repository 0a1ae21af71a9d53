//! Space that a plugin offers for writes.

use crate::ByteRange;
use crate::format::{Fault, Placement, WriteIntent, WriteKind};

use super::ranges::Intervals;
use super::{Claims, Pending, Verifier, bad};

impl Verifier {
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
