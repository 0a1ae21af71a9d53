//! Headers there and back, and headers that lie.

use super::extension::FeatureName;
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
