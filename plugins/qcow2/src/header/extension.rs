//! Header extensions (qcow2.rst: Header extensions): parsed, kept, written back.

use outport_sdk::{Error, Reader, Result};

use super::parse::text;

/// Their types.
pub(crate) mod kind {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const ENCRYPTION: u32 = 0x0537_be77;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
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

impl Extension {
    pub(super) fn parse(kind: u32, data: &[u8]) -> Result<Self> {
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

impl Extension {
    pub(super) fn serialise(&self, out: &mut Vec<u8>) {
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
