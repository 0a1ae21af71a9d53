//! The verifier against honest and lying answers.

use super::*;
use crate::format::{
    Child, ChildKind, Extent, Location, Placement, Stage, TxnOp, WriteIntent, WriteKind,
};

const GEOMETRY: Geometry = Geometry {
    size: 1 << 20,
    unit: 4096,
    cluster_size: 65536,
    zero_granularity: 0,
    discard_granularity: 0,
};

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn raw(guest: u64, len: u64, offset: u64, in_place: bool) -> Extent {
    Extent {
        range: range(guest, len),
        at: Location::Raw {
            slot: 0,
            offset,
            in_place,
        },
    }
}

fn check(v: &mut Verifier, extents: &[Extent]) -> Result<(), Fault> {
    let pending = Pending::default();
    let all = range(0, 1 << 40);
    let claims = v.extents(range(0, 4096), extents, all, &pending, &|_| 1 << 20)?;
    v.adopt(&pending, claims);
    Ok(())
}

fn write_metadata(v: &mut Verifier, at: u64, len: usize) -> Result<(), Fault> {
    let pending = v.transaction(&[TxnOp::Write {
        slot: 0,
        stage: Stage::Prepare,
        offset: at,
        data: vec![0; len],
    }])?;
    v.adopt(&pending, Claims::default());
    Ok(())
}

#[test]
fn honest_answers_pass_again_and_again() {
    let mut v = Verifier::new(1, &GEOMETRY);
    let e = [raw(0, 65536, 65536, true), raw(65536, 65536, 131_072, true)];
    check(&mut v, &e).unwrap();
    check(&mut v, &e).unwrap();
    check(&mut v, &e[..1]).unwrap();
}

#[test]
fn two_guest_ranges_on_the_same_bytes_are_a_lie() {
    let mut v = Verifier::new(1, &GEOMETRY);
    check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
    let lie = [raw(0, 65536, 65536, true), raw(65536, 4096, 69632, true)];
    let fault = check(&mut v, &lie).unwrap_err();
    assert!(
        fault.message.contains("is mapped for guest offset 0x10000"),
        "{fault}"
    );
    // Reading the same bytes twice is allowed: snapshots share clusters.
    check(&mut v, &[raw(0, 4096, 65536, false)]).unwrap();
}

#[test]
fn data_over_metadata_is_a_lie_both_ways() {
    let mut v = Verifier::new(1, &GEOMETRY);
    write_metadata(&mut v, 65536, 512).unwrap();
    assert!(check(&mut v, &[raw(0, 65536, 65536, true)]).is_err());
    v.released(SlotRange {
        slot: 0,
        range: range(65536, 65536),
    });
    check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
    assert!(write_metadata(&mut v, 65536 + 512, 512).is_err());
}

#[test]
fn gaps_misalignment_and_ends_are_checked() {
    let mut v = Verifier::new(1, &GEOMETRY);
    assert!(check(&mut v, &[]).is_err());
    assert!(check(&mut v, &[raw(4096, 4096, 0, false)]).is_err());
    assert!(check(&mut v, &[raw(0, 4096, 0, false), raw(8192, 4096, 0, false)]).is_err());
    assert!(check(&mut v, &[raw(0, 100, 0, false)]).is_err());
    assert!(check(&mut v, &[raw(0, 4096, 2 << 20, false)]).is_err());
    let other = Extent {
        range: range(0, 4096),
        at: Location::Raw {
            slot: 3,
            offset: 0,
            in_place: false,
        },
    };
    assert!(check(&mut v, &[other]).is_err());
}

#[test]
fn evicted_and_disowned_ranges_can_be_owned_again() {
    let mut v = Verifier::new(1, &GEOMETRY);
    check(&mut v, &[raw(0, 131_072, 65536, true)]).unwrap();
    v.evict(range(65536, 65536));
    check(&mut v, &[raw(0, 65536, 65536, true)]).unwrap();
    let moved = [
        raw(0, 65536, 65536, true),
        raw(65536, 4096, 131_072 + 8192, true),
    ];
    check(&mut v, &moved).unwrap();
    v.disown(0, range(65536, 65536));
    check(&mut v, &[raw(0, 4096, 4096, true)]).unwrap();
}

#[test]
fn a_refused_answer_leaves_no_trace() {
    let mut v = Verifier::new(1, &GEOMETRY);
    let lie = [raw(0, 4096, 65536, true), raw(4096, 4096, 65536, true)];
    assert!(check(&mut v, &lie).is_err());
    // The same bytes for another guest range: the lie owned nothing.
    check(
        &mut v,
        &[raw(0, 4096, 4096, false), raw(4096, 4096, 65536, true)],
    )
    .unwrap();
}

#[test]
fn freed_space_is_nobodys_until_it_was_given_back() {
    let mut v = Verifier::new(1, &GEOMETRY);
    let freed = SlotRange {
        slot: 0,
        range: range(65536, 65536),
    };
    v.freed(freed);
    assert!(check(&mut v, &[raw(0, 4096, 65536, true)]).is_err());
    v.released(freed);
    check(&mut v, &[raw(0, 4096, 65536, true)]).unwrap();
}

#[test]
fn a_transaction_is_bounded() {
    let v = Verifier::new(1, &GEOMETRY);
    let zero = |stage, len| TxnOp::Zero {
        slot: 0,
        stage,
        range: range(0, len),
    };
    v.transaction(&[zero(Stage::Prepare, 1 << 40)]).unwrap();
    let fault = v.transaction(&[zero(Stage::Mapping, 1 << 40)]).unwrap_err();
    assert_eq!(fault.kind, FaultKind::BadAnswer);
    let grow = TxnOp::Grow {
        slot: 0,
        size: u64::MAX,
    };
    assert!(v.transaction(&[grow]).is_err());
}

fn placed(token: u64, covers: ByteRange, offset: u64) -> Placement {
    Placement {
        token,
        intent: 0,
        covers,
        slot: 0,
        offset,
    }
}

fn place(v: &Verifier, kind: WriteKind, placements: &[Placement]) -> Result<Claims, Fault> {
    let intent = WriteIntent {
        range: range(0, 65536),
        kind,
        stored_len: 100,
    };
    let pending = v.transaction(&[])?;
    v.placements(&[intent], placements, &pending, &|token| token == 99)
}

#[test]
fn placements_are_checked_before_anything_is_written_there() {
    let mut v = Verifier::new(1, &GEOMETRY);
    write_metadata(&mut v, 65536, 4096).unwrap();
    check(&mut v, &[raw(0, 4096, 131_072, true)]).unwrap();
    let all = range(0, 65536);
    let ok = |p: &[Placement]| place(&v, WriteKind::Data, p).is_ok();
    assert!(ok(&[placed(1, all, 262_144)]));
    assert!(!ok(&[placed(99, all, 262_144)]), "a token twice");
    assert!(!ok(&[placed(1, all, 65536)]), "on metadata");
    assert!(!ok(&[placed(1, range(4096, 4096), 131_072)]), "on data");
    assert!(!ok(&[placed(1, range(65536, 65536), 262_144)]), "elsewhere");
    assert!(!ok(&[placed(1, range(0, 100), 262_144)]), "unaligned");
    let twice = [
        placed(1, range(0, 8192), 262_144),
        placed(2, range(8192, 8192), 262_144 + 4096),
    ];
    assert!(!ok(&twice), "two on the same bytes");
    let compressed = |at| place(&v, WriteKind::Compressed, &[placed(1, all, at)]).is_ok();
    assert!(compressed(262_144 + 17));
    assert!(!compressed(65536 + 17), "on metadata");
    assert!(!compressed(131_072 - 50), "on data");
    assert!(!compressed(u64::MAX - 50), "overflows");
}

#[test]
fn hostile_geometry_and_children_are_refused() {
    let with = |unit, cluster_size, size| {
        geometry(&Geometry {
            size,
            unit,
            cluster_size,
            ..GEOMETRY
        })
    };
    with(512, 256 << 20, 1 << 40).unwrap();
    for (unit, cluster, size) in [
        (0, 512, 1),
        (256, 512, 1),
        (4 << 20, 4 << 20, 1),
        (512, 1 << 31, 1),
        (512, 0, 1),
        (4096, 512, 1),
        (512, 512, u64::MAX),
    ] {
        assert!(with(unit, cluster, size).is_err());
    }
    let child = |id: &str, kind| Child {
        id: id.to_owned(),
        kind,
        reference: None,
        format: None,
        required: false,
    };
    let backing = child("backing", ChildKind::Backing);
    let data = child("data-file", ChildKind::Storage);
    children(&[backing.clone(), data.clone()]).unwrap();
    assert!(children(&[data.clone(), data]).is_err());
    assert!(children(&[backing, child("b", ChildKind::Backing)]).is_err());
}
