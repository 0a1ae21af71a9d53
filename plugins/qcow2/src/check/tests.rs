//! Checks of images made and damaged in memory: several windows, slices, bytes
//! that nobody would write.

use outport_sdk::{CheckReport, Files, Repair, Stage, Txn};

use super::counts::WINDOW_CLUSTERS;
use super::{Check, Phase};
use crate::header::incompatible;
use crate::pages::IMAGE;
use crate::tests::Host;

const NONE: Repair = Repair {
    leaks: false,
    errors: false,
};
const ALL: Repair = Repair {
    leaks: true,
    errors: true,
};

/// Counts of 64 bits in clusters of 512 bytes: 64 to a block, the least there is.
const SMALL: &str = r#"{"size": 300032, "cluster-size": 512, "refcount-bits": 64,
                        "preallocation": "metadata"}"#;

fn image(options: &str) -> Host {
    let mut host = Host::new(vec![Vec::new()]);
    host.call(|txn| crate::create::create(txn, options))
        .unwrap();
    host
}

fn check(host: &mut Host, fix: Repair, window: u64) -> CheckReport {
    let mut check = Check::start(host.files(), fix, window).unwrap();
    while !matches!(check.phase, Phase::Done) {
        host.call(|txn| check.slice(txn)).unwrap();
    }
    check.report
}

fn word(host: &Host, at: u64) -> u64 {
    u64::from_be_bytes(host.read(IMAGE, at, 8).unwrap().try_into().unwrap())
}

fn put(host: &mut Host, at: u64, value: u64) {
    host.call(|txn| txn.write(IMAGE, Stage::Prepare, at, &value.to_be_bytes()))
        .unwrap();
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 9) % end
    }
}

/// Random words over random words of the metadata after the header.
fn damage(host: &mut Host, rng: &mut Rng) {
    let (table, l1) = (word(host, 48), word(host, 40));
    let first_l2 = word(host, l1) & crate::table::OFFSET_MASK;
    for _ in 0..=rng.below(6) {
        let start = [table, word(host, table), l1, first_l2, first_l2];
        let start = start[rng.below(5) as usize];
        if start < 512 || start > host.size(IMAGE).unwrap() {
            continue;
        }
        let at = start + rng.below(64) * 8;
        let value = match rng.below(5) {
            0 => rng.below(u64::MAX),
            1 => rng.below(800) * 512,
            2 => word(host, at) ^ 1 << rng.below(64),
            3 => word(host, start + rng.below(64) * 8),
            _ => rng.below(3),
        };
        put(host, at, value);
    }
}

#[test]
fn windows_find_and_mend_the_same() {
    let sound = image(SMALL);
    let clusters = sound.size(IMAGE).unwrap() / 512;
    assert!(clusters > 600);
    for seed in 1..100 {
        let mut rng = Rng(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut damaged = Host::new(sound.files.clone());
        damage(&mut damaged, &mut rng);
        let whole = check(&mut damaged, NONE, WINDOW_CLUSTERS);
        for window in [64, 128, 192] {
            let mut parts = check(&mut damaged, NONE, window);
            // Damage is found in another order.
            parts.messages.sort();
            let mut sorted = whole.clone();
            sorted.messages.sort();
            if whole.messages.len() < 200 {
                assert_eq!(parts, sorted, "seed {seed} window {window}");
            }
        }
        for window in [WINDOW_CLUSTERS, 64, 128] {
            let mut host = Host::new(damaged.files.clone());
            let report = check(&mut host, ALL, window);
            let left =
                report.corruptions - report.corruptions_fixed + report.leaks - report.leaks_fixed;
            let after = check(&mut host, NONE, WINDOW_CLUSTERS);
            if left == 0 {
                assert_eq!(
                    (after.corruptions, after.leaks),
                    (0, 0),
                    "seed {seed}: {after:#?}"
                );
            }
            // Only what would damage other content may stay.
            let shared = after
                .messages
                .iter()
                .any(|m| m.contains("something else as well"));
            assert!(
                left == 0 || shared,
                "seed {seed} window {window}: {report:#?} {after:#?}"
            );
        }
    }
}

#[test]
fn a_rebuild_grows_the_table_as_needed() {
    let mut host = image(SMALL);
    let table = word(&host, 48);
    put(&mut host, table, 0);
    put(&mut host, table + 16, 0x201);
    let report = check(&mut host, ALL, 64);
    assert!(report.corruptions > 64 && report.corruptions == report.corruptions_fixed);
    assert_ne!(word(&host, 48), table);
    let after = check(&mut host, NONE, WINDOW_CLUSTERS);
    assert_eq!((after.corruptions, after.leaks), (0, 0), "{after:#?}");
}

#[test]
fn repair_leaves_no_mark_of_damage_in_the_header() {
    let mut host = image(r#"{"size": 1048576}"#);
    put(&mut host, 72, incompatible::DIRTY | incompatible::CORRUPT);
    assert_eq!(check(&mut host, NONE, WINDOW_CLUSTERS).corruptions, 0);
    assert_eq!(word(&host, 72), 3);
    check(&mut host, ALL, WINDOW_CLUSTERS);
    assert_eq!(word(&host, 72), 0);
}

#[test]
fn a_large_image_takes_several_slices() {
    let mut host = image(
        r#"{"size": 67108864, "cluster-size": 512, "preallocation": "metadata",
            "refcount-bits": 1}"#,
    );
    let mut check = Check::start(host.files(), NONE, WINDOW_CLUSTERS).unwrap();
    let mut cursors = vec![0];
    while !matches!(check.phase, Phase::Done) {
        host.call(|txn| check.slice(txn)).unwrap();
        cursors.push(check.examined);
    }
    assert_eq!(check.report.allocated_clusters, 131_072);
    assert_eq!((check.report.corruptions, check.report.leaks), (0, 0));
    assert!(cursors.is_sorted());
    let steps = cursors.windows(2).map(|w| w[1] - w[0]);
    assert!(
        steps.max().unwrap() < super::SLICE_BYTES + (4 << 20),
        "{cursors:?}"
    );
}
