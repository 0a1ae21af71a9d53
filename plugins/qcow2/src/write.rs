//! Allocating writes: reserve, then map or give back.
//!
//! A placement is a host place for guest bytes that nothing points at yet. With
//! extended L2 entries several writes may fill one new cluster at the same time;
//! they share it through [`Busy`], and it is given back only if none of them is
//! committed.

use outport_sdk::{
    ByteRange, Errno, Error, Extent, Files, Placement, Result, Stage, Txn, WriteIntent, WriteKind,
};

use crate::image::Qcow2;
use crate::map::Extents;
use crate::pages::IMAGE;
use crate::refcount;
use crate::table::{Cluster, Host, Subclusters, l1_encode};

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

// === prepare ===

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

// === compressed clusters ===

impl Qcow2 {
    fn place_compressed(
        &mut self,
        txn: &mut dyn Txn,
        intent: u32,
        what: &WriteIntent,
        placements: &mut Vec<Placement>,
    ) -> Result<()> {
        let cluster_size = self.cluster_size();
        let guest = what.range.offset;
        if self.header.has_data_file() {
            return Err(Error::unsupported(
                "An image with an external data file cannot hold compressed clusters",
            ));
        }
        if !guest.is_multiple_of(cluster_size)
            || what.range.end() != (guest + cluster_size).min(self.header.size)
            || what.stored_len == 0
            || u64::from(what.stored_len) > cluster_size
        {
            return Err(Error::invalid(
                "A compressed write is not one whole cluster",
            ));
        }
        if self.busy.contains_key(&guest) {
            return Ok(());
        }
        self.table_for_write(txn, guest)?;
        let offset = self.pack(txn, u64::from(what.stored_len))?;
        let place = Cluster::Compressed {
            offset,
            stored_len: what.stored_len,
        };
        if self.coding.encode(place).is_none() {
            return Err(Error::new(
                Errno::Efbig,
                format!("Compressed data cannot be addressed at offset {offset:#x}"),
            ));
        }
        let taken = self.coding.all();
        self.busy.insert(
            guest,
            Busy {
                host: offset,
                taken,
                users: 1,
                fresh: true,
                moving: true,
            },
        );
        let covers = what.range;
        let stored_len = Some(what.stored_len);
        placements.push(self.reserve(
            intent,
            Reservation {
                covers,
                offset,
                stored_len,
            },
        ));
        Ok(())
    }

    /// A place for `len` bytes: behind the last compressed data if it fits into
    /// that cluster or the next one is free, else in a new cluster. Each cluster
    /// that it touches counts one reference.
    fn pack(&mut self, txn: &mut dyn Txn, len: u64) -> Result<u64> {
        let bits = self.header.cluster_bits;
        let tail = self.alloc.tail;
        let cluster = tail >> bits;
        let room = tail.next_multiple_of(self.cluster_size()) - tail;
        let max = refcount::max(self.header.refcount_order);
        if room > 0
            && self.refcount(txn.files(), cluster)? < max
            && (room >= len || self.allocate_at(txn, cluster + 1)?)
        {
            self.change_refcounts(txn.files(), cluster, 1, |_, n| n + 1)?;
            self.alloc.tail = tail + len;
            return Ok(tail);
        }
        let (cluster, _) = self.allocate(txn, 1)?;
        let offset = cluster << bits;
        self.alloc.tail = offset + len;
        Ok(offset)
    }

    /// The clusters that `len` bytes at `offset` touch: first and count.
    fn touched(&self, offset: u64, len: u32) -> (u64, u64) {
        let bits = self.header.cluster_bits;
        let last = offset.saturating_add(u64::from(len.max(1)) - 1);
        (offset >> bits, (last >> bits) - (offset >> bits) + 1)
    }
}

// === commit and abort ===

impl Qcow2 {
    pub(crate) fn commit(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<Vec<Extent>> {
        let mut extents = Extents::default();
        for token in tokens {
            let reservation = self.reservation(*token)?;
            for guest in self.clusters(reservation.covers) {
                let new = self.map_cluster(txn, reservation, guest)?;
                let mut whole = Extents::default();
                // The payload is written, so the file is long enough.
                self.push_cluster(&mut whole, guest, new, u64::MAX)
                    .map_err(Error::io)?;
                for extent in whole.into_list() {
                    extents.push_part(extent, reservation.covers);
                }
            }
        }
        Ok(extents.into_list())
    }

    fn reservation(&self, token: u64) -> Result<Reservation> {
        let found = self.reservations.get(&token).copied();
        found.ok_or_else(|| Error::invalid(format!("Unknown token {token}")))
    }

    /// Let the cluster at `guest` be where `reservation` says.
    fn map_cluster(
        &mut self,
        txn: &mut dyn Txn,
        reservation: Reservation,
        guest: u64,
    ) -> Result<Cluster> {
        let table = self.table_for_write(txn, guest)?;
        let old = self.cluster(txn.files(), table, guest)?;
        let new = match reservation.stored_len {
            // As it will be read again: up to the end of the last sector.
            Some(len) => {
                let offset = reservation.offset;
                let end = (offset + u64::from(len)).next_multiple_of(512);
                Cluster::Compressed {
                    offset,
                    stored_len: (end - offset) as u32,
                }
            }
            None => self.merged(reservation, guest, old),
        };
        self.set_cluster(txn.files(), table, guest, new)?;
        let kept = |host: Host| match new {
            Cluster::Standard {
                host: Some(new), ..
            } => new.offset == host.offset,
            _ => false,
        };
        match old {
            Cluster::Standard {
                host: Some(host), ..
            } if kept(host) => {}
            old => self.release(old),
        }
        Ok(new)
    }

    /// The standard cluster that `old` becomes.
    fn merged(&self, reservation: Reservation, guest: u64, old: Cluster) -> Cluster {
        let covers = reservation.covers;
        let from = covers.offset.max(guest) - guest;
        let to = (covers.end() - guest).min(self.cluster_size());
        let unit = self.unit();
        let taken = self
            .coding
            .bits((from / unit) as u32, to.div_ceil(unit) as u32);
        let offset = (guest + reservation.offset) - covers.offset;
        let mut sub = Subclusters::default();
        if let Cluster::Standard { host, sub: before } = old {
            sub.zero = before.zero;
            if host.is_some_and(|h| h.offset == offset) {
                sub.allocated = before.allocated;
            }
        }
        sub.allocated |= taken;
        sub.zero &= !taken;
        Cluster::Standard {
            host: Some(Host {
                offset,
                copied: true,
            }),
            sub,
        }
    }

    /// Nothing in this image refers to the space of `old` any more.
    pub(crate) fn release(&mut self, old: Cluster) {
        if self.header.has_data_file() {
            return;
        }
        match old {
            Cluster::Standard {
                host: Some(host), ..
            } => {
                self.releases
                    .add(host.offset >> self.header.cluster_bits, 1);
            }
            Cluster::Standard { host: None, .. } => {}
            Cluster::Compressed { offset, stored_len } => {
                let (first, count) = self.touched(offset, stored_len);
                self.releases.add(first, count);
            }
        }
    }

    /// After a commit succeeded: these tokens are used up.
    pub(crate) fn forget_tokens(&mut self, tokens: &[u64]) {
        for token in tokens {
            let Some(reservation) = self.reservations.remove(token) else {
                continue;
            };
            for guest in self.clusters(reservation.covers) {
                if let Some(busy) = self.busy.get_mut(&guest) {
                    busy.users -= 1;
                    busy.fresh = false;
                    if busy.users == 0 {
                        self.busy.remove(&guest);
                    }
                }
            }
        }
    }

    /// After a prepare failed: none of its tokens was handed out.
    pub(crate) fn forget_tokens_since(&mut self, first: u64) {
        let tokens: Vec<u64> = (first..self.next_token).collect();
        self.forget_tokens(&tokens);
    }

    pub(crate) fn abort(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<()> {
        for token in tokens {
            let reservation = self.reservation(*token)?;
            self.reservations.remove(token);
            for guest in self.clusters(reservation.covers) {
                let Some(busy) = self.busy.get_mut(&guest) else {
                    continue;
                };
                busy.users -= 1;
                let busy = *busy;
                if busy.users > 0 {
                    continue;
                }
                self.busy.remove(&guest);
                if busy.fresh {
                    let (first, count) = match reservation.stored_len {
                        Some(len) => self.touched(reservation.offset, len),
                        None => (busy.host >> self.header.cluster_bits, 1),
                    };
                    self.drop_references(txn.files(), first, count)?;
                }
            }
        }
        Ok(())
    }
}
