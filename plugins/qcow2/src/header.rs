//! The header and its extensions: bytes in, bytes out, no file in sight.
//!
//! Every field is checked here once, so that the rest of the plugin can compute
//! with it. What `parse` does not understand it keeps, and `serialise` gives
//! back (qcow2.rst: Header, Additional fields, Header extensions).

mod check;
mod extension;
mod parse;
#[cfg(test)]
pub(crate) mod tests;

use outport_sdk::{Error, Result};

pub(crate) use extension::{Extension, feature_names, kind as extension_kind};

/// "QFI\xfb".
pub(crate) const MAGIC: u32 = 0x5146_49fb;

/// Length of a version 2 header.
pub(crate) const V2_LENGTH: u32 = 72;

/// Length of the mandatory part of a version 3 header.
pub(crate) const V3_LENGTH_MIN: u32 = 104;

/// Length of the version 3 header that this plugin writes: up to and with the
/// compression type and its padding.
pub(crate) const V3_LENGTH: u32 = 112;

/// Smallest and largest cluster: 512 bytes (specification), 2 MiB (QEMU's limit,
/// and the largest unit of the plugin contract).
pub(crate) const CLUSTER_BITS_MIN: u32 = 9;
pub(crate) const CLUSTER_BITS_MAX: u32 = 21;

/// Subclusters of less than 512 bytes cannot be addressed.
pub(crate) const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;

/// QEMU's limit for an L1 table, and so for what an image can make us read.
pub(crate) const L1_BYTES_MAX: u64 = 32 << 20;

/// QEMU's limit for the refcount table.
pub(crate) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// QEMU's limit for the number of internal snapshots.
pub(crate) const SNAPSHOTS_MAX: u32 = 65_536;

/// Longest backing file name (specification).
pub(crate) const BACKING_NAME_MAX: u32 = 1023;

/// Offsets in L1 and L2 entries have 56 bits.
pub(crate) const HOST_OFFSET_MAX: u64 = 1 << 56;

/// Bits of `incompatible`.
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1 << 0;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    pub(crate) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of `compatible`.
pub(crate) mod compatible {
    pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear`.
pub(crate) mod autoclear {
    pub(crate) const BITMAPS: u64 = 1 << 0;
    pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
    pub(crate) const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// Where the fields lie that change while an image is open.
pub(crate) mod field {
    pub(crate) const SIZE: u64 = 24;
    pub(crate) const REFCOUNT_TABLE: u64 = 48;
    pub(crate) const INCOMPATIBLE: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
}

/// How compressed clusters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate; QEMU calls it "zlib".
    Deflate,
    Zstd,
}

/// A parsed header. Fields that version 2 lacks have their implied values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) backing_file: Option<String>,
    pub(crate) cluster_bits: u32,
    /// Guest-visible length in bytes.
    pub(crate) size: u64,
    pub(crate) crypt_method: u32,
    /// Entries of the active L1 table.
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshot_count: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    /// Width of a refcount is `1 << refcount_order` bits.
    pub(crate) refcount_order: u32,
    pub(crate) header_length: u32,
    pub(crate) compression: Compression,
    /// Additional fields after the compression type, as they are.
    pub(crate) further_fields: Vec<u8>,
    pub(crate) extensions: Vec<Extension>,
}

impl Header {
    pub(crate) const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) const fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    pub(crate) const fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    pub(crate) const fn data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    pub(crate) const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Bytes of one L2 entry.
    pub(crate) const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of one L2 table.
    pub(crate) const fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L2 table maps.
    pub(crate) const fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a guest-visible length of `size` bytes needs.
    pub(crate) const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    pub(crate) fn backing_format(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(name.as_str()),
            _ => None,
        })
    }

    pub(crate) fn data_file_name(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::DataFile(name) => Some(name.as_str()),
            _ => None,
        })
    }

    pub(crate) fn has_bitmaps(&self) -> bool {
        self.extensions
            .iter()
            .any(|e| matches!(e, Extension::Bitmaps { .. }))
    }

    /// How many bitmaps there are, and length and place of their directory, while the autoclear
    /// bit says that the extension is right.
    pub(crate) fn active_bitmaps(&self) -> Option<(u32, u64, u64)> {
        if self.autoclear & autoclear::BITMAPS == 0 {
            return None;
        }
        self.extensions.iter().find_map(|e| match *e {
            Extension::Bitmaps {
                count,
                directory_size,
                directory_offset,
            } => Some((count, directory_size, directory_offset)),
            _ => None,
        })
    }

    /// The image's own name for a feature bit, else its number in words.
    fn feature_name(&self, group: u8, bit: u32) -> String {
        let named = self.extensions.iter().find_map(|e| match e {
            Extension::FeatureNames(names) => names
                .iter()
                .find(|n| n.group == group && u32::from(n.bit) == bit),
            _ => None,
        });
        match named {
            Some(n) => format!("'{}' (bit {bit})", n.name),
            None => format!("bit {bit}"),
        }
    }
}

// === serialise ===

impl Header {
    /// The bytes from offset 0 to the end of the backing file name. An error if
    /// they do not fit into one cluster.
    pub(crate) fn serialise(&self) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]); // backing file: filled in below
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.snapshot_count.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(self.header_length.to_be_bytes());
            if self.header_length > V3_LENGTH_MIN {
                out.push(match self.compression {
                    Compression::Deflate => 0,
                    Compression::Zstd => 1,
                });
                out.extend(&self.further_fields);
                out.resize(self.header_length as usize, 0);
            }
        }
        for extension in &self.extensions {
            extension.serialise(&mut out);
        }
        out.extend([0; 8]); // end of the extensions
        if let Some(name) = &self.backing_file {
            if name.len() > BACKING_NAME_MAX as usize {
                return Err(Error::invalid("Backing file name too long"));
            }
            let at = out.len() as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend(name.as_bytes());
        }
        if out.len() as u64 > self.cluster_size() {
            return Err(Error::invalid(
                "The qcow2 header does not fit into one cluster",
            ));
        }
        Ok(out)
    }
}
