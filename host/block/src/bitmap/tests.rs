//! Bits against a list of booleans; writers that meet the control plane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::node::{Kind, Node};
use crate::rule::Rule;
use crate::view::{NodeView, Sight};
use crate::{ByteRange, Errno};

const KIB: u64 = 1024;

fn between(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end)
}

/// What is dirty, granule by granule.
fn listed(bits: &Bits) -> Vec<bool> {
    let bit = |at: u64| bits.word(at / 64) >> (at % 64) & 1 == 1;
    (0..bits.granules()).map(bit).collect()
}

/// The same as told run by run.
fn told(bits: &Bits) -> Vec<bool> {
    let (mut list, mut rest) = (Vec::new(), between(0, bits.size()));
    while !rest.is_empty() {
        let (len, dirty) = bits.run(rest);
        let granules = len.div_ceil(bits.granularity());
        list.extend(std::iter::repeat_n(dirty, granules as usize));
        rest = between(rest.offset() + len, rest.end());
    }
    list
}

/// Runs as they are told one by one, and all at once.
fn both_runs(bits: &Bits, range: ByteRange) -> [Vec<(u64, bool)>; 2] {
    let (mut single, mut at_once, mut rest) = (Vec::new(), Vec::new(), range);
    while !rest.is_empty() {
        single.push(bits.run(rest));
        let (len, _) = single[single.len() - 1];
        rest = between(rest.offset() + len, rest.end());
    }
    bits.runs(range, |len, dirty| {
        at_once.push((len, dirty));
        true
    });
    [single, at_once]
}

proptest! {
    #[test]
    fn runs_are_the_same_one_by_one_and_all_at_once(
        marks in proptest::collection::vec((0u64..40_000, 1u64..300), 0..40),
        long in (0u64..40_000, 0u64..40_000),
        from in 0u64..20_000_000,
        len in 0u64..21_000_000,
    ) {
        // Leaves of 16 MiB: one and a half of them.
        let size = 40_000 * 512 + 100;
        let bits = Bits::new(size, 512).unwrap();
        for (offset, len) in marks.into_iter().chain([long]) {
            let end = ((offset + len) * 512).min(size);
            bits.mark(between((offset * 512).min(end), end));
        }
        let [single, at_once] = both_runs(&bits, between(from, (from + len).min(size)));
        prop_assert_eq!(single, at_once);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn bits_are_a_list_of_granules(
        size in 1u64..90_000_000,
        shift in 9u32..13,
        marks in proptest::collection::vec((0u64..90_000_000, 1u64..40_000_000), 0..6),
        other in 1u64..90_000_000,
    ) {
        let bits = Bits::new(size, 1 << shift).unwrap();
        let mut model = vec![false; size.div_ceil(1 << shift) as usize];
        for (offset, len) in marks {
            let range = between(offset.min(size), (offset + len).min(size));
            bits.mark(range);
            if !range.is_empty() {
                let last = ((range.end() - 1) >> shift) as usize;
                model[(range.offset() >> shift) as usize..=last].fill(true);
            }
        }
        prop_assert_eq!(&listed(&bits), &model);
        prop_assert_eq!(&told(&bits), &model);
        prop_assert_eq!(bits.count(), model.iter().filter(|it| **it).count() as u64);

        let resized = bits.resized(other);
        let granules = other.div_ceil(1 << shift) as usize;
        model.truncate(size.min(other).div_ceil(1 << shift) as usize);
        model.resize(granules, false);
        prop_assert_eq!(listed(&resized), model);

        let coarse = Bits::new(size, 1 << (shift + 2)).unwrap();
        coarse.merge(&bits);
        let four: Vec<bool> = listed(&bits).chunks(4).map(|four| four.contains(&true)).collect();
        prop_assert_eq!(listed(&coarse), four);
    }
}

#[test]
fn whole_leaves_cost_a_bit() {
    // 16 TiB of 512-byte granules at once.
    let bits = Bits::new(1 << 44, 512).unwrap();
    bits.mark(between(0, 1 << 44));
    assert_eq!(bits.run(between(5, 1 << 44)), ((1 << 44) - 5, true));
    assert!(Bits::new((1 << 44) + 1, 512).is_none());
}

fn node_bitmaps(size: u64) -> (Arc<NodeBitmaps>, Arc<DirtyBitmap>) {
    let bitmaps = Arc::<NodeBitmaps>::default();
    let bitmap = DirtyBitmap::new("b", 512, size, true).unwrap();
    bitmaps.insert(bitmap.clone());
    bitmaps.publish();
    (bitmaps, bitmap)
}

#[test]
fn a_write_behind_the_end_makes_room() {
    let (bitmaps, bitmap) = node_bitmaps(512);
    for at in [1, 40 << 20, 3 << 30] {
        bitmaps.mark(between(at, at + 1));
        assert_eq!(bitmap.bits().run(between(at, at + 1)), (1, true));
    }
    assert_eq!(bitmap.bits().count(), 3);
    assert_eq!(bitmap.bits().size(), (3 << 30) + 1);
}

/// Checkpoints under writers: every write is in one of the bitmaps that were taken.
#[test]
fn no_write_falls_between_two_bitmaps() {
    const WRITERS: u64 = 3;
    const GRANULES: u64 = 4096;
    let (bitmaps, first) = node_bitmaps(WRITERS * GRANULES * 512);
    let (done, wrote) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut taken = vec![first.bits()];
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (bitmaps, wrote) = (&bitmaps, &wrote);
            scope.spawn(move || {
                for at in 0..GRANULES {
                    let at = (writer * GRANULES + at) * 512;
                    bitmaps.mark(between(at, at + 512));
                    wrote.fetch_add(1, Ordering::SeqCst);
                    if at.is_multiple_of(64 * 512) {
                        std::thread::yield_now();
                    }
                }
            });
        }
        // Clear again and again, keeping what was cleared, while they write.
        while !done.load(Ordering::Relaxed) {
            let before = wrote.load(Ordering::SeqCst);
            first.replace_bits(Arc::new(first.bits().cleaned()));
            bitmaps.publish();
            // What was taken holds all writes that had ended.
            let sum: u64 = taken.iter().map(|bits| bits.count()).sum();
            assert!(sum >= before, "{sum} of {before}");
            taken.push(first.bits());
            done.store(before == WRITERS * GRANULES, Ordering::Relaxed);
            std::thread::yield_now();
        }
    });
    let all = Bits::new(WRITERS * GRANULES * 512, 512).unwrap();
    taken.iter().for_each(|bits| all.merge(bits));
    assert_eq!(all.count(), WRITERS * GRANULES);
}

#[test]
fn a_write_behind_all_bits_there_can_be_ends_and_is_not_forgotten() {
    let (bitmaps, bitmap) = node_bitmaps(512);
    let far = 1 << 44;
    bitmaps.mark(between(0, 1));
    assert_eq!(
        bitmaps.too_small_for(far).map(|it| it.name().to_owned()),
        None
    );
    bitmaps.mark(between(far - 512, far));
    assert!(!bitmap.is_inconsistent());
    bitmaps.mark(between(far, far + 512));
    assert!(bitmap.is_inconsistent(), "it says nothing from now on");
    assert_eq!(bitmap.bits().count(), 2);
    assert!(bitmaps.too_small_for(far + 512).is_some());
}

#[tokio::test]
async fn a_node_is_not_made_longer_than_its_bitmaps_can_be() {
    let kind = crate::node::Kind::Null {
        size: AtomicU64::new(512),
        zeroes: true,
    };
    let node = crate::Node::new("n", "null-co", false, kind);
    let bitmap = DirtyBitmap::new("b", 512, 512, true).unwrap();
    node.bitmaps().insert(bitmap.clone());
    node.bitmaps().publish();
    let far = (1 << 44) + 512;
    let refused = node.resize(far).await.unwrap_err().to_string();
    let expected = "Bitmap 'b' would have too many granules; remove it first";
    assert_eq!(refused, expected);
    assert_eq!(node.set_len(far).await, Err(crate::Errno::FBig));
    assert!(!bitmap.is_inconsistent());
}

#[tokio::test]
async fn a_rule_tells_runs_within_its_budget() {
    let null = Kind::Null {
        size: AtomicU64::new(1024 * KIB),
        zeroes: true,
    };
    let node = Node::new("n", "null-co", false, null);
    let bitmap = DirtyBitmap::new("b", 512, 1024 * KIB, true).unwrap();
    let bitmaps = node.bitmaps();
    bitmaps.insert(bitmap);
    bitmaps.publish();
    for at in 0..10 {
        bitmaps.mark(between(at * 4 * KIB, at * 4 * KIB + 1));
    }
    let sight = Sight::new(node.clone());
    let rule = |name: &str| Rule::Bitmap {
        name: name.to_owned(),
        clean: 7,
        dirty: 1,
    };
    let (found, missing) = (rule("b"), rule("x"));
    let all = between(0, 1024 * KIB);
    let some = sight.by_rule(&found, all, 3).await.unwrap();
    let told: Vec<_> = some.iter().map(|it| (it.len, it.flags)).collect();
    assert_eq!(told, [(512, 1), (7 * 512, 7), (512, 1)]);
    assert_eq!(sight.by_rule(&found, all, 1000).await.unwrap().len(), 20);
    let refused = sight.by_rule(&missing, all, 1).await;
    assert_eq!(refused.unwrap_err(), Errno::NoEnt);
}

#[test]
fn a_copy_catches_up_with_what_was_marked_meanwhile() {
    let old = Bits::new(1024 * KIB, 65536).unwrap();
    let copies = [old.with_room(1 << 40), old.resized(512 * KIB)];
    for at in [0, 900 * KIB] {
        old.mark(between(at, at + 1));
    }
    let [roomy, cut] = copies.each_ref().map(|copy| {
        copy.catch_up(&old);
        copy.size()
    });
    assert_eq!((roomy, cut), (1024 * KIB, 512 * KIB));
    assert_eq!(listed(&copies[0]), listed(&old));
    assert_eq!(listed(&copies[1]), listed(&old)[..8]);
}
