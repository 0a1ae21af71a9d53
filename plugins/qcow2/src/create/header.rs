//! The header of a new image.

use outport_sdk::{Errno, Error, Result};

use super::layout::{Layout, too_large};
use super::options::Options;
use crate::header::{
    Compression, Extension, Header, V2_LENGTH, V3_LENGTH, autoclear, compatible, feature_names,
    incompatible,
};

/// The first cluster, up to the last byte in use.
pub(super) fn encode(options: &Options, layout: &Layout) -> Result<Vec<u8>> {
    let mut header = fields(options, layout)?;
    let formats = options.backing_fmt.clone().map(Extension::BackingFormat);
    let data_files = options.data_file.clone().map(Extension::DataFile);
    header.extensions = formats.into_iter().chain(data_files).collect();
    let without_names = header.serialise().map_err(|e| {
        Error::new(
            Errno::Enospc,
            format!(
                "The names of backing file, format and data file are too long: {}",
                e.message
            ),
        )
    })?;
    if options.version < 3 {
        return Ok(without_names);
    }
    // The feature names are a courtesy, left out where the cluster is too small.
    header.extensions.push(feature_names());
    Ok(header.serialise().unwrap_or(without_names))
}

fn fields(options: &Options, layout: &Layout) -> Result<Header> {
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let narrow = |value: u64| u32::try_from(value).map_err(|_| too_large());
    Ok(Header {
        version: options.version,
        backing_file: options.backing_file.clone(),
        cluster_bits: options.cluster_bits,
        size: options.size,
        crypt_method: 0,
        l1_size: narrow(layout.l1_entries)?,
        l1_offset: match layout.l1_table.clusters {
            0 => 0,
            _ => layout.l1_table.offset(layout)?,
        },
        refcount_table_offset: layout.refcount_table.offset(layout)?,
        refcount_table_clusters: narrow(layout.refcount_table.clusters)?,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: flag(options.data_file.is_some(), incompatible::DATA_FILE)
            | flag(options.zstd, incompatible::COMPRESSION)
            | flag(options.extended_l2, incompatible::EXTENDED_L2),
        compatible: flag(options.lazy_refcounts, compatible::LAZY_REFCOUNTS),
        autoclear: flag(options.data_file_raw, autoclear::DATA_FILE_RAW),
        refcount_order: options.refcount_order,
        header_length: if options.version < 3 {
            V2_LENGTH
        } else {
            V3_LENGTH
        },
        compression: if options.zstd {
            Compression::Zstd
        } else {
            Compression::Deflate
        },
        further_fields: Vec::new(),
        extensions: Vec::new(),
    })
}
