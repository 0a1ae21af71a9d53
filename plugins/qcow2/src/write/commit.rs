//! The end of a reservation: mapped, or given back.

use outport_sdk::{Error, Extent, Result, Txn};

use super::Reservation;
use crate::image::Qcow2;
use crate::map::Extents;
use crate::table::{Cluster, Host, Subclusters};

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
