//! What the host knows of where guest bytes are, and what it believes.

use super::host::{File, MemoryHost, broken};
use crate::{ByteRange, ChildKind, Extent, Files, Geometry, Granted, Location, Placement, Result};
use std::collections::BTreeMap;

/// The longest decoded unit of a compressed extent.
const CODED_UNIT_MAX: u32 = 2 << 20;

/// Known extents, by guest offset, never overlapping.
#[derive(Clone, Debug, Default)]
pub(super) struct ExtentMap(BTreeMap<u64, Extent>);

impl ExtentMap {
    pub(super) fn find(&self, at: u64) -> Option<Extent> {
        let (_, extent) = self.0.range(..=at).next_back()?;
        (at < extent.range.end()).then_some(*extent)
    }

    /// Replace whatever was known of these ranges.
    pub(super) fn insert(&mut self, extent: Extent) {
        self.forget(extent.range);
        self.0.insert(extent.range.offset, extent);
    }

    pub(super) fn forget(&mut self, range: ByteRange) {
        let before = self.0.range(..range.end()).rev();
        let hits: Vec<Extent> = before
            .map(|(_, e)| *e)
            .take_while(|e| e.range.end() > range.offset)
            .collect();
        for hit in hits {
            self.0.remove(&hit.range.offset);
            if hit.range.offset < range.offset {
                let len = range.offset - hit.range.offset;
                self.0
                    .insert(hit.range.offset, part(hit, hit.range.offset, len));
            }
            if hit.range.end() > range.end() {
                let len = hit.range.end() - range.end();
                self.0.insert(range.end(), part(hit, range.end(), len));
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Extent> {
        self.0.values()
    }
}

/// `extent`, cut to the guest range of `len` bytes at `offset` inside it.
pub(super) fn part(extent: Extent, offset: u64, len: u64) -> Extent {
    let moved = offset - extent.range.offset;
    let at = match extent.at {
        Location::Raw {
            slot,
            offset,
            in_place,
        } => Location::Raw {
            slot,
            offset: offset + moved,
            in_place,
        },
        Location::Backing(offset) => Location::Backing(offset + moved),
        // The decoded unit and the special extent keep their names.
        at => at,
    };
    Extent {
        range: ByteRange::new(offset, len),
        at,
    }
}

/// The bytes of a file that hold a raw extent.
pub(super) fn raw(extent: &Extent) -> Option<(u32, ByteRange, bool)> {
    match extent.at {
        Location::Raw {
            slot,
            offset,
            in_place,
        } => Some((slot, ByteRange::new(offset, extent.range.len), in_place)),
        _ => None,
    }
}

pub(super) const fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.offset < b.end() && b.offset < a.end()
}

/// What answers are judged by.
pub(super) struct Judge<'a> {
    pub(super) host: &'a MemoryHost,
    pub(super) geometry: &'a Geometry,
    pub(super) known: &'a ExtentMap,
    pub(super) writable: bool,
}

impl Judge<'_> {
    /// The shape of an answer of `resolve`; [`Judge::one`] judges each extent.
    pub(super) fn resolved(&self, asked: ByteRange, extents: &[Extent]) -> Result<()> {
        let size = self.geometry.size;
        let first = extents
            .first()
            .ok_or_else(|| broken("resolve returned no extent"))?;
        let need = asked.offset + u64::from(self.geometry.unit).min(asked.len);
        let end = extents.last().map_or(0, |e| e.range.end());
        if first.range.offset > asked.offset || end < need.min(size) || end > size {
            return Err(broken(format!(
                "resolve of {asked:?} returned {:?} to {end} of {size}",
                first.range.offset
            )));
        }
        for pair in extents.windows(2) {
            if pair[0].range.end() != pair[1].range.offset {
                return Err(broken(format!("{pair:?} are not contiguous")));
            }
        }
        Ok(())
    }

    /// New extents of exactly `covered`, which is sorted.
    pub(super) fn exactly(&self, covered: &[ByteRange], extents: &[Extent]) -> Result<()> {
        let mut got: Vec<ByteRange> = extents.iter().map(|e| e.range).collect();
        got.sort_by_key(|r| r.offset);
        if joined(covered) != joined(&got) {
            return Err(broken(format!("extents of {got:?} instead of {covered:?}")));
        }
        extents.iter().try_for_each(|e| self.one(e))
    }

    /// One extent: aligned, inside its file, no metadata, not shared in place.
    pub(super) fn one(&self, extent: &Extent) -> Result<()> {
        let Extent { range, at } = *extent;
        let (unit, size) = (u64::from(self.geometry.unit), self.geometry.size);
        let aligned = |at: u64| at.is_multiple_of(unit) || at == size;
        if range.len == 0 || !aligned(range.offset) || !aligned(range.end()) || range.end() > size {
            return Err(broken(format!(
                "{extent:?} does not keep to the unit {unit}"
            )));
        }
        match at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => {
                let bytes = ByteRange::new(offset, range.len);
                self.inside(slot, bytes, extent)?;
                self.bytes(slot, bytes, extent)?;
                if in_place {
                    self.in_place(extent)?;
                }
            }
            Location::Coded {
                slot,
                offset,
                unit_offset,
                unit_len,
                ..
            } => {
                if offset >= self.host.size(slot)? {
                    return Err(broken(format!("{extent:?} starts outside its file")));
                }
                let unit = ByteRange::new(unit_offset, unit_len.into());
                let inside = unit.offset <= range.offset && range.end() <= unit.end();
                if unit_len > CODED_UNIT_MAX || !inside {
                    return Err(broken(format!("{extent:?} does not lie in its unit")));
                }
            }
            Location::Backing(_) if self.host.backing.is_none() => {
                return Err(broken(format!("{extent:?}, but there is no backing image")));
            }
            _ => {}
        }
        Ok(())
    }

    /// An extent begins inside its file; a cluster at the end may be there in
    /// part only.
    fn inside(&self, slot: u32, bytes: ByteRange, what: &Extent) -> Result<()> {
        let file_len = self.host.size(slot)?;
        let cluster = u64::from(self.geometry.cluster_size);
        let end = file_len.next_multiple_of(cluster);
        if bytes.offset >= end.max(1) || bytes.end() > end.saturating_add(cluster) {
            return Err(broken(format!(
                "{what:?} lies outside its file of {file_len} bytes"
            )));
        }
        Ok(())
    }

    /// Payload bytes: not metadata, not freed.
    fn bytes(&self, slot: u32, bytes: ByteRange, what: &dyn std::fmt::Debug) -> Result<()> {
        let file = self.host.file(slot)?;
        if file.metadata.touches(bytes) {
            return Err(broken(format!("{what:?} overlaps metadata")));
        }
        if file.quarantine.touches(bytes) {
            return Err(broken(format!("{what:?} uses freed bytes")));
        }
        Ok(())
    }

    /// No two guest ranges in place on the same bytes.
    fn in_place(&self, extent: &Extent) -> Result<()> {
        if !self.writable {
            return Err(broken(format!(
                "{extent:?} is in place in a read-only image"
            )));
        }
        let Some((slot, bytes, _)) = raw(extent) else {
            return Ok(());
        };
        for other in self
            .known
            .iter()
            .filter(|o| !overlap(o.range, extent.range))
        {
            if let Some((s, b, true)) = raw(other)
                && s == slot
                && overlap(b, bytes)
            {
                return Err(broken(format!(
                    "{extent:?} and {other:?} share bytes in place"
                )));
            }
        }
        Ok(())
    }

    /// A reservation for `rest`, the part of an intent that is still open.
    pub(super) fn placement(
        &self,
        rest: ByteRange,
        stored: Option<u32>,
        p: &Placement,
    ) -> Result<()> {
        let (unit, size) = (u64::from(self.geometry.unit), self.geometry.size);
        let aligned = |at: u64| at.is_multiple_of(unit) || at == size;
        let covers = p.covers;
        if covers.offset > rest.offset
            || covers.end() <= rest.offset
            || covers.end() > size
            || !aligned(covers.offset)
            || !aligned(covers.end())
        {
            return Err(broken(format!(
                "{p:?} does not cover the front of {rest:?}"
            )));
        }
        if stored.is_some() && (covers.offset, covers.end()) != (rest.offset, rest.end()) {
            return Err(broken(format!("{p:?} splits a compressed cluster")));
        }
        let len = stored.map_or(covers.len, u64::from);
        let bytes = ByteRange::new(p.offset, len);
        self.bytes(p.slot, bytes, p)?;
        for other in self.known.iter() {
            let Some((slot, used, in_place)) = raw(other) else {
                continue;
            };
            if in_place && overlap(other.range, covers) {
                return Err(broken(format!("{p:?} moves {other:?}, which is in place")));
            }
            if slot == p.slot && overlap(used, bytes) {
                return Err(broken(format!("{p:?} reserves bytes of {other:?}")));
            }
        }
        Ok(())
    }

    /// After a call: nothing known lies in freed bytes, or under metadata.
    pub(super) fn known_bytes_are_payload(&self) -> Result<()> {
        for known in self.known.iter() {
            if let Some((slot, bytes, true)) = raw(known)
                && self.host.file(slot)?.metadata.touches(bytes)
            {
                return Err(broken(format!("metadata was written over {known:?}")));
            }
        }
        for freed in self.host.freed() {
            for known in self.known.iter() {
                if let Some((slot, bytes, _)) = raw(known)
                    && slot == freed.slot
                    && overlap(bytes, freed.range)
                {
                    return Err(broken(format!("{freed:?} was freed but holds {known:?}")));
                }
            }
        }
        Ok(())
    }
}

/// What the host makes of geometry before it believes it.
pub(super) fn check_geometry(g: &Geometry) -> Result<()> {
    let fits = |n: u32| n == 0 || n.is_power_of_two() && n >= g.unit;
    if !g.unit.is_power_of_two() || !(512..=2 << 20).contains(&g.unit) {
        return Err(broken(format!("a unit of {} bytes", g.unit)));
    }
    if !g.cluster_size.is_power_of_two() || !(g.unit..=256 << 20).contains(&g.cluster_size) {
        return Err(broken(format!("a cluster of {} bytes", g.cluster_size)));
    }
    if !fits(g.zero_granularity) || !fits(g.discard_granularity) || g.size > i64::MAX as u64 {
        return Err(broken(format!("{g:?} is no geometry")));
    }
    Ok(())
}

/// Grants for the children that an image reported.
pub(super) fn grant(host: &mut MemoryHost, child: &crate::Child) -> Result<Granted> {
    let what = match child.kind {
        ChildKind::Backing => host
            .backing
            .as_ref()
            .map(|disk| Granted::Backing(disk.len())),
        ChildKind::Storage => {
            let found = host.offered.iter().position(|(id, _)| *id == child.id);
            found.map(|index| {
                let (id, disk) = host.offered.remove(index);
                host.files.push(File::new(Some(id), disk));
                Granted::Slot(host.files.len() as u32 - 1)
            })
        }
    };
    match what {
        None if child.required => Err(crate::Error::new(
            crate::Errno::Enoent,
            format!(
                "The test grants nothing for the required child '{}'",
                child.id
            ),
        )),
        what => Ok(what.unwrap_or(Granted::None)),
    }
}

fn joined(ranges: &[ByteRange]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.1 == range.offset => last.1 = range.end(),
            _ => out.push((range.offset, range.end())),
        }
    }
    out
}
