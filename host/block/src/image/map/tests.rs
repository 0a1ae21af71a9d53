//! The extent map without a plugin.

use super::*;
use crate::format::Codec;

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn raw(guest: u64, len: u64, offset: u64) -> Extent {
    Extent {
        range: range(guest, len),
        at: Location::Raw {
            slot: 1,
            offset,
            in_place: true,
        },
    }
}

fn in_place(offset: u64) -> Place {
    Place::Raw {
        slot: 1,
        offset,
        in_place: true,
    }
}

#[test]
fn contiguous_units_are_one_run() {
    let map = ExtentMap::new(65536);
    let all = range(0, 1 << 20);
    map.insert(&[raw(0, 1 << 20, 1 << 24)], all, &mut |_, _| {});
    let run = map.run(range(100, 200_000));
    assert_eq!((run.place, run.len), (in_place((1 << 24) + 100), 200_000));
    map.invalidate(range(65536, 1));
    assert_eq!(map.run(range(100, 200_000)).len, 65436);
    assert_eq!(map.run(range(65536, 10)).place, Place::Unknown);
    assert_eq!(
        map.run(range(131_072, 10)).place,
        in_place((1 << 24) + 131_072)
    );
    map.invalidate(range(0, ByteRange::END_MAX));
    assert_eq!(map.run(range(131_072, 10)).place, Place::Unknown);
}

#[test]
fn eviction_names_what_was_in_place() {
    let map = ExtentMap::new(512);
    let extents = [raw(0, 1024, 8192), raw(1024, 512, 512)];
    map.insert(&extents, range(0, 1536), &mut |_, _| {
        panic!("nothing to evict")
    });
    let far = LEAVES_MAX * LEAF_UNITS * 512;
    let mut gone = Vec::new();
    map.insert(&[raw(far, 512, 512)], range(far, 512), &mut |slot, r| {
        gone.push((slot, r));
    });
    assert_eq!(gone, [(1, range(8192, 1024)), (1, range(512, 512))]);
    assert_eq!(map.run(range(0, 1)).place, Place::Unknown);
    assert_eq!(map.run(range(far, 1)).place, in_place(512));
}

#[test]
fn a_sub_extent_keeps_its_offset() {
    let map = ExtentMap::new(512);
    // An answer that starts far before the request: only what is near counts.
    let extent = raw(0, 1 << 36, 4096);
    let ask = range(1 << 35, 512);
    map.insert(&[extent], ask, &mut |_, _| {});
    assert_eq!(map.run(ask).place, in_place(4096 + (1 << 35)));
}

fn coded(guest: u64, len: u64, unit_offset: u64, unit_len: u32) -> Extent {
    Extent {
        range: range(guest, len),
        at: Location::Coded(Coded {
            slot: 0,
            offset: 1 << 20,
            stored_len: 100,
            codec: Codec::Zstd,
            unit_offset,
            unit_len,
        }),
    }
}

#[test]
fn an_answer_of_many_compressed_units_leaves_its_first_one_known() {
    let map = ExtentMap::new(512);
    let units = |from: u64, n: u64| -> Vec<Extent> {
        (from..from + n)
            .map(|i| coded(i * 512, 512, i * 512, 512))
            .collect()
    };
    let first = units(0, CODED_MAX as u64 - 2);
    map.insert(&first, range(0, 512), &mut |_, _| {});
    let at = 1 << 30;
    let second = units(at / 512, 1000);
    map.insert(&second, range(at, 512), &mut |_, _| {});
    assert!(matches!(map.run(range(at, 512)).place, Place::Coded(_)));
    let too_many = units(0, CODED_MAX as u64 + 500);
    map.insert(&too_many, range(0, 512), &mut |_, _| {});
    assert!(matches!(map.run(range(0, 512)).place, Place::Coded(_)));
}

#[test]
fn a_unit_that_was_replaced_by_a_shorter_one_is_not_believed() {
    let map = ExtentMap::new(512);
    map.insert(
        &[coded(4096, 512, 0, 8192)],
        range(4096, 512),
        &mut |_, _| {},
    );
    map.insert(&[coded(0, 512, 0, 1024)], range(0, 512), &mut |_, _| {});
    assert_eq!(map.run(range(4096, 512)).place, Place::Unknown);
    assert_eq!(map.run(range(0, 512)).len, 512);
}

#[test]
fn a_leaf_in_line_answers_as_its_units_do() {
    // Mostly what lies in order, so that leaves get into line and out of it again.
    const UNIT: u64 = 512;
    let map = ExtentMap::new(UNIT as u32);
    let units = 3 * LEAF_UNITS;
    let mut model = vec![Place::Unknown; units as usize];
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut in_line = 0;
    for _ in 0..4000 {
        let first = random(units);
        let last = units.min(first + 1 + random(2 * LEAF_UNITS));
        let asked = range(first * UNIT, (last - first) * UNIT);
        let elsewhere = if random(8) == 0 { 1 << 30 } else { 0 };
        match random(12) {
            0 => map.invalidate(asked),
            _ => {
                let extent = raw(asked.offset(), asked.len(), asked.offset() + elsewhere);
                map.insert(&[extent], asked, &mut |_, _| {});
            }
        }
        for unit in first..last {
            let known = map.run(range(unit * UNIT, 1)).place;
            let expected = in_place(unit * UNIT + elsewhere);
            assert!(known == expected || known == Place::Unknown);
            model[unit as usize] = known;
        }
        for (unit, place) in (0..).zip(&model) {
            assert_eq!(map.run(range(unit * UNIT, 1)).place, *place, "unit {unit}");
        }
        in_line += (0..3).filter(|leaf| map.leaf_in_line(*leaf)).count();
    }
    assert!(in_line > 1000, "{in_line}");
}
