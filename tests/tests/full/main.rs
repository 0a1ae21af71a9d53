//! Writers against storage that fills, thins and recovers, with kill -9 and orderly ends between.
//!
//! ```text
//!   NBD, vhost-user, FUSE ─► outportd ─► raw, qcow2 ─► tmpfs, ext4, NBD, FUSE        
//!          │                                                        ▲
//!        model ◄─ qemu-img check, qemu-img convert (second oracle)  └─ ballast, remount, resize
//! ```
//!
//! What was flushed is there after kill -9. What was acknowledged is there after an orderly end,
//! or the exit status and the log told the loss. A write that is refused says ENOSPC, and the same
//! client goes on when room came back. A round is one life of a daemon; a seed names an image with
//! its storage, clients and [`LIVES`] rounds.
//!
//! `OUTPORT_TEST_ROUNDS` is how many rounds each kind of storage gets (`make crash`: 500, 2,000 in
//! all), `OUTPORT_TEST_SEED` runs one seed of it alone; a failure prints the seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod life;
mod model;
mod storage;
mod writer;

use std::panic::{AssertUnwindSafe, catch_unwind};

use outport_tests::{can_mount, requires, try_run};

use life::Case;
use storage::Kind;

/// Rounds with one image.
const LIVES: u64 = 4;

/// Rounds that each kind of storage gets unless asked otherwise: some seconds.
const ROUNDS: u64 = 24;

/// Set for the process inside the mount namespace.
const INSIDE: &str = "OUTPORT_TEST_FULL_INSIDE";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the seeds of one kind of storage, in a mount namespace that ends with them.
fn against(kind: Kind, test: &str) {
    let tools = ["unshare", "losetup", "mkfs.ext4", "qemu-img"];
    let there = tools.iter().all(|tool| requires(tool));
    if !there || !requires("qemu-storage-daemon") || !can_mount() {
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let this = std::env::current_exe().unwrap();
        let inside = format!("{INSIDE}=1");
        let namespace = ["--mount", "--propagation", "private", "env", &inside];
        let mut args = namespace.map(str::to_owned).to_vec();
        args.extend([this.to_str().unwrap(), "--exact", test, "--nocapture"].map(str::to_owned));
        let inner = try_run("unshare", &args);
        // Its own summary is not one of this process.
        let said = inner.out.lines().filter(|line| !line.starts_with("test "));
        said.for_each(|line| println!("{line}"));
        assert_eq!(inner.code, Some(0), "{}", inner.err);
        return;
    }
    let seeds = match number("OUTPORT_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            0..number("OUTPORT_TEST_ROUNDS")
                .unwrap_or(ROUNDS)
                .div_ceil(LIVES)
        }
    };
    let (mut failed, mut rounds) = (Vec::new(), 0);
    for seed in seeds {
        let case = Case::new(kind, seed);
        let done = catch_unwind(AssertUnwindSafe(|| case.clone().live(LIVES)));
        rounds += LIVES;
        if let Err(panic) = done {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.unwrap_or_else(|| "see above".to_owned());
            eprintln!("seed {seed}: {case:?}: {text}");
            failed.push(seed);
        }
    }
    println!("{kind:?}: {rounds} rounds, seeds that failed: {failed:?}");
    assert!(failed.is_empty(), "OUTPORT_TEST_SEED= one of {failed:?}");
}

#[test]
fn crash_on_a_full_tmpfs() {
    against(Kind::Tmpfs, "crash_on_a_full_tmpfs");
}

#[test]
fn crash_on_a_full_ext4() {
    against(Kind::Ext4, "crash_on_a_full_ext4");
}

#[test]
fn crash_on_a_full_nbd_child() {
    against(Kind::NbdChild, "crash_on_a_full_nbd_child");
}

#[test]
fn crash_on_a_full_fuse_child() {
    against(Kind::FuseChild, "crash_on_a_full_fuse_child");
}
