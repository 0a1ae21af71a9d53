//! Random operations on one disk against a `Vec<u8>`.

use super::disk::{Disk, Random, Setup};
use super::toy::Bug;
use crate::ByteRange;
use crate::IoThread;
use crate::engine::Aio;
use crate::engine::buffer::Buf;
use crate::format::Codec;
use crate::node::{Ask, Known};

async fn step(disk: &mut Disk, random: &mut Random, bound: u64) {
    let size = disk.node.len_bytes();
    let cluster = 1 << disk.setup.bits;
    let range = random.range(size, cluster, bound);
    let action = random.below(40);
    disk.log.push(format!("{action} {range:?}"));
    match action {
        0..14 => {
            let bytes = random.bytes(range.len());
            let fua = random.below(8) == 0;
            disk.write(range.offset(), &bytes, fua).await.unwrap();
        }
        14..26 => disk.compare(range).await,
        26..29 => disk.discard(range).await.unwrap(),
        29..31 => disk.zero(range, true).await.unwrap(),
        31..33 => disk.zero(range, false).await.unwrap(),
        33..35 => disk.node.flush().await.unwrap(),
        35 => {
            let at = range.offset() / cluster * cluster;
            let end = (at + cluster).min(size);
            let bytes = vec![(random.next() as u8) | 1; (end - at) as usize];
            disk.model[at as usize..end as usize].copy_from_slice(&bytes);
            let buf = Buf::from_slice(&bytes);
            let written = disk.node.write_compressed(at, &buf, Codec::Zstd);
            written.await.unwrap();
        }
        36 => {
            let status = disk.node.status(range).await.unwrap();
            let part = ByteRange::between(range.offset(), range.offset() + status.len);
            if status.zero {
                let bytes = &disk.model[part.offset() as usize..part.end() as usize];
                assert!(bytes.iter().all(|b| *b == 0), "{status:?} at {part:?}");
            }
            assert_front_is_true(disk, range, random.below(2) == 0).await;
        }
        37 => disk.reopen().await,
        38 => {
            let most = disk.setup.size * 3 / 2;
            disk.resize(1 + random.below(most)).await;
        }
        _ => {
            disk.compare_all().await;
            disk.check().await;
        }
    }
}

/// What is known of zeroes without waiting, or after it was learned.
async fn assert_front_is_true(disk: &Disk, range: ByteRange, learn: bool) {
    if range.is_empty() {
        return;
    }
    if learn {
        disk.node.learn(range).await.unwrap();
    }
    let front = disk.node.front(range, Ask::FileSystem);
    assert!(front.len > 0 && front.len <= range.len(), "{front:?}");
    assert!(!learn || front.known != Known::Nothing, "{range:?}");
    if front.known == Known::Zero {
        let (start, end) = (range.offset(), range.offset() + front.len);
        let bytes = &disk.model[start as usize..end as usize];
        assert!(bytes.iter().all(|b| *b == 0), "{front:?} at {range:?}");
    }
}

async fn follow(setup: Setup, seed: u64, steps: usize) {
    let mut disk = Disk::new(setup).await;
    let mut random = Random::new(seed);
    if seed.is_multiple_of(3) {
        disk.factory.faults.set_bug(Bug::PlacesOne);
    }
    let bound = (4 << setup.bits).min(setup.size).max(2000);
    for _ in 0..steps {
        step(&mut disk, &mut random, bound).await;
    }
    disk.compare_all().await;
    disk.reopen().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0, "nothing leaks");
    assert_eq!(disk.factory.reported.lock().unwrap().len(), 0);
}

fn setups() -> Vec<Setup> {
    let plain = Setup::default();
    let with = |bits, size| Setup {
        bits,
        size,
        ..plain
    };
    let mut all = vec![
        with(9, 40_000),
        with(9, 40_960),
        with(12, 300_001),
        with(16, 1 << 20),
        with(21, (8 << 20) + 512),
    ];
    for i in 0..all.len() {
        all.push(Setup {
            direct: true,
            ..all[i]
        });
        all.push(Setup {
            backing: Some(all[i].size * 2 / 3 + 77),
            aio: Aio::Threads,
            unmap: false,
            ..all[i]
        });
    }
    all
}

async fn follow_all(seed: u64, steps: usize) {
    for (i, setup) in setups().into_iter().enumerate() {
        let steps = if setup.bits > 16 { steps / 5 } else { steps };
        follow(setup, seed + i as u64, steps).await;
    }
}

/// More with `OUTPORT_TEST_SEEDS`; few by default, since every step may flush.
pub(super) fn seeds() -> u64 {
    let asked = std::env::var("OUTPORT_TEST_SEEDS").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(1)
}

#[tokio::test]
async fn random_operations_follow_the_model() {
    for seed in 0..seeds() {
        follow_all(seed * 100, 120).await;
    }
}

#[tokio::test]
async fn random_operations_follow_the_model_on_an_iothread() {
    let thread = IoThread::start("model").unwrap();
    for seed in 0..seeds() {
        let done = thread.run(move || follow_all(7 + seed * 100, 120)).await;
        done.unwrap();
    }
}
