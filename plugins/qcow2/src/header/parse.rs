//! Bytes to a [`Header`], whatever the bytes are.

use outport_sdk::{Error, Reader, Result};

use super::extension::{Extension, kind};
use super::{
    BACKING_NAME_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Compression, Header, MAGIC, V2_LENGTH,
    V3_LENGTH_MIN, incompatible,
};

/// More extensions than any writer would store; bounds work on hostile headers.
const EXTENSIONS_MAX: usize = 256;

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
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
