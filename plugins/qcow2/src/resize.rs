//! A new guest-visible length.

use outport_sdk::{ByteRange, DiscardKind, Errno, Error, Geometry, Result, Stage, Txn};

use crate::header::{L1_BYTES_MAX, field};
use crate::image::Qcow2;
use crate::pages::IMAGE;
use crate::table::Cluster;

impl Qcow2 {
    pub(crate) fn resize_to(&mut self, txn: &mut dyn Txn, size: u64) -> Result<Geometry> {
        if !size.is_multiple_of(512) || size > i64::MAX as u64 {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if self.header.version < 3 && !self.snapshots.is_empty() {
            return Err(Error::unsupported(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        if size < self.header.size {
            self.shrink(txn, size)?;
        } else if size > self.header.size {
            self.grow(txn, size)?;
        }
        Ok(self.geometry())
    }

    // === down ===

    fn shrink(&mut self, txn: &mut dyn Txn, size: u64) -> Result<()> {
        if !self.snapshots.is_empty() {
            return Err(Error::unsupported(
                "Can't shrink an image which has snapshots",
            ));
        }
        let (cluster_size, span) = (self.cluster_size(), self.header.l2_span());
        let start = size.next_multiple_of(cluster_size);
        if self.busy.keys().any(|guest| *guest >= start) {
            return Err(Error::new(
                Errno::Ebusy,
                "Writes past the new end are in flight",
            ));
        }
        let end = self.header.size;
        self.cut_last_cluster(txn, size)?;
        let mut guest = start;
        while guest < end {
            let table_end = (guest - guest % span).saturating_add(span);
            if let Some(table) = self.l2_table(txn.files(), guest)? {
                let whole = guest.is_multiple_of(span);
                self.unmap(txn, table.offset, guest, table_end.min(end), whole)?;
                if whole {
                    let at = self.l1_entry_at(guest)?;
                    self.pages.write_u64(txn.files(), Stage::Mapping, at, 0)?;
                    self.releases
                        .add(table.offset >> self.header.cluster_bits, 1);
                }
                self.pages.emit(txn)?;
            }
            guest = table_end;
        }
        self.header.size = size;
        txn.write(IMAGE, Stage::Mapping, field::SIZE, &size.to_be_bytes())?;
        if self.header.data_file_raw() {
            txn.truncate(self.data_slot, size)?;
            self.data_len = self.data_len.min(size);
        }
        Ok(())
    }

    /// Subclusters past the new end must not come back when the image grows.
    /// (The host zeroes the rest of the last one, and of a compressed cluster.)
    fn cut_last_cluster(&mut self, txn: &mut dyn Txn, size: u64) -> Result<()> {
        let from = size.next_multiple_of(self.unit());
        let to = size
            .next_multiple_of(self.cluster_size())
            .min(self.header.size);
        if from >= to {
            return Ok(());
        }
        let rest = ByteRange::new(from, to - from);
        match self.discard_clusters(txn, rest, DiscardKind::ZeroKeep) {
            Err(e) if e.code == Errno::Enotsup => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Release the clusters `from..to` of one L2 table; `whole`: the table goes
    /// too, its entries need no update.
    fn unmap(
        &mut self,
        txn: &mut dyn Txn,
        table: u64,
        from: u64,
        to: u64,
        whole: bool,
    ) -> Result<()> {
        for guest in self.clusters(ByteRange::new(from, to - from)) {
            let old = self.cluster(txn.files(), table, guest)?;
            if old.is_unallocated() {
                continue;
            }
            if !whole {
                self.set_cluster(txn.files(), table, guest, Cluster::UNALLOCATED)?;
            }
            self.release(old);
        }
        Ok(())
    }

    // === up ===

    fn grow(&mut self, txn: &mut dyn Txn, size: u64) -> Result<()> {
        let old_size = self.header.size;
        let entries = self.header.l1_entries_for(size);
        if entries * 8 > L1_BYTES_MAX {
            return Err(Error::new(
                Errno::Efbig,
                "The L1 table would be larger than 32 MiB",
            ));
        }
        if entries > u64::from(self.header.l1_size) {
            self.grow_l1(txn, entries as u32)?;
        }
        self.header.size = size;
        self.write_size(txn)?;
        self.hide_backing(txn, old_size, size)?;
        if self.header.data_file_raw() {
            txn.grow(self.data_slot, size)?;
        }
        Ok(())
    }

    /// Size, L1 size and L1 offset lie next to one another: one write.
    fn write_size(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let mut bytes = self.header.size.to_be_bytes().to_vec();
        bytes.extend(self.header.crypt_method.to_be_bytes());
        bytes.extend(self.header.l1_size.to_be_bytes());
        bytes.extend(self.header.l1_offset.to_be_bytes());
        txn.write(IMAGE, Stage::Mapping, field::SIZE, &bytes)
    }

    /// Room for `entries` L1 entries: in place if the table's last cluster has
    /// it, else in a new place.
    fn grow_l1(&mut self, txn: &mut dyn Txn, entries: u32) -> Result<()> {
        let bits = self.header.cluster_bits;
        let old_at = self.header.l1_offset;
        let old_bytes = u64::from(self.header.l1_size) * 8;
        let new_bytes = u64::from(entries) * 8;
        let room = old_bytes.next_multiple_of(self.cluster_size());
        self.pages.emit(txn)?;
        if new_bytes <= room {
            let rest = ByteRange::new(old_at + old_bytes, new_bytes - old_bytes);
            self.pages.zero_fresh(txn, Stage::Prepare, rest)?;
        } else {
            let clusters = new_bytes.div_ceil(self.cluster_size());
            let first = self.allocate_row(txn, clusters)?;
            self.pages.emit(txn)?;
            // At most 32 MiB: checked against the same limit as at opening.
            let mut content = vec![0; (clusters << bits) as usize];
            for (i, chunk) in content[..old_bytes as usize]
                .chunks_mut(1 << 20)
                .enumerate()
            {
                txn.read_into(IMAGE, old_at + ((i as u64) << 20), chunk)?;
            }
            self.header.l1_offset = first << bits;
            self.pages
                .write_fresh(txn, Stage::Prepare, self.header.l1_offset, &content)?;
            self.releases.add(old_at >> bits, room >> bits);
        }
        self.header.l1_size = entries;
        let new_at = self.header.l1_offset;
        self.regions
            .move_fixed(old_at, new_at, new_bytes, "active L1 table");
        Ok(())
    }

    /// What is new must read as zeroes, also where the backing file goes on.
    fn hide_backing(&mut self, txn: &mut dyn Txn, old_size: u64, size: u64) -> Result<()> {
        if !self.has_backing() {
            return Ok(());
        }
        let shown = self.backing_len.unwrap_or(u64::MAX).min(size);
        let mut from = old_size.next_multiple_of(self.unit());
        let to = shown
            .checked_next_multiple_of(self.unit())
            .unwrap_or(size)
            .min(size);
        if from < to && !self.coding.can_zero() {
            return Err(Error::unsupported(
                "A version 2 image cannot grow over a longer backing file",
            ));
        }
        while from < to {
            let rest = ByteRange::new(from, to - from);
            let done = self.discard_clusters(txn, rest, DiscardKind::ZeroUnmap)?;
            from = done.last().map_or(to, |e| e.range.end());
            self.pages.emit(txn)?;
        }
        Ok(())
    }
}
