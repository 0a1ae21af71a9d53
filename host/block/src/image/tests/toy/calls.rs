//! The seam, implemented.

use super::faults::Bug;
use super::layout::offset_of;
use super::{Act, Call, Header, PACKED, Toy, Txn, ZERO, refused, trap};
use crate::format::{
    Call as Answer, CheckReport, Child, ChildKind, Codec, Coded, DiscardKind, Extent, Format,
    FormatError, FormatFuture, Geometry, Grant, Granted, KeptBitmap, Location, Placement, Repair,
    SlotRange, Stage, Stretch, TxnOp, WriteIntent, WriteKind,
};
use crate::{ByteRange, Errno};

/// Entries that one answer looks at.
const ENTRIES_PER_ANSWER: u64 = 300;

/// Clusters that one discard looks at.
const DISCARD_STEP: u64 = 5;

type Done<T> = Result<T, FormatError>;

fn write(stage: Stage, offset: u64, data: Vec<u8>) -> TxnOp {
    TxnOp::Write {
        slot: 0,
        stage,
        offset,
        data,
    }
}

fn free(offset: u64, len: u64) -> TxnOp {
    TxnOp::Free(SlotRange {
        slot: 0,
        range: ByteRange::new(offset, len).unwrap(),
    })
}

fn after<T>(act: Option<Act>, answer: T) -> Done<T> {
    match act {
        Some(Act::Trap) => Err(trap()),
        _ => Ok(answer),
    }
}

impl Toy {
    async fn bytes(&self, offset: u64, len: usize) -> Done<Vec<u8>> {
        let mut buf = vec![0; len];
        match self.files.try_read(0, offset, &mut buf) {
            Some(Ok(())) => Ok(buf),
            Some(Err(e)) => Err(refused(e)),
            None => self.files.read(0, offset, len).await.map_err(refused),
        }
    }

    async fn entries(&self, guest: u64, count: u64) -> Done<Vec<u64>> {
        let at = self.header.entry_at(guest);
        let bytes = self.bytes(at, count as usize * 8).await?;
        Ok(bytes
            .chunks_exact(8)
            .map(|b| u64::from_le_bytes(b.try_into().unwrap()))
            .collect())
    }

    fn geometry(&self) -> Geometry {
        let cluster = self.header.cluster() as u32;
        Geometry {
            size: self.header.size,
            unit: cluster,
            cluster_size: cluster,
            zero_granularity: cluster,
            discard_granularity: cluster,
        }
    }

    fn guest(&self, first: u64, clusters: u64) -> ByteRange {
        let end = (first + clusters) << self.header.bits;
        ByteRange::between(first << self.header.bits, end.min(self.header.size))
    }

    fn location(&self, entry: u64, guest: u64) -> Location {
        let offset = offset_of(entry);
        match entry {
            0 if self.has_backing => Location::Backing(guest),
            0 => Location::Hole,
            _ if entry & ZERO != 0 => Location::Zero,
            _ if entry & PACKED != 0 => Location::Coded(Coded {
                slot: 0,
                offset,
                stored_len: self.header.cluster() as u32,
                codec: Codec::Zstd,
                unit_offset: guest,
                unit_len: self.header.cluster() as u32,
            }),
            _ => Location::Raw {
                slot: 0,
                offset,
                in_place: true,
            },
        }
    }

    fn count(&mut self, txn: &mut Txn, offset: u64, count: u8) {
        let index = offset >> self.header.bits;
        self.state.counts[index as usize] = count;
        let at = self.header.counts() + index;
        txn.push(write(Stage::Prepare, at, vec![count]));
    }

    fn find_free(&self) -> Option<u64> {
        let first = self.header.first_data() as usize;
        let found = self.state.counts[first..].iter().position(|c| *c == 0)?;
        Some(((first + found) as u64) << self.header.bits)
    }

    fn set_entry(&self, txn: &mut Txn, guest: u64, entry: u64) {
        let stage = if self.faults.has_bug(Bug::MapsEarly) && entry & ZERO == 0 {
            Stage::Prepare
        } else {
            Stage::Mapping
        };
        let at = self.header.entry_at(guest);
        txn.push(write(stage, at, entry.to_le_bytes().to_vec()));
    }

    fn header_op(&self, stage: Stage) -> TxnOp {
        write(stage, 0, self.header.encode())
    }

    fn reserve(&mut self, placement: Placement, kind: WriteKind) -> Placement {
        self.state.next_token += 1;
        let placement = Placement {
            token: self.state.next_token,
            ..placement
        };
        self.state.reserved.insert(placement.token, placement);
        let packed = kind == WriteKind::Compressed;
        self.state.packed.insert(placement.token, packed);
        placement
    }

    async fn prepare(&mut self, intents: Vec<WriteIntent>) -> Done<Answer<Vec<Placement>>> {
        let mut txn = Txn::new();
        let mut out: Vec<Placement> = Vec::new();
        'intents: for (index, intent) in intents.iter().enumerate() {
            let clusters = intent.range.align_out(self.header.cluster());
            let first = clusters.offset() >> self.header.bits;
            let count = clusters.len() >> self.header.bits;
            let entries = self.entries(clusters.offset(), count).await?;
            for (i, entry) in entries.into_iter().enumerate() {
                let covers = self.guest(first + i as u64, 1);
                let in_place = entry != 0 && entry & (ZERO | PACKED) == 0;
                assert!(!in_place, "{covers:?} is mapped in place already");
                let kept = entry & ZERO != 0 && offset_of(entry) != 0;
                let offset = if kept && intent.kind == WriteKind::Data {
                    offset_of(entry)
                } else {
                    match self.find_free() {
                        Some(offset) => offset,
                        None if out.is_empty() => return Err(refused(Errno::NoSpc)),
                        None => break 'intents,
                    }
                };
                self.count(&mut txn, offset, 1);
                match out.last_mut() {
                    Some(last)
                        if last.intent == index as u32
                            && last.offset + last.covers.len() == offset
                            && last.covers.end() == covers.offset() =>
                    {
                        last.covers = ByteRange::between(last.covers.offset(), covers.end());
                        let token = last.token;
                        self.state.reserved.insert(token, *last);
                    }
                    _ => {
                        let placement = Placement {
                            token: 0,
                            intent: index as u32,
                            covers,
                            slot: 0,
                            offset,
                        };
                        out.push(self.reserve(placement, intent.kind));
                    }
                }
                if self.faults.has_bug(Bug::PlacesOne) {
                    continue 'intents;
                }
            }
        }
        Ok(Answer { value: out, txn })
    }

    async fn commit(&mut self, tokens: Vec<u64>) -> Done<Answer<Vec<Extent>>> {
        let mut txn = Txn::new();
        let mut out = Vec::new();
        for token in tokens {
            let p = self.state.reserved.remove(&token).expect("a known token");
            let packed = self.state.packed.remove(&token) == Some(true);
            let first = p.covers.offset() >> self.header.bits;
            let count = p.covers.len().div_ceil(self.header.cluster());
            let old = self.entries(p.covers.offset(), count).await?;
            for (i, old) in old.into_iter().enumerate() {
                let range = self.guest(first + i as u64, 1);
                let offset = p.offset + ((i as u64) << self.header.bits);
                let entry = offset | if packed { PACKED } else { 0 };
                self.set_entry(&mut txn, range.offset(), entry);
                if offset_of(old) != 0 && offset_of(old) != offset {
                    txn.push(free(offset_of(old), self.header.cluster()));
                }
                let at = self.location(entry, range.offset());
                out.push(Extent { range, at });
            }
        }
        Ok(Answer { value: out, txn })
    }

    async fn drop_content(
        &mut self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Done<Answer<Vec<Extent>>> {
        let mut txn = Txn::new();
        let first = range.offset() >> self.header.bits;
        let count = range
            .len()
            .div_ceil(self.header.cluster())
            .min(DISCARD_STEP);
        let entries = self.entries(range.offset(), count).await?;
        let mut out = Vec::new();
        for (i, old) in entries.into_iter().enumerate() {
            let range = self.guest(first + i as u64, 1);
            let offset = offset_of(old);
            let keep = kind == DiscardKind::ZeroKeep && offset != 0 && old & PACKED == 0;
            let new = match (keep, self.has_backing) {
                (true, _) => offset | ZERO,
                (false, true) => ZERO,
                (false, false) => 0,
            };
            if new != old {
                self.set_entry(&mut txn, range.offset(), new);
                if offset != 0 && !keep {
                    if self.faults.has_bug(Bug::ReusesEarly) {
                        self.count(&mut txn, offset, 0);
                    } else {
                        txn.push(free(offset, self.header.cluster()));
                    }
                }
            }
            let at = self.location(new, range.offset());
            out.push(Extent { range, at });
        }
        Ok(Answer { value: out, txn })
    }

    async fn set_size(&mut self, size: u64) -> Done<Answer<Geometry>> {
        let cluster = self.header.cluster();
        if size.div_ceil(cluster) > self.header.entries {
            return Err(refused(Errno::FBig));
        }
        let mut txn = Txn::new();
        let old = self.header.size;
        self.header.size = size;
        txn.push(self.header_op(Stage::Mapping));
        let (keep, had) = (size.div_ceil(cluster), old.div_ceil(cluster));
        if keep < had {
            let entries = self.entries(keep << self.header.bits, had - keep).await?;
            for (i, old) in entries.into_iter().enumerate() {
                if old != 0 {
                    self.set_entry(&mut txn, (keep + i as u64) << self.header.bits, 0);
                }
                if offset_of(old) != 0 {
                    txn.push(free(offset_of(old), cluster));
                }
            }
            let used = self.state.counts.iter().rposition(|c| *c != 0).unwrap_or(0) as u64;
            let size = (used + 1) << self.header.bits;
            txn.push(TxnOp::Truncate { slot: 0, size });
        }
        Ok(Answer {
            value: self.geometry(),
            txn,
        })
    }

    async fn check_all(&mut self, fix: Repair) -> Done<Answer<(CheckReport, Option<u64>)>> {
        let mut report = CheckReport::default();
        let mut txn = Txn::new();
        let mut used = vec![0u32; self.state.counts.len()];
        let first = self.header.first_data();
        let clusters = self.header.size.div_ceil(self.header.cluster());
        for (i, entry) in self.entries(0, clusters).await?.into_iter().enumerate() {
            let index = offset_of(entry) >> self.header.bits;
            if index == 0 {
                continue;
            }
            let counted = self.state.counts.get(index as usize);
            let bad = index < first || counted.is_none_or(|c| *c == 0) || used[index as usize] > 0;
            if bad {
                report.corruptions += 1;
                report
                    .messages
                    .push(format!("cluster {i}: entry {entry:#x}"));
            } else {
                used[index as usize] += 1;
                report.allocated_clusters += 1;
            }
        }
        for (index, used) in used.into_iter().enumerate().skip(first as usize) {
            if self.state.counts[index] > 0 && used == 0 {
                report.leaks += 1;
                if fix.leaks {
                    report.leaks_fixed += 1;
                    self.count(&mut txn, (index as u64) << self.header.bits, 0);
                }
            }
        }
        Ok(Answer {
            value: (report, None),
            txn,
        })
    }
}

impl Format for Toy {
    fn open<'a>(&'a mut self, options: &'a str, writable: bool) -> FormatFuture<'a, Vec<Child>> {
        Box::pin(async move {
            self.writable = writable;
            let bytes = self.bytes(0, 64).await?;
            self.header = Header::decode(&bytes).ok_or_else(|| refused(Errno::Inval))?;
            let backing = Child {
                id: "backing".to_owned(),
                kind: ChildKind::Backing,
                reference: None,
                format: None,
                required: true,
            };
            Ok(if options == "backing" {
                vec![backing]
            } else {
                Vec::new()
            })
        })
    }

    fn activate(&mut self, grants: Vec<Grant>) -> FormatFuture<'_, Answer<Geometry>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Activate).await?;
            let backing = grants.iter().any(|g| matches!(g.what, Granted::Backing(_)));
            self.has_backing = backing;
            let len = self.header.capacity as usize;
            self.state.counts = self.bytes(self.header.counts(), len).await?;
            let mut txn = Txn::new();
            if self.writable && !self.header.dirty {
                self.header.dirty = true;
                txn.push(self.header_op(Stage::Prepare));
            }
            let value = self.geometry();
            after(act, Answer { value, txn })
        })
    }

    fn resolve(&mut self, range: ByteRange) -> FormatFuture<'_, Vec<Extent>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Resolve).await?;
            let first = range.offset() >> self.header.bits;
            let clusters = self.header.size.div_ceil(self.header.cluster());
            assert!(first < clusters, "asked beyond the end: {range:?}");
            let count = (clusters - first).min(ENTRIES_PER_ANSWER);
            let entries = self.entries(first << self.header.bits, count).await?;
            let mut out: Vec<Extent> = Vec::new();
            for (i, entry) in entries.into_iter().enumerate() {
                let range = self.guest(first + i as u64, 1);
                let at = self.location(entry, range.offset());
                out.push(Extent { range, at });
            }
            if let Some(Act::Extents(change)) = act {
                change(&mut out);
                return Ok(out);
            }
            after(act, out)
        })
    }

    fn read_special(&mut self, _: u64, range: ByteRange) -> FormatFuture<'_, Vec<u8>> {
        Box::pin(async move { Ok(vec![0x5e; range.len() as usize]) })
    }

    fn facts(&mut self) -> FormatFuture<'_, String> {
        Box::pin(async { Ok("{}".to_owned()) })
    }

    fn prepare_write(
        &mut self,
        intents: Vec<WriteIntent>,
    ) -> FormatFuture<'_, Answer<Vec<Placement>>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Prepare).await?;
            let mut answer = self.prepare(intents).await?;
            if let Some(Act::Placements(change)) = act {
                change(&mut answer.value);
                return Ok(answer);
            }
            after(act, answer)
        })
    }

    fn commit_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Answer<Vec<Extent>>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Commit).await?;
            let mut answer = self.commit(tokens).await?;
            if let Some(Act::Extents(change)) = act {
                change(&mut answer.value);
                return Ok(answer);
            }
            after(act, answer)
        })
    }

    fn abort_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Answer<()>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Abort).await?;
            let mut txn = Txn::new();
            for token in tokens {
                let p = self.state.reserved.remove(&token).expect("a known token");
                let count = p.covers.len().div_ceil(self.header.cluster());
                let entries = self.entries(p.covers.offset(), count).await?;
                for (i, entry) in entries.into_iter().enumerate() {
                    let offset = p.offset + ((i as u64) << self.header.bits);
                    if offset_of(entry) != offset {
                        self.count(&mut txn, offset, 0);
                    }
                }
            }
            after(act, Answer { value: (), txn })
        })
    }

    fn discard(
        &mut self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> FormatFuture<'_, Answer<Vec<Extent>>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Discard).await?;
            let mut answer = self.drop_content(range, kind).await?;
            if let Some(Act::Extents(change)) = act {
                change(&mut answer.value);
                return Ok(answer);
            }
            after(act, answer)
        })
    }

    fn reclaim(&mut self, freed: Vec<SlotRange>) -> FormatFuture<'_, Answer<()>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Reclaim).await?;
            let mut txn = Txn::new();
            for part in freed {
                let mut at = part.range.offset();
                while at < part.range.end() {
                    self.count(&mut txn, at, 0);
                    at += self.header.cluster();
                }
            }
            after(act, Answer { value: (), txn })
        })
    }

    fn flush(&mut self) -> FormatFuture<'_, Answer<()>> {
        Box::pin(async move {
            let act = self.faults.before(Call::Flush).await?;
            let txn = Txn::new();
            after(act, Answer { value: (), txn })
        })
    }

    fn resize(&mut self, size: u64) -> FormatFuture<'_, Answer<Geometry>> {
        Box::pin(async move { self.set_size(size).await })
    }

    fn check(
        &mut self,
        fix: Repair,
        _: u64,
    ) -> FormatFuture<'_, Answer<(CheckReport, Option<u64>)>> {
        Box::pin(async move {
            let mut answer = self.check_all(fix).await?;
            if self.faults.has_bug(Bug::ChecksForEver) {
                answer.value.1 = Some(1);
            }
            Ok(answer)
        })
    }

    fn keeps_bitmaps(&self) -> bool {
        self.faults.kept.lock().unwrap().is_some()
    }

    fn list_bitmaps(&mut self, _: u32) -> FormatFuture<'_, Vec<KeptBitmap>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn store_bits(&mut self, bitmap: KeptBitmap, _: Stretch) -> FormatFuture<'_, Answer<()>> {
        Box::pin(async move {
            let act = self.faults.before(Call::StoreBits).await?;
            *self.state.staged.entry(bitmap.name).or_default() += 1;
            let txn = Txn::new();
            after(act, Answer { value: (), txn })
        })
    }

    fn keep_bitmaps(&mut self, bitmaps: Vec<KeptBitmap>) -> FormatFuture<'_, Answer<bool>> {
        Box::pin(async move {
            let staged = |it: KeptBitmap| {
                let stretches = self.state.staged.get(&it.name).copied();
                (it.name, stretches.unwrap_or(0))
            };
            let consistent = bitmaps.into_iter().filter(|it| it.consistent);
            let kept: Vec<_> = consistent.map(staged).collect();
            *self.faults.kept.lock().unwrap() = Some(kept);
            let txn = Txn::new();
            Ok(Answer { value: true, txn })
        })
    }

    fn close(&mut self) -> FormatFuture<'_, Answer<()>> {
        Box::pin(async move {
            self.header.dirty = false;
            let txn = vec![self.header_op(Stage::Mapping)];
            Ok(Answer { value: (), txn })
        })
    }

    fn create<'a>(&'a mut self, options: &'a str) -> FormatFuture<'a, Answer<()>> {
        Box::pin(async move {
            let numbers: Vec<u64> = options.split(',').map(|n| n.parse().unwrap()).collect();
            let header = Header {
                bits: numbers[0] as u32,
                size: numbers[1],
                entries: numbers[1].div_ceil(1 << numbers[0]) * 2,
                capacity: numbers[2],
                dirty: false,
            };
            let used = vec![1; header.first_data() as usize];
            let size = header.first_data() << header.bits;
            let txn = vec![
                TxnOp::Grow { slot: 0, size },
                write(Stage::Prepare, header.counts(), used),
                write(Stage::Mapping, 0, header.encode()),
            ];
            Ok(Answer { value: (), txn })
        })
    }
}
