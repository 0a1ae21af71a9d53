//! What no field of a header may say.

use outport_sdk::{Errno, Error, Result};

use super::{
    EXTENDED_CLUSTER_BITS_MIN, Header, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
    autoclear, incompatible,
};

impl Header {
    pub(super) fn check_features(&self) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown >> bit & 1 != 0)
                .map(|bit| self.feature_name(0, bit))
                .collect();
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                names.join(", ")
            )));
        }
        if self.extended_l2() && self.cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return Err(Error::invalid(
                "Extended L2 entries are only possible with clusters of at least 16384 bytes",
            ));
        }
        if self.autoclear & autoclear::BITMAPS != 0 && !self.has_bitmaps() {
            return Err(Error::invalid(
                "The bitmaps feature bit is set, but there is no bitmaps extension",
            ));
        }
        Ok(())
    }

    pub(super) fn check_numbers(&self) -> Result<()> {
        if self.crypt_method != 0 {
            return Err(Error::unsupported(format!(
                "Encrypted qcow2 images are not supported (encryption method {})",
                self.crypt_method
            )));
        }
        if self.refcount_order > 6 {
            return Err(Error::invalid(
                "Reference count entry width too large; may not exceed 64 bits",
            ));
        }
        if self.size > i64::MAX as u64 {
            return Err(Error::invalid("Image is larger than 2^63 bytes"));
        }
        if u64::from(self.l1_size) * 8 > L1_BYTES_MAX {
            return Err(Error::new(
                Errno::Efbig,
                "Active L1 table is larger than 32 MiB",
            ));
        }
        if u64::from(self.l1_size) < self.l1_entries_for(self.size) {
            return Err(Error::invalid("L1 table is too small"));
        }
        let table = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table == 0 {
            return Err(Error::invalid(
                "Image does not contain a reference count table",
            ));
        }
        if table > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Error::invalid(
                "Image does not have a sane reference count table: larger than 8 MiB",
            ));
        }
        if self.snapshot_count > SNAPSHOTS_MAX {
            return Err(Error::invalid("Too many internal snapshots"));
        }
        if self.has_data_file() && self.snapshot_count > 0 {
            return Err(Error::invalid(
                "Internal snapshots are impossible with an external data file",
            ));
        }
        Ok(())
    }

    /// Tables are aligned, apart from one another and inside a file of
    /// `file_size` bytes.
    pub(crate) fn check_tables(&self, file_size: u64) -> Result<()> {
        let cluster = self.cluster_size();
        let end = file_size
            .checked_next_multiple_of(cluster)
            .unwrap_or(u64::MAX);
        let mut tables = vec![(
            "refcount table",
            self.refcount_table_offset,
            u64::from(self.refcount_table_clusters) << self.cluster_bits,
        )];
        if self.l1_size > 0 {
            tables.push((
                "active L1 table",
                self.l1_offset,
                u64::from(self.l1_size) * 8,
            ));
        }
        if self.snapshot_count > 0 {
            tables.push(("snapshot table", self.snapshots_offset, 1));
        }
        tables.push(("header", 0, 1));
        for &(name, offset, len) in &tables {
            if !offset.is_multiple_of(cluster) {
                return Err(damaged(&format!(
                    "Offset {offset:#x} of the {name} is not aligned to a cluster"
                )));
            }
            if offset.checked_add(len).is_none_or(|e| e > end) {
                return Err(damaged(&format!(
                    "The {name} at offset {offset:#x} lies outside of the file ({file_size} bytes)"
                )));
            }
        }
        for (i, a) in tables.iter().enumerate() {
            for b in &tables[..i] {
                let (a_end, b_end) = (
                    a.1 + a.2.next_multiple_of(cluster),
                    b.1 + b.2.next_multiple_of(cluster),
                );
                if a.1 < b_end && b.1 < a_end {
                    return Err(damaged(&format!(
                        "The {} at offset {:#x} overlaps the {} at offset {:#x}",
                        a.0, a.1, b.0, b.1
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A header that contradicts itself: the operator is told what lists the rest of it.
fn damaged(what: &str) -> Error {
    Error::invalid(format!(
        "{what}. The image is damaged: qemu-img check lists the damage"
    ))
}
