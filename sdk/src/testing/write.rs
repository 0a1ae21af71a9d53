//! The writing half of [`TestNode`]: prepare, payload and fills, commit.

use super::codec;
use super::extents::{overlap, part, raw};
use super::host::broken;
use super::node::TestNode;
use crate::{
    ByteRange, Codec, DiscardKind, Errno, Error, Extent, Location, Placement, Result,
    WritableFormat, WriteIntent, WriteKind,
};
use std::collections::BTreeMap;

/// Space that was placed and not yet committed, by token.
#[derive(Clone, Debug, Default)]
pub(super) struct Reservations(BTreeMap<u64, (Placement, Option<Codec>)>);

/// What one intent stores.
enum Payload<'a> {
    Data(&'a [u8]),
    Compressed { stored: Vec<u8>, codec: Codec },
}

impl<T: WritableFormat> TestNode<T> {
    /// Write guest bytes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_batch(&[(offset, data)], false)
    }

    /// Several writes in flight at once, none overlapping another: space for as
    /// many as possible is prepared in one call. With `split` they are committed
    /// one by one in the opposite order.
    pub fn write_batch(&mut self, writes: &[(u64, &[u8])], split: bool) -> Result<()> {
        let mut intents = Vec::new();
        for (offset, data) in writes {
            self.inside(*offset, data.len())?;
            self.write_in_place(*offset, data, &mut intents)?;
        }
        intents.sort_by_key(|(range, _)| range.offset);
        // Two intents in one cluster would both want its space.
        let cluster = u64::from(self.geometry.cluster_size);
        while !intents.is_empty() {
            let mut later = Vec::new();
            let mut now: Vec<(ByteRange, Payload<'_>)> = Vec::new();
            for intent in intents {
                match now.last() {
                    Some((last, _)) if (last.end() - 1) / cluster == intent.0.offset / cluster => {
                        later.push(intent);
                    }
                    _ => now.push(intent),
                }
            }
            self.allocate(now, split)?;
            intents = Vec::new();
            for (range, payload) in later {
                // The first may have brought the whole cluster in place.
                if let Payload::Data(data) = payload {
                    self.write_in_place(range.offset, data, &mut intents)?;
                }
            }
        }
        Ok(())
    }

    /// Write one whole cluster in compressed form, or plainly if that is not
    /// shorter or the cluster has its place already.
    pub fn write_compressed(&mut self, offset: u64, data: &[u8], codec: Codec) -> Result<()> {
        self.inside(offset, data.len())?;
        let (cluster, end) = (
            u64::from(self.geometry.cluster_size),
            offset + data.len() as u64,
        );
        let whole = offset.is_multiple_of(cluster)
            && (data.len() as u64 == cluster || end == self.geometry.size);
        if !whole || data.len() as u64 > cluster {
            return Err(Error::new(
                Errno::Einval,
                "A compressed write is one whole cluster",
            ));
        }
        let mut padded = data.to_vec();
        padded.resize(cluster as usize, 0);
        let stored = codec::encode(codec, &padded);
        let mut in_place = false;
        let mut at = offset;
        while at < end {
            let extent = self.extent_at(at, end - at)?;
            in_place |= raw(&extent).is_some_and(|r| r.2);
            at = extent.range.end();
        }
        if in_place || stored.len() as u64 >= cluster {
            return self.write(offset, data);
        }
        let range = ByteRange::new(offset, data.len() as u64);
        self.allocate(vec![(range, Payload::Compressed { stored, codec })], false)
    }

    /// DISCARD: the content is not needed. Parts that the format cannot discard
    /// keep theirs.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        let (_, inner, _) = self.split(offset, len, self.geometry.discard_granularity)?;
        self.call_discard(inner, DiscardKind::Discard)
    }

    /// WRITE_ZEROES: it reads as zeroes; with `keep`, space stays allocated.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, keep: bool) -> Result<()> {
        let (head, inner, tail) = self.split(offset, len, self.geometry.zero_granularity)?;
        for edge in [head, tail] {
            self.write(edge.offset, &vec![0; edge.len as usize])?;
        }
        let kind = if keep {
            DiscardKind::ZeroKeep
        } else {
            DiscardKind::ZeroUnmap
        };
        self.call_discard(inner, kind)
    }

    /// Prepare a write of `range`, then fail to write the payload.
    pub fn abort_write(&mut self, range: ByteRange) -> Result<()> {
        self.inside(range.offset, range.len as usize)?;
        let extent = self.extent_at(range.offset, range.len)?;
        if raw(&extent).is_some_and(|r| r.2) {
            return Ok(());
        }
        let range = ByteRange::new(
            range.offset,
            extent.range.end().min(range.end()) - range.offset,
        );
        let intent = WriteIntent {
            range,
            kind: WriteKind::Data,
            stored_len: 0,
        };
        let placed = self.image.prepare_write(&mut self.host, &[intent]);
        let placed = self.host.finish(placed)?;
        let tokens: Vec<u64> = placed.iter().map(|p| p.token).collect();
        let aborted = self.image.abort_write(&mut self.host, &tokens);
        self.host.finish(aborted)
    }

    /// Write what is in place; the rest becomes intents.
    fn write_in_place<'a>(
        &mut self,
        offset: u64,
        data: &'a [u8],
        intents: &mut Vec<(ByteRange, Payload<'a>)>,
    ) -> Result<()> {
        let mut done = 0;
        let mut open: Option<usize> = None;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = self.extent_at(at, (data.len() - done) as u64)?;
            let len = (extent.range.end() - at).min((data.len() - done) as u64);
            if let Some((slot, bytes, true)) = raw(&part(extent, at, len)) {
                self.host
                    .write_payload(slot, bytes.offset, &data[done..][..len as usize])?;
                if let Some(start) = open.take() {
                    intents.push(intent(offset, start, &data[start..done]));
                }
            } else {
                open.get_or_insert(done);
            }
            done += len as usize;
        }
        if let Some(start) = open {
            intents.push(intent(offset, start, &data[start..]));
        }
        Ok(())
    }

    /// Prepare, write, commit, until every intent is stored.
    fn allocate(&mut self, mut open: Vec<(ByteRange, Payload<'_>)>, split: bool) -> Result<()> {
        while !open.is_empty() {
            let intents: Vec<WriteIntent> = open.iter().map(|(r, p)| p.intent(*r)).collect();
            let placed = self.image.prepare_write(&mut self.host, &intents);
            let placed = self.host.finish(placed)?;
            if placed.is_empty() {
                return Err(broken("prepare_write placed nothing and reported no error"));
            }
            for placement in &placed {
                self.store(&mut open, placement)?;
            }
            let mut tokens: Vec<u64> = placed.iter().map(|p| p.token).collect();
            if split {
                tokens.reverse();
                tokens.chunks(1).try_for_each(|token| self.commit(token))?;
            } else {
                self.commit(&tokens)?;
            }
            open.retain(|(range, _)| range.len > 0);
        }
        Ok(())
    }

    /// Payload and fills of one placement; the intent keeps what is left.
    fn store(&mut self, open: &mut [(ByteRange, Payload<'_>)], p: &Placement) -> Result<()> {
        let index = p.intent as usize;
        let (rest, payload) = open
            .get_mut(index)
            .ok_or_else(|| broken(format!("{p:?}")))?;
        if rest.len == 0 {
            return Err(broken(format!("{p:?} is for an intent that has its space")));
        }
        let stored_len = match payload {
            Payload::Data(_) => None,
            Payload::Compressed { stored, .. } => Some(stored.len() as u32),
        };
        self.judge().placement(*rest, stored_len, p)?;
        for (other, _) in self.reserved.0.values() {
            let (a, b) = (p.bytes(stored_len), other.bytes(None));
            if overlap(p.covers, other.covers) || (p.slot == other.slot && overlap(a, b)) {
                return Err(broken(format!("{p:?} and {other:?} overlap")));
            }
        }
        let (bytes, codec) = match payload {
            Payload::Compressed { stored, codec } => {
                *rest = ByteRange::new(rest.end(), 0);
                (std::mem::take(stored), Some(*codec))
            }
            Payload::Data(data) => {
                let end = rest.end().min(p.covers.end());
                let (now, left) = data.split_at((end - rest.offset) as usize);
                let head = (rest.offset - p.covers.offset) as usize;
                let tail = (p.covers.end() - end) as usize;
                *data = left;
                *rest = ByteRange::new(end, left.len() as u64);
                let mut bytes = self.read(p.covers.offset, head)?;
                bytes.extend(now);
                bytes.extend(self.read(end, tail)?);
                (bytes, None)
            }
        };
        self.host.write_payload(p.slot, p.offset, &bytes)?;
        if self.reserved.0.insert(p.token, (*p, codec)).is_some() {
            return Err(broken(format!("token {} is used twice", p.token)));
        }
        Ok(())
    }

    fn commit(&mut self, tokens: &[u64]) -> Result<()> {
        let committed = self.image.commit_write(&mut self.host, tokens);
        let extents = self.host.finish(committed)?;
        let mut done: Vec<(Placement, Option<Codec>)> = tokens
            .iter()
            .filter_map(|token| self.reserved.0.remove(token))
            .collect();
        done.sort_by_key(|(p, _)| p.covers.offset);
        let covered: Vec<ByteRange> = done.iter().map(|(p, _)| p.covers).collect();
        self.judge().exactly(&covered, &extents)?;
        for extent in &extents {
            let at_its_place = done.iter().any(|(p, codec)| p.explains(*codec, extent));
            if !at_its_place {
                return Err(broken(format!("{extent:?} is not where the payload went")));
            }
        }
        self.learn(extents)
    }

    fn call_discard(&mut self, mut rest: ByteRange, kind: DiscardKind) -> Result<()> {
        while rest.len > 0 {
            let discarded = self.image.discard(&mut self.host, rest, kind);
            let extents = self.host.finish(discarded)?;
            let end = extents.last().map_or(rest.offset, |e| e.range.end());
            if end <= rest.offset || end > rest.end() {
                return Err(broken(format!("discard of {rest:?} ended at {end}")));
            }
            let done = ByteRange::new(rest.offset, end - rest.offset);
            for extent in &extents {
                self.known.forget(extent.range);
                let zero = matches!(extent.at, Location::Zero | Location::Hole);
                if kind != DiscardKind::Discard && !zero {
                    return Err(broken(format!("{extent:?} after {kind:?}")));
                }
            }
            self.judge().exactly(&[done], &extents)?;
            self.learn(extents)?;
            rest = ByteRange::new(end, rest.end() - end);
        }
        Ok(())
    }

    fn learn(&mut self, extents: Vec<Extent>) -> Result<()> {
        for extent in extents {
            self.known.insert(extent);
        }
        self.judge().known_bytes_are_payload()
    }

    /// The parts before, inside and after the granularity; 0: nothing is inside.
    fn split(
        &self,
        offset: u64,
        len: u64,
        granularity: u32,
    ) -> Result<(ByteRange, ByteRange, ByteRange)> {
        self.inside(offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        let (end, granularity) = (offset + len, u64::from(granularity));
        let nothing = ByteRange::new(end, 0);
        if granularity == 0 {
            return Ok((ByteRange::new(offset, len), nothing, nothing));
        }
        let from = offset.next_multiple_of(granularity).min(end);
        let to = if end == self.geometry.size {
            end
        } else {
            end - end % granularity
        }
        .max(from);
        let between = |a, b| ByteRange::new(a, b - a);
        Ok((between(offset, from), between(from, to), between(to, end)))
    }
}

fn intent(offset: u64, start: usize, data: &[u8]) -> (ByteRange, Payload<'_>) {
    (
        ByteRange::new(offset + start as u64, data.len() as u64),
        Payload::Data(data),
    )
}

impl Payload<'_> {
    fn intent(&self, range: ByteRange) -> WriteIntent {
        match self {
            Self::Data(_) => WriteIntent {
                range,
                kind: WriteKind::Data,
                stored_len: 0,
            },
            Self::Compressed { stored, .. } => WriteIntent {
                range,
                kind: WriteKind::Compressed,
                stored_len: stored.len() as u32,
            },
        }
    }
}

impl Placement {
    fn bytes(&self, stored_len: Option<u32>) -> ByteRange {
        ByteRange::new(self.offset, stored_len.map_or(self.covers.len, u64::from))
    }

    /// Whether `extent` says what this placement made true.
    fn explains(&self, codec: Option<Codec>, extent: &Extent) -> bool {
        if !overlap(self.covers, extent.range) {
            return false;
        }
        match (extent.at, codec) {
            (Location::Raw { slot, offset, .. }, None) => {
                let file_offset = offset.wrapping_sub(extent.range.offset);
                slot == self.slot && file_offset == self.offset.wrapping_sub(self.covers.offset)
            }
            (
                Location::Coded {
                    slot,
                    offset,
                    codec: named,
                    ..
                },
                Some(codec),
            ) => (slot, offset, named) == (self.slot, self.offset, codec),
            _ => false,
        }
    }
}
