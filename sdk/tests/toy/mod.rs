//! A writable format small enough to see through: a header, one table, data.
//! What no table entry names is free, so it needs no reference counts.
//!
//! `BUG` plants one mistake that the testing host must find.

use outport_sdk::{
    ByteRange, CheckReport, Child, ChildKind, Codec, CreatableFormat, DiscardKind, Error, Extent,
    Files, Format, Geometry, Grant, Granted, Info, Location, Measurement, Placement, Reader,
    Repair, Result, SlotRange, Stage, Txn, WritableFormat, WriteIntent, WriteKind,
};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const CLUSTER: u64 = 4096;
const MAGIC: &[u8; 8] = b"TOYTOYTO";
/// Kinds of table entries, in the low bits of a cluster's offset.
const RAW: u64 = 1;
const ZERO: u64 = 2;
const DEFLATED: u64 = 3;

pub(crate) const SOUND: u8 = 0;
/// The mapping is queued in stage prepare.
pub(crate) const MAPPING_TOO_EARLY: u8 = 1;
/// Freed space is handed out before `reclaim`.
pub(crate) const REUSE_TOO_EARLY: u8 = 2;
/// Two guest clusters get the same space.
pub(crate) const SHARES_SPACE: u8 = 3;
/// Payload is placed over the table.
pub(crate) const PLACES_ON_METADATA: u8 = 4;
/// The answer of a commit does not say where the payload went.
pub(crate) const COMMITS_ELSEWHERE: u8 = 5;

pub(crate) struct Toy<const BUG: u8> {
    size: u64,
    table: Vec<u64>,
    free: Vec<u64>,
    end: u64,
    backing: Option<u64>,
    reserved: BTreeMap<u64, (usize, u64)>,
    tokens: u64,
}

fn data_start(size: u64) -> u64 {
    CLUSTER + (size.div_ceil(CLUSTER) * 8).next_multiple_of(CLUSTER)
}

impl<const BUG: u8> Toy<BUG> {
    fn range(&self, index: usize) -> ByteRange {
        let start = index as u64 * CLUSTER;
        ByteRange::new(start, CLUSTER.min(self.size - start))
    }

    fn extent(&self, index: usize) -> Extent {
        let range = self.range(index);
        let offset = self.table[index] & !(CLUSTER - 1);
        let at = match (self.table[index] % CLUSTER, self.backing) {
            (RAW, _) => Location::Raw {
                slot: 0,
                offset,
                in_place: true,
            },
            (DEFLATED, _) => Location::Coded {
                slot: 0,
                offset,
                stored_len: CLUSTER as u32,
                codec: Codec::Deflate,
                unit_offset: range.offset,
                unit_len: CLUSTER as u32,
            },
            (0, Some(len)) if range.end() <= len => Location::Backing(range.offset),
            (0, _) => Location::Hole,
            _ => Location::Zero,
        };
        Extent { range, at }
    }

    fn set(&mut self, txn: &mut dyn Txn, index: usize, entry: u64) -> Result<()> {
        let stage = if BUG == MAPPING_TOO_EARLY {
            Stage::Prepare
        } else {
            Stage::Mapping
        };
        txn.write(0, stage, CLUSTER + index as u64 * 8, &entry.to_le_bytes())?;
        let old = std::mem::replace(&mut self.table[index], entry) & !(CLUSTER - 1);
        if old != 0 {
            txn.free(0, ByteRange::new(old, CLUSTER))?;
            if BUG == REUSE_TOO_EARLY {
                self.free.push(old);
            }
        }
        Ok(())
    }
}

impl<const BUG: u8> Format for Toy<BUG> {
    fn info() -> Info {
        Info {
            name: "toy",
            version: "0",
            description: "A toy",
            options_schema: "",
        }
    }

    fn probe(head: &[u8], _size: u64) -> u8 {
        if head.starts_with(MAGIC) { 100 } else { 0 }
    }

    fn open(files: &dyn Files, _options: &str, _writable: bool) -> Result<(Self, Vec<Child>)> {
        let header = files.read(0, 0, 16)?;
        let mut r = Reader::new(&header);
        if r.array::<8>()? != *MAGIC {
            return Err(Error::invalid("This is not a toy image"));
        }
        let size = r.le_u64()?;
        let bytes = files.read(0, CLUSTER, size.div_ceil(CLUSTER) as usize * 8)?;
        let mut r = Reader::new(&bytes);
        let table = (0..size.div_ceil(CLUSTER))
            .map(|_| r.le_u64())
            .collect::<Result<Vec<_>>>()?;
        let used: BTreeSet<u64> = table.iter().map(|e| e & !(CLUSTER - 1)).collect();
        let end = files
            .size(0)?
            .max(data_start(size))
            .next_multiple_of(CLUSTER);
        let all = (data_start(size)..end).step_by(CLUSTER as usize);
        let free = all.filter(|offset| !used.contains(offset)).collect();
        let (reserved, backing, tokens) = (BTreeMap::new(), None, 0);
        let backing_child = Child {
            id: "backing".to_owned(),
            kind: ChildKind::Backing,
            reference: None,
            format: None,
            required: false,
        };
        Ok((
            Self {
                size,
                table,
                free,
                end,
                backing,
                reserved,
                tokens,
            },
            vec![backing_child],
        ))
    }

    fn activate(&mut self, _files: &dyn Files, grants: &[Grant]) -> Result<Geometry> {
        if let Some(Grant {
            what: Granted::Backing(len),
            ..
        }) = grants.first()
        {
            self.backing = Some(*len);
        }
        let unit = CLUSTER as u32;
        Ok(Geometry {
            size: self.size,
            unit,
            cluster_size: unit,
            zero_granularity: unit,
            discard_granularity: unit,
        })
    }

    fn resolve(&mut self, _files: &dyn Files, range: ByteRange) -> Result<Vec<Extent>> {
        let first = (range.offset / CLUSTER) as usize;
        Ok((first..self.table.len())
            .take(4)
            .map(|index| self.extent(index))
            .collect())
    }
}

impl<const BUG: u8> WritableFormat for Toy<BUG> {
    fn activate_writable(&mut self, txn: &mut dyn Txn, grants: &[Grant]) -> Result<Geometry> {
        self.activate(txn.files(), grants)
    }

    fn prepare_write(
        &mut self,
        txn: &mut dyn Txn,
        intents: &[WriteIntent],
    ) -> Result<Vec<Placement>> {
        let mut placed = Vec::new();
        for (intent, wanted) in (0..).zip(intents) {
            let first = (wanted.range.offset / CLUSTER) as usize;
            let last = ((wanted.range.end() - 1) / CLUSTER) as usize;
            // Now and then only the front part: the host must ask again.
            for index in first..=last.min(first + 2) {
                let offset = if BUG == SHARES_SPACE && index % 8 == 7 {
                    data_start(self.size)
                } else if let Some(offset) = self.free.pop() {
                    offset
                } else {
                    self.end += CLUSTER;
                    self.end - CLUSTER
                };
                let offset = if BUG == PLACES_ON_METADATA {
                    CLUSTER
                } else {
                    offset
                };
                txn.grow(0, offset + CLUSTER)?;
                let kind = if wanted.kind == WriteKind::Data {
                    RAW
                } else {
                    DEFLATED
                };
                self.tokens += 1;
                self.reserved.insert(self.tokens, (index, offset | kind));
                let covers = self.range(index);
                placed.push(Placement {
                    token: self.tokens,
                    intent,
                    covers,
                    slot: 0,
                    offset,
                });
            }
        }
        Ok(placed)
    }

    fn commit_write(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        for token in tokens {
            let Some((index, entry)) = self.reserved.remove(token) else {
                return Err(Error::invalid("Unknown token"));
            };
            self.set(txn, index, entry)?;
            extents.push(self.extent(index));
            if BUG == COMMITS_ELSEWHERE
                && let Some(Extent {
                    at: Location::Raw { offset, .. },
                    ..
                }) = extents.last_mut()
            {
                *offset = data_start(self.size);
            }
        }
        Ok(extents)
    }

    fn abort_write(&mut self, _txn: &mut dyn Txn, tokens: &[u64]) -> Result<()> {
        let given = tokens
            .iter()
            .filter_map(|token| self.reserved.remove(token));
        self.free
            .extend(given.map(|(_, entry)| entry & !(CLUSTER - 1)));
        Ok(())
    }

    fn discard(
        &mut self,
        txn: &mut dyn Txn,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<Vec<Extent>> {
        let first = (range.offset / CLUSTER) as usize;
        let last = (range.end().div_ceil(CLUSTER) as usize).min(first + 3);
        let entry = if kind == DiscardKind::Discard {
            0
        } else {
            ZERO
        };
        for index in first..last {
            self.set(txn, index, entry)?;
        }
        Ok((first..last).map(|index| self.extent(index)).collect())
    }

    fn reclaim(&mut self, _txn: &mut dyn Txn, freed: &[SlotRange]) -> Result<()> {
        self.free.extend(freed.iter().map(|f| f.range.offset));
        Ok(())
    }

    fn flush(&mut self, _txn: &mut dyn Txn) -> Result<()> {
        Ok(())
    }

    fn resize(&mut self, _txn: &mut dyn Txn, _size: u64) -> Result<Geometry> {
        Err(Error::unsupported("A toy keeps its size"))
    }

    fn check(
        &mut self,
        txn: &mut dyn Txn,
        _fix: Repair,
        _cursor: u64,
    ) -> Result<(CheckReport, Option<u64>)> {
        let (mut report, mut seen) = (CheckReport::default(), BTreeSet::new());
        let file_len = txn.size(0)?;
        for offset in self
            .table
            .iter()
            .map(|e| e & !(CLUSTER - 1))
            .filter(|o| *o != 0)
        {
            let outside = offset < data_start(self.size) || offset + CLUSTER > file_len;
            report.corruptions += u64::from(outside || !seen.insert(offset));
        }
        Ok((report, None))
    }

    fn close(&mut self, _txn: &mut dyn Txn) -> Result<()> {
        Ok(())
    }
}

impl<const BUG: u8> CreatableFormat for Toy<BUG> {
    fn create_schema() -> &'static str {
        ""
    }

    fn measure(options: &str) -> Result<Measurement> {
        let size: u64 = options
            .parse()
            .map_err(|_| Error::invalid("A toy's option is a size"))?;
        let required = data_start(size);
        Ok(Measurement {
            required,
            fully_allocated: required + size.next_multiple_of(CLUSTER),
        })
    }

    fn create(txn: &mut dyn Txn, options: &str) -> Result<()> {
        let size: u64 = options
            .parse()
            .map_err(|_| Error::invalid("A toy's option is a size"))?;
        txn.grow(0, data_start(size))?;
        txn.zero(
            0,
            Stage::Prepare,
            ByteRange::new(CLUSTER, data_start(size) - CLUSTER),
        )?;
        let header = [&MAGIC[..], &size.to_le_bytes()].concat();
        txn.write(0, Stage::Mapping, 0, &header)
    }
}

outport_sdk::export_format_full!(Toy<SOUND>);
