//! Where a plugin says that guest bytes are.

use crate::ByteRange;
use crate::format::{Extent, Fault, Location};

use super::{Claims, Pending, Verifier, bad};

/// A decoded unit is kept in memory, so it has a limit; qcow2's largest
/// cluster.
const UNIT_LEN_MAX: u32 = 2 << 20;

/// Stored bytes of a unit: incompressible data may grow a little.
const STORED_LEN_MAX: u32 = UNIT_LEN_MAX + (64 << 10);

impl Verifier {
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
}
