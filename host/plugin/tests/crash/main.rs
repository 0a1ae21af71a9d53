//! Power cuts through all that ships: images that qemu-img made, the bundled qcow2 plugin in its
//! sandbox, the block layer above it, and a host file whose every write and flush is recorded.
//!
//! ```text
//!   random writes, discards, zeroes, resizes, flushes ─► Node ─► qcow2.wasm ─► recorded file
//!                                                                                   │
//!   judge: open through the plugin, compare, check ◄─ every crash point, every order of writes
//!          qemu-img check, qemu-img convert ◄──────── a sample of them
//! ```
//!
//! A crash image passes if it opens, no sector of it is older than the last flush says, and no
//! check finds more than leaks. `OUTPORT_TEST_SEEDS` is how many workloads of each kind run
//! (`make crash`: 12); what was tried is printed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bugs;
mod disk;
mod history;
mod judge;
#[path = "../support/mod.rs"]
mod support;
mod workload;

use std::sync::Arc;

use outport_block::format::FormatFactory;
use outport_block::trace::{Event, Limits, crash_images};
use outport_tests::requires;

use disk::{Case, Disk};
use history::History;
use judge::{Judge, Tally};
use support::bundled;

/// Workloads of one kind.
fn seeds() -> u64 {
    let asked = std::env::var("OUTPORT_TEST_SEEDS").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// What one workload left behind.
struct Recording {
    case: Case,
    disk: Disk,
    base: Vec<u8>,
    events: Vec<Event>,
    history: History,
}

async fn record(case: Case, seed: u64, factory: Arc<dyn FormatFactory>) -> Recording {
    let mut disk = Disk::create(case);
    let base = std::fs::read(disk.path()).unwrap();
    let trace = disk.open_traced(factory).await;
    let history = workload::run(&mut disk, &trace, seed).await;
    Recording {
        case,
        disk,
        base,
        events: trace.events(),
        history,
    }
}

/// Judge every image of the recording; the first that is wrong, if there is one.
async fn judge(recording: &Recording, events: &[Event], seed: u64) -> (Tally, Option<String>) {
    let mut judge = Judge::new(recording.case, &recording.disk, &recording.history);
    let limits = Limits {
        exhaustive: 3,
        samples: 3,
        seed: seed + 1,
        ..Limits::default()
    };
    let mut images = crash_images(&recording.base, events, limits);
    let mut wrong = None;
    while let Some(image) = images.next() {
        if let Err(what) = judge.judge(&image, images.images()).await {
            let last = format!("{:?}", events[image.after.saturating_sub(1)]);
            let last: String = last.chars().take(60).collect();
            let (after, missing) = (image.after, &image.missing);
            wrong = Some(format!(
                "{what}; after event {after}: {last}; missing {missing:?}"
            ));
            break;
        }
    }
    judge.tally.points = images.points();
    judge.tally.images = images.images();
    (judge.tally, wrong)
}

fn survives(case: Case) {
    if !requires("qemu-img") {
        return;
    }
    let mut all = Tally::default();
    let runtime = disk::runtime();
    for seed in 1..=seeds() {
        runtime.block_on(async {
            let recording = record(case, seed, bundled()).await;
            let (tally, wrong) = judge(&recording, &recording.events, seed).await;
            assert_eq!(wrong, None, "{}, seed {seed}", case.options);
            all.add(&tally);
        });
    }
    println!("{}: {all}", case.options);
}

#[test]
fn crash_of_small_clusters_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=512",
        clusters: 200,
        resizes: true,
        ..Case::default()
    });
}

#[test]
fn crash_of_growing_tables_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=512,refcount_bits=64",
        clusters: 300,
        resizes: true,
        ..Case::default()
    });
}

#[test]
fn crash_of_an_overlay_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=4k",
        cluster: 4096,
        backing: true,
        resizes: true,
        ..Case::default()
    });
}

#[test]
fn crash_of_default_clusters_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=64k",
        cluster: 65536,
        clusters: 12,
        ..Case::default()
    });
}

#[test]
fn crash_with_lazy_refcounts_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=1k,lazy_refcounts=on",
        cluster: 1024,
        clusters: 60,
        killed: true,
        ..Case::default()
    });
}

#[test]
fn crash_of_subclusters_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=16k,extended_l2=on",
        cluster: 16384,
        clusters: 16,
        backing: true,
        ..Case::default()
    });
}

#[test]
fn crash_with_snapshots_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "cluster_size=2k,refcount_bits=8",
        cluster: 2048,
        snapshot: true,
        ..Case::default()
    });
}

#[test]
fn crash_of_version_2_loses_nothing_that_was_flushed() {
    survives(Case {
        options: "compat=0.10,cluster_size=1k",
        cluster: 1024,
        resizes: true,
        ..Case::default()
    });
}

#[test]
fn crash_with_bitmaps_leaves_none_that_says_what_is_not_so() {
    for (options, cluster) in [("cluster_size=512", 512), ("cluster_size=4k", 4096)] {
        survives(Case {
            options,
            cluster,
            clusters: 24,
            backing: cluster > 512,
            bitmaps: true,
            ..Case::default()
        });
    }
}

const PLANTED: Case = Case {
    options: "cluster_size=4k",
    cluster: 4096,
    clusters: 40,
    backing: true,
    snapshot: false,
    resizes: false,
    killed: false,
    bitmaps: false,
};

/// How many of four seeds show the bug.
fn found_in(what: &str, find: impl AsyncFn(u64) -> Option<String>) -> usize {
    let found = disk::runtime().block_on(async {
        let mut found = Vec::new();
        for seed in 1..=4 {
            found.extend(find(seed).await);
        }
        found
    });
    println!("{what}: {found:#?}");
    found.len()
}

#[test]
fn a_crash_finds_a_plugin_that_maps_too_early() {
    if !requires("qemu-img") {
        return;
    }
    let found = found_in("mapping in stage prepare", async |seed| {
        let recording = record(PLANTED, seed, bugs::maps_early(bundled())).await;
        judge(&recording, &recording.events, seed).await.1
    });
    assert_eq!(found, 4);
}

#[test]
fn a_crash_finds_a_barrier_that_is_missing() {
    if !requires("qemu-img") {
        return;
    }
    let found = found_in("no flush before the mapping", async |seed| {
        let recording = record(PLANTED, seed, bundled()).await;
        let events = bugs::without_first_barriers(&recording.events);
        assert!(events.len() < recording.events.len());
        judge(&recording, &events, seed).await.1
    });
    assert_eq!(found, 4);
}

#[test]
fn a_crash_finds_a_flush_that_does_nothing() {
    if !requires("qemu-img") {
        return;
    }
    let found = found_in("no flush at all", async |seed| {
        let recording = record(PLANTED, seed, bundled()).await;
        let events = bugs::without_barriers(&recording.events);
        judge(&recording, &events, seed).await.1
    });
    assert_eq!(found, 4);
}

#[test]
fn a_crash_finds_bitmaps_that_are_not_marked() {
    if !requires("qemu-img") {
        return;
    }
    let found = found_in("no marks on bitmaps", async |seed| {
        let case = Case {
            bitmaps: true,
            ..PLANTED
        };
        let recording = record(case, seed, bugs::marks_nothing(bundled())).await;
        judge(&recording, &recording.events, seed).await.1
    });
    assert_eq!(found, 4);
}
