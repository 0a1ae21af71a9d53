//! Compressed clusters: a place for their bytes, one behind the other.

use outport_sdk::{Errno, Error, Placement, Result, Txn, WriteIntent};

use super::{Busy, Reservation};
use crate::image::Qcow2;
use crate::refcount;
use crate::table::Cluster;

impl Qcow2 {
    pub(super) fn place_compressed(
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
    pub(super) fn touched(&self, offset: u64, len: u32) -> (u64, u64) {
        let bits = self.header.cluster_bits;
        let last = offset.saturating_add(u64::from(len.max(1)) - 1);
        (offset >> bits, (last >> bits) - (offset >> bits) + 1)
    }
}
