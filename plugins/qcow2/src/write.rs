//! Allocating writes: reserve, then map or give back.
//!
//! A placement is a host place for guest bytes that nothing points at yet. With
//! extended L2 entries several writes may fill one new cluster at the same time;
//! they share it through [`Busy`], and it is given back only if none of them is
//! committed.

mod commit;
mod packed;

use outport_sdk::{
    ByteRange, Errno, Error, Files, Placement, Result, Stage, Txn, WriteIntent, WriteKind,
};

use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::table::{Cluster, Host, l1_encode};

/// A prepared write, named by its token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reservation {
    covers: ByteRange,
    /// File offset of the first covered byte.
    offset: u64,
    /// `Some`: compressed, with this stored length.
    stored_len: Option<u32>,
}

/// A guest cluster with prepared writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    /// Its host cluster to be.
    host: u64,
    /// Subclusters that are taken.
    taken: u32,
    /// Reservations that are neither committed nor aborted.
    users: u32,
    /// The host cluster was allocated for them, and no commit has used it.
    fresh: bool,
    /// The first write moves what was in the old host cluster; until then no
    /// other may point at the new one.
    moving: bool,
}

/// What a write to one guest cluster needs.
#[derive(Clone, Copy, Debug)]
struct Need {
    /// Guest bytes to write, subclusters in full.
    covers: ByteRange,
    taken: u32,
    /// An existing host cluster to use.
    host: Option<u64>,
    /// More is covered than the write itself wants.
    moving: bool,
}

impl Qcow2 {
    pub(crate) fn prepare(
        &mut self,
        txn: &mut dyn Txn,
        intents: &[WriteIntent],
    ) -> Result<Vec<Placement>> {
        let mut placements = Vec::with_capacity(intents.len());
        for (i, intent) in intents.iter().enumerate() {
            if intent.range.len == 0 || intent.range.end() > self.header.size {
                return Err(Error::invalid("A write outside of the image"));
            }
            let result = match intent.kind {
                WriteKind::Data => self.place(txn, i as u32, intent.range, &mut placements),
                WriteKind::Compressed => {
                    self.place_compressed(txn, i as u32, intent, &mut placements)
                }
            };
            match result {
                Err(e) if out_of_space(&e) && !placements.is_empty() => break,
                other => other?,
            }
        }
        self.reach(txn, &placements)?;
        Ok(placements)
    }

    /// Let the file be long enough for what will be written.
    fn reach(&mut self, txn: &mut dyn Txn, placements: &[Placement]) -> Result<()> {
        let len = |p: &Placement| {
            let stored = self.reservations.get(&p.token).and_then(|r| r.stored_len);
            stored.map_or(p.covers.len, u64::from)
        };
        let end = placements
            .iter()
            .map(|p| p.offset + len(p))
            .max()
            .unwrap_or(0);
        if end > self.data_len {
            txn.grow(self.data_slot, end)?;
            self.data_len = end;
        }
        Ok(())
    }

    fn place(
        &mut self,
        txn: &mut dyn Txn,
        intent: u32,
        range: ByteRange,
        placements: &mut Vec<Placement>,
    ) -> Result<()> {
        let mut next = range.offset;
        while next < range.end() {
            let Some(need) = self.need(txn, next, range.end())? else {
                return Ok(());
            };
            let placed = match need.host {
                Some(host) => self.reuse(need, host),
                None => self.place_fresh(txn, need, range.end())?,
            };
            next = placed.covers.end();
            placements.push(self.reserve(intent, placed));
        }
        Ok(())
    }

    /// What the guest cluster at `from` needs for a write up to `end`; `None`:
    /// another prepared write is in the way, ask again later.
    fn need(&mut self, txn: &mut dyn Txn, from: u64, end: u64) -> Result<Option<Need>> {
        let (cluster_size, unit) = (self.cluster_size(), self.unit());
        let guest = from & !(cluster_size - 1);
        let end = end.min(guest + cluster_size);
        let first = ((from - guest) / unit) as u32;
        let last = (end - guest).div_ceil(unit) as u32;
        let mut wanted = self.coding.bits(first, last);
        if let Some(busy) = self.busy.get(&guest) {
            if busy.moving || busy.taken & wanted != 0 {
                return Ok(None);
            }
            let host = Some(busy.host);
            return Ok(Some(Need {
                covers: self.span(guest, wanted),
                taken: wanted,
                host,
                moving: false,
            }));
        }
        let asked = wanted;
        let table = self.table_for_write(txn, guest)?;
        let host = match self.cluster(txn.files(), table, guest)? {
            _ if self.header.has_data_file() => Some(guest),
            Cluster::Compressed { .. } => {
                wanted = self.coding.all();
                None
            }
            Cluster::Standard {
                host: Some(host), ..
            } if host.copied && self.is_ours(txn.files(), host.offset)? => Some(host.offset),
            Cluster::Standard { sub, .. } => {
                // What is allocated moves along, in one piece.
                let moved = sub.allocated | wanted;
                let (low, high) = (moved.trailing_zeros(), 32 - moved.leading_zeros());
                wanted = self.coding.bits(low, high);
                None
            }
        };
        Ok(Some(Need {
            covers: self.span(guest, wanted),
            taken: wanted,
            host,
            moving: wanted != asked,
        }))
    }

    /// An in-place host cluster has a refcount of exactly one; if not, the flag
    /// lies and the cluster must be left alone.
    fn is_ours(&mut self, files: &dyn Files, offset: u64) -> Result<bool> {
        Ok(self.refcount(files, offset >> self.header.cluster_bits)? == 1)
    }

    /// The guest bytes of subclusters `taken` (one run) of the cluster at `guest`.
    fn span(&self, guest: u64, taken: u32) -> ByteRange {
        let unit = self.unit();
        let from = guest + u64::from(taken.trailing_zeros()) * unit;
        let end = guest + u64::from(32 - taken.leading_zeros()) * unit;
        ByteRange::new(from, end.min(self.header.size) - from)
    }

    fn reuse(&mut self, need: Need, host: u64) -> Reservation {
        let guest = need.covers.offset & !(self.cluster_size() - 1);
        let busy = self.busy.entry(guest).or_insert(Busy {
            host,
            taken: 0,
            users: 0,
            fresh: false,
            moving: false,
        });
        busy.taken |= need.taken;
        busy.users += 1;
        Reservation {
            covers: need.covers,
            offset: host + (need.covers.offset - guest),
            stored_len: None,
        }
    }

    /// New host clusters for `first`, and for those after it up to `end` as long
    /// as they need new ones too, in a row.
    fn place_fresh(&mut self, txn: &mut dyn Txn, first: Need, end: u64) -> Result<Reservation> {
        let cluster_size = self.cluster_size();
        let guest = first.covers.offset & !(cluster_size - 1);
        let mut needs = vec![first];
        let mut covers = first.covers;
        while covers.end() < end && covers.end().is_multiple_of(cluster_size) {
            match self.need(txn, covers.end(), end)? {
                Some(next) if next.host.is_none() && next.covers.offset == covers.end() => {
                    covers.len += next.covers.len;
                    needs.push(next);
                }
                _ => break,
            }
        }
        let (cluster, count) = self.allocate(txn, needs.len() as u64)?;
        needs.truncate(count as usize);
        let host = cluster << self.header.cluster_bits;
        for (i, need) in needs.iter().enumerate() {
            let host = host + i as u64 * cluster_size;
            let guest = guest + i as u64 * cluster_size;
            self.busy.insert(
                guest,
                Busy {
                    host,
                    taken: need.taken,
                    users: 1,
                    fresh: true,
                    moving: need.moving,
                },
            );
        }
        let end = needs.last().map_or(first.covers.end(), |n| n.covers.end());
        covers.len = end - covers.offset;
        Ok(Reservation {
            covers,
            offset: host + (covers.offset - guest),
            stored_len: None,
        })
    }

    fn reserve(&mut self, intent: u32, reservation: Reservation) -> Placement {
        let token = self.next_token;
        self.next_token += 1;
        self.reservations.insert(token, reservation);
        Placement {
            token,
            intent,
            covers: reservation.covers,
            slot: self.data_slot,
            offset: reservation.offset,
        }
    }

    /// The L2 table for `guest`, in a cluster of our own: made or copied if
    /// there is none yet.
    pub(crate) fn table_for_write(&mut self, txn: &mut dyn Txn, guest: u64) -> Result<u64> {
        let cluster_size = self.cluster_size();
        let old = self.l2_table(txn.files(), guest)?;
        if let Some(Host {
            offset,
            copied: true,
        }) = old
        {
            return Ok(offset);
        }
        let bits = self.header.cluster_bits;
        let (cluster, _) = self.allocate(txn, 1)?;
        let offset = cluster << bits;
        match old {
            None => {
                let range = ByteRange::new(offset, cluster_size);
                self.pages.zero_fresh(txn, Stage::Prepare, range)?;
            }
            Some(old) => {
                self.pages.emit(txn)?;
                let content = txn.read(IMAGE, old.offset, cluster_size as usize)?;
                self.pages
                    .write_fresh(txn, Stage::Prepare, offset, &content)?;
                self.releases.add(old.offset >> bits, 1);
            }
        }
        self.regions.add_table(offset);
        let at = self.l1_entry_at(guest)?;
        let entry = l1_encode(Host {
            offset,
            copied: true,
        });
        self.pages
            .write_u64(txn.files(), Stage::Mapping, at, entry)?;
        Ok(offset)
    }
}

fn out_of_space(e: &Error) -> bool {
    matches!(e.code, Errno::Enospc | Errno::Efbig)
}
