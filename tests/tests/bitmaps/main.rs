//! Dirty bitmaps and allocation depth beside qemu-storage-daemon's: the same images, the same
//! histories, the same maps.
//!
//! ```text
//! seed --> layers (qemu-img, qemu-io) --> a copy for each daemon
//!      '-> history: writes, zeroes, discards over NBD; bitmap commands and transactions over QMP
//!          --> x-debug-block-dirty-bitmap-sha256, dirty-bitmaps, nbdinfo --map, qemu-img map
//! ```
//! `OUTPORT_TEST_SEEDS=N` runs N histories instead.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod backup;
mod extended;
mod history;
mod persistent;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use outport_tests::{Daemon, Server, requires};

use history::{History, Seen};

/// What the issue asks for.
const SEEDS: u64 = 100;

/// Histories run side by side: much of the time is waiting for other programs.
const WORKERS: u64 = 4;

#[test]
fn maps_and_digests_equal_qemus() {
    let tools = ["qemu-storage-daemon", "qemu-img", "qemu-io", "nbdinfo"];
    if !tools.into_iter().all(requires) {
        return;
    }
    let seeds = std::env::var("OUTPORT_TEST_SEEDS").ok();
    let seeds = seeds.and_then(|it| it.parse().ok()).unwrap_or(SEEDS);
    let (next, dirty) = (AtomicU64::new(1), AtomicU64::new(0));
    let deep = Mutex::new(0);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut daemons = [Server::Qsd, Server::Outport]
                    .map(|server| Daemon::builder(server).nbd().start());
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > seeds {
                        break;
                    }
                    let history = History::new(seed);
                    let [theirs, ours] = daemons.each_mut().map(|it| history.play(it));
                    same(seed, &theirs, &ours);
                    dirty.fetch_add(u64::from(ours.has_dirt()), Ordering::Relaxed);
                    *deep.lock().unwrap() += u32::from(ours.is_deep());
                }
                let _ = daemons.map(Daemon::stop);
            });
        }
    });
    // The histories are of use: most leave something dirty, and many have backing images.
    assert!(dirty.into_inner() > seeds / 2);
    assert!(u64::from(deep.into_inner().unwrap()) > seeds / 10);
}

#[track_caller]
fn same(seed: u64, theirs: &Seen, ours: &Seen) {
    assert_eq!(theirs.0.len(), ours.0.len());
    for (theirs, ours) in theirs.0.iter().zip(&ours.0) {
        assert_eq!(theirs, ours, "seed {seed}");
    }
}
