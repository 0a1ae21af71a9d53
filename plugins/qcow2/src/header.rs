//! The header and its extensions: bytes in, bytes out, no file in sight.
//!
//! Every field is checked here once, so that the rest of the plugin can compute
//! with it. What `parse` does not understand it keeps, and `serialise` gives
//! back (qcow2.rst: Header, Additional fields, Header extensions).

use outport_sdk::{Error, Reader, Result};

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

/// More extensions than any writer would store; bounds work on hostile headers.
const EXTENSIONS_MAX: usize = 256;

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

mod kind {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
    pub(super) const ENCRYPTION: u32 = 0x0537_be77;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
}

/// How compressed clusters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate; QEMU calls it "zlib".
    Deflate,
    Zstd,
}

/// One row of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub(crate) group: u8,
    pub(crate) bit: u8,
    pub(crate) name: String,
}

/// A header extension, in the order of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Extension {
    BackingFormat(String),
    DataFile(String),
    FeatureNames(Vec<FeatureName>),
    Bitmaps {
        count: u32,
        directory_size: u64,
        directory_offset: u64,
    },
    Encryption {
        offset: u64,
        len: u64,
    },
    Unknown {
        kind: u32,
        data: Vec<u8>,
    },
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

// === parse ===

impl Header {
    /// The cluster size exponent, from at least the first 24 bytes.
    pub(crate) fn peek_cluster_bits(head: &[u8]) -> Result<u32> {
        let mut r = Reader::new(head);
        if r.be_u32()? != MAGIC {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let version = r.be_u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 version {version}"
            )));
        }
        r.skip(12)?;
        let bits = r.be_u32()?;
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Err(Error::invalid(format!(
                "Unsupported cluster size: 2^{bits} (512 bytes to 2 MiB are possible)"
            )));
        }
        Ok(bits)
    }

    /// Parse the first cluster of an image (or what there is of it). Says
    /// nothing about where tables may lie: that needs the file's length, see
    /// [`Header::check_tables`].
    pub(crate) fn parse(cluster: &[u8]) -> Result<Self> {
        let cluster_bits = Self::peek_cluster_bits(cluster)?;
        let cluster = &cluster[..cluster.len().min(1 << cluster_bits)];
        let mut r = Reader::new(cluster);
        r.skip(4)?;
        let version = r.be_u32()?;
        let backing_offset = r.be_u64()?;
        let backing_len = r.be_u32()?;
        r.skip(4)?;
        let mut header = Self {
            version,
            backing_file: None,
            cluster_bits,
            size: r.be_u64()?,
            crypt_method: r.be_u32()?,
            l1_size: r.be_u32()?,
            l1_offset: r.be_u64()?,
            refcount_table_offset: r.be_u64()?,
            refcount_table_clusters: r.be_u32()?,
            snapshot_count: r.be_u32()?,
            snapshots_offset: r.be_u64()?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_LENGTH,
            compression: Compression::Deflate,
            further_fields: Vec::new(),
            extensions: Vec::new(),
        };
        let mut compression_type = 0;
        if version >= 3 {
            compression_type = header.parse_v3(&mut r)?;
        }
        // Extensions first: their feature names make a better refusal.
        header.parse_extensions(cluster, backing_offset)?;
        header.check_features()?;
        header.compression = match compression_type {
            0 => Compression::Deflate,
            1 => Compression::Zstd,
            n => return Err(Error::unsupported(format!("Unknown compression type: {n}"))),
        };
        if (compression_type != 0) != (header.incompatible & incompatible::COMPRESSION != 0) {
            return Err(Error::invalid(
                "Compression type and the incompatible feature bit for it disagree",
            ));
        }
        header.backing_file = parse_backing_name(cluster, backing_offset, backing_len)?;
        header.check_numbers()?;
        Ok(header)
    }

    /// The version 3 fields; returns the compression type.
    fn parse_v3(&mut self, r: &mut Reader<'_>) -> Result<u8> {
        self.incompatible = r.be_u64()?;
        self.compatible = r.be_u64()?;
        self.autoclear = r.be_u64()?;
        self.refcount_order = r.be_u32()?;
        self.header_length = r.be_u32()?;
        if self.header_length < V3_LENGTH_MIN || !self.header_length.is_multiple_of(8) {
            return Err(Error::invalid(format!(
                "qcow2 header length {} is not a multiple of 8 of at least 104",
                self.header_length
            )));
        }
        if u64::from(self.header_length) > self.cluster_size() {
            return Err(Error::invalid("qcow2 header exceeds cluster size"));
        }
        let mut further = Reader::new(r.take((self.header_length - V3_LENGTH_MIN) as usize)?);
        if further.remaining() == 0 {
            return Ok(0);
        }
        let compression_type = further.u8()?;
        self.further_fields = further.take(further.remaining())?.to_vec();
        Ok(compression_type)
    }

    fn parse_extensions(&mut self, cluster: &[u8], backing_offset: u64) -> Result<()> {
        let end = match usize::try_from(backing_offset) {
            Ok(at) if at != 0 => at.min(cluster.len()),
            _ => cluster.len(),
        };
        let mut r = Reader::new(&cluster[..end]);
        r.skip(self.header_length as usize)?;
        while r.remaining() >= 8 {
            let at = r.position();
            let (kind, len) = (r.be_u32()?, r.be_u32()? as usize);
            if kind == kind::END {
                break;
            }
            if len > r.remaining() {
                return Err(Error::invalid(format!(
                    "Header extension {kind:#x} at offset {at} is too large"
                )));
            }
            if self.extensions.len() == EXTENSIONS_MAX {
                return Err(Error::invalid("Too many header extensions"));
            }
            let data = r.take(len)?;
            self.extensions.push(Extension::parse(kind, data)?);
            r.skip(
                len.next_multiple_of(8)
                    .saturating_sub(len)
                    .min(r.remaining()),
            )?;
        }
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
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

    fn check_numbers(&self) -> Result<()> {
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
                outport_sdk::Errno::Efbig,
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
                return Err(Error::invalid(format!(
                    "Offset {offset:#x} of the {name} is not aligned to a cluster"
                )));
            }
            if offset.checked_add(len).is_none_or(|e| e > end) {
                return Err(Error::invalid(format!(
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
                    return Err(Error::invalid(format!(
                        "The {} at offset {:#x} overlaps the {} at offset {:#x}",
                        a.0, a.1, b.0, b.1
                    )));
                }
            }
        }
        Ok(())
    }
}

fn parse_backing_name(cluster: &[u8], offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 {
        return Ok(None);
    }
    if len > BACKING_NAME_MAX {
        return Err(Error::invalid("Backing file name too long"));
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|at| cluster.get(at..at.checked_add(len as usize)?))
        .ok_or_else(|| Error::invalid("Invalid backing file offset"))?;
    Ok(Some(text(name)))
}

/// Names in images have no declared encoding: what is not UTF-8 is replaced, and
/// then names no file that an operator would grant by mistake.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Extension {
    fn parse(kind: u32, data: &[u8]) -> Result<Self> {
        let mut r = Reader::new(data);
        Ok(match kind {
            kind::BACKING_FORMAT => Self::BackingFormat(text(data)),
            kind::DATA_FILE => Self::DataFile(text(data)),
            kind::FEATURE_NAMES => Self::FeatureNames(
                data.chunks_exact(48)
                    .map(|row| FeatureName {
                        group: row[0],
                        bit: row[1],
                        name: text(&row[2..]).trim_end_matches('\0').to_owned(),
                    })
                    .collect(),
            ),
            kind::BITMAPS if data.len() == 24 => {
                let count = r.be_u32()?;
                r.skip(4)?;
                Self::Bitmaps {
                    count,
                    directory_size: r.be_u64()?,
                    directory_offset: r.be_u64()?,
                }
            }
            kind::ENCRYPTION if data.len() == 16 => Self::Encryption {
                offset: r.be_u64()?,
                len: r.be_u64()?,
            },
            kind::BITMAPS | kind::ENCRYPTION => {
                return Err(Error::invalid(format!(
                    "Header extension {kind:#x} has an invalid length ({})",
                    data.len()
                )));
            }
            kind => Self::Unknown {
                kind,
                data: data.to_vec(),
            },
        })
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

impl Extension {
    fn serialise(&self, out: &mut Vec<u8>) {
        let (kind, data) = match self {
            Self::BackingFormat(name) => (kind::BACKING_FORMAT, name.as_bytes().to_vec()),
            Self::DataFile(name) => (kind::DATA_FILE, name.as_bytes().to_vec()),
            Self::FeatureNames(names) => {
                let mut rows = Vec::with_capacity(names.len() * 48);
                for n in names {
                    let start = rows.len();
                    rows.extend([n.group, n.bit]);
                    rows.extend(n.name.bytes().take(46));
                    rows.resize(start + 48, 0);
                }
                (kind::FEATURE_NAMES, rows)
            }
            Self::Bitmaps {
                count,
                directory_size,
                directory_offset,
            } => {
                let mut data = count.to_be_bytes().to_vec();
                data.extend([0; 4]);
                data.extend(directory_size.to_be_bytes());
                data.extend(directory_offset.to_be_bytes());
                (kind::BITMAPS, data)
            }
            Self::Encryption { offset, len } => {
                let mut data = offset.to_be_bytes().to_vec();
                data.extend(len.to_be_bytes());
                (kind::ENCRYPTION, data)
            }
            Self::Unknown { kind, data } => (*kind, data.clone()),
        };
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(&data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The feature names that this plugin writes into new images.
pub(crate) fn feature_names() -> Extension {
    let rows: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let row = |&(group, bit, name): &(u8, u8, &str)| FeatureName {
        group,
        bit,
        name: name.into(),
    };
    Extension::FeatureNames(rows.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample() -> Header {
        Header {
            version: 3,
            backing_file: Some("base.raw".into()),
            cluster_bits: 16,
            size: 10 << 20,
            crypt_method: 0,
            l1_size: 1,
            l1_offset: 0x3_0000,
            refcount_table_offset: 0x1_0000,
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: incompatible::COMPRESSION,
            compatible: 0x8000_0000_0000_0001,
            autoclear: 0,
            refcount_order: 4,
            header_length: V3_LENGTH + 8,
            compression: Compression::Zstd,
            further_fields: vec![0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
            extensions: vec![
                Extension::BackingFormat("raw".into()),
                Extension::Unknown {
                    kind: 0x1234,
                    data: vec![1, 2, 3],
                },
                feature_names(),
            ],
        }
    }

    #[test]
    fn parse_gives_back_what_serialise_wrote() {
        let bytes = sample().serialise().unwrap();
        assert_eq!(Header::parse(&bytes).unwrap(), sample());
    }

    #[test]
    fn unknown_incompatible_bits_are_named() {
        let mut header = sample();
        header.incompatible |= 1 << 9 | 1 << 40;
        header.extensions[2] = Extension::FeatureNames(vec![FeatureName {
            group: 0,
            bit: 9,
            name: "holograms".into(),
        }]);
        let error = Header::parse(&header.serialise().unwrap()).unwrap_err();
        assert_eq!(
            error.message,
            "Unsupported qcow2 feature(s): 'holograms' (bit 9), bit 40"
        );
    }

    #[test]
    fn no_prefix_of_a_header_panics() {
        let bytes = sample().serialise().unwrap();
        for end in 0..bytes.len() {
            let _ = Header::parse(&bytes[..end]);
        }
    }

    #[test]
    fn tables_must_lie_apart_inside_the_file() {
        let mut header = sample();
        header.check_tables(0x3_0008).unwrap();
        header.l1_offset = 0x1_0000;
        assert!(
            header
                .check_tables(0x3_0008)
                .unwrap_err()
                .message
                .contains("overlaps")
        );
        header.l1_offset = 0x8_0000;
        assert!(
            header
                .check_tables(0x3_0008)
                .unwrap_err()
                .message
                .contains("outside")
        );
    }
}
