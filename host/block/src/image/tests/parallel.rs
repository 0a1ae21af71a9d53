//! Several iothreads on one disk.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use super::disk::{Disk, Random, Setup};
use super::model::seeds;
use super::toy::{Act, Call};
use crate::engine::Aio;
use crate::engine::buffer::Buf;
use crate::node::Node;
use crate::{ByteRange, Errno, IoThread};

/// Owners of sectors, in turn: they share every cluster.
const OWNERS: u64 = 4;
const SECTOR: u64 = 512;

/// What one owner does to its sectors.
struct Worker {
    node: Arc<Node>,
    me: u64,
    random: Random,
    /// By own sector: the byte in it.
    model: Vec<u8>,
    /// Leaves requests midway; such sectors are unknown from then on.
    leaves: bool,
    unknown: Vec<bool>,
}

impl Worker {
    fn new(node: &Arc<Node>, me: u64, seed: u64, leaves: bool) -> Self {
        let sectors = node.len_bytes() / SECTOR / OWNERS;
        Self {
            node: node.clone(),
            me,
            random: Random::new(seed * 100 + me),
            model: vec![0; sectors as usize],
            leaves,
            unknown: vec![false; sectors as usize],
        }
    }

    async fn run(mut self, steps: usize) -> Self {
        for _ in 0..steps {
            let sector = self.random.below(self.model.len() as u64) as usize;
            let at = (sector as u64 * OWNERS + self.me) * SECTOR;
            let action = self.random.below(10);
            if self.unknown[sector] {
                continue;
            }
            let byte = match action {
                0..5 => self.random.next() as u8 | 1,
                _ => 0,
            };
            match action {
                0..6 => self.change(sector, at, byte).await,
                6 => {
                    let node = self.node.clone();
                    let flushed = Box::pin(async move { node.flush().await });
                    self.maybe_leave(flushed).await;
                }
                _ => self.compare(sector, at).await,
            }
        }
        self
    }

    async fn change(&mut self, sector: usize, at: u64, byte: u8) {
        self.model[sector] = byte;
        let bytes = [byte; SECTOR as usize];
        if let Some(done) = self.node.try_write(at, &bytes) {
            done.unwrap();
            return;
        }
        let node = self.node.clone();
        let change = async move {
            if byte == 0 {
                node.write_zeroes(ByteRange::between(at, at + SECTOR), true)
                    .await
            } else {
                node.write(at, &Buf::from_slice(&bytes), false).await
            }
        };
        if self.maybe_leave(Box::pin(change)).await {
            self.unknown[sector] = true;
        }
    }

    /// Wait for the end, or not; `true`: left before it.
    async fn maybe_leave(
        &mut self,
        mut work: impl Future<Output = Result<(), Errno>> + Unpin,
    ) -> bool {
        if !self.leaves || self.random.below(3) != 0 {
            work.await.unwrap();
            return false;
        }
        for _ in 0..=self.random.below(5) {
            let once = |cx: &mut Context<'_>| Poll::Ready(Pin::new(&mut work).poll(cx));
            if let Poll::Ready(done) = std::future::poll_fn(once).await {
                done.unwrap();
                return false;
            }
            tokio::task::yield_now().await;
        }
        true
    }

    async fn compare(&self, sector: usize, at: u64) {
        let buf = self
            .node
            .read(at, Buf::zeroed(SECTOR as usize))
            .await
            .unwrap();
        let expected = [self.model[sector]; SECTOR as usize];
        assert_eq!(buf.as_slice(), expected, "sector {sector} of {}", self.me);
    }
}

/// Run the workers on two iothreads and give them back.
async fn work(node: &Arc<Node>, seed: u64, steps: usize, leaves: bool) -> Vec<Worker> {
    let threads = [
        IoThread::start("one").unwrap(),
        IoThread::start("two").unwrap(),
    ];
    let runs = (0..OWNERS).map(|me| {
        let worker = Worker::new(node, me, seed, leaves);
        threads[me as usize % 2].run(move || worker.run(steps))
    });
    let workers = futures_util::future::join_all(runs).await;
    workers.into_iter().map(Option::unwrap).collect()
}

async fn judge(disk: &mut Disk, workers: &[Worker]) {
    disk.reopen().await;
    for worker in workers {
        for sector in (0..worker.model.len()).filter(|s| !worker.unknown[*s]) {
            let at = (sector as u64 * OWNERS + worker.me) * SECTOR;
            let buf = disk.node.read(at, Buf::zeroed(SECTOR as usize));
            let buf = buf.await.unwrap();
            let expected = [worker.model[sector]; SECTOR as usize];
            assert_eq!(buf.as_slice(), expected, "sector {sector} of {}", worker.me);
        }
    }
    assert_eq!(disk.check().await, 0, "nothing leaks");
}

fn setups() -> [Setup; 4] {
    let plain = Setup {
        bits: 12,
        size: 512 << 10,
        ..Setup::default()
    };
    [
        plain,
        Setup { bits: 9, ..plain },
        Setup {
            direct: true,
            bits: 13,
            ..plain
        },
        Setup {
            bits: 16,
            aio: Aio::Threads,
            ..plain
        },
    ]
}

#[tokio::test]
async fn neighbours_in_a_cluster_do_not_disturb_each_other() {
    for seed in 0..seeds() {
        for setup in setups() {
            let mut disk = Disk::new(setup).await;
            let workers = work(&disk.node, seed, 400, false).await;
            judge(&mut disk, &workers).await;
        }
    }
}

#[tokio::test]
async fn clients_that_go_away_do_not_disturb_the_others() {
    for seed in 0..seeds() {
        for setup in setups() {
            let mut disk = Disk::new(setup).await;
            let workers = work(&disk.node, 1000 + seed, 400, true).await;
            let left = workers.iter().flat_map(|w| &w.unknown);
            assert!(left.filter(|u| **u).count() > 0, "nobody left");
            judge(&mut disk, &workers).await;
        }
    }
}

#[tokio::test]
async fn one_fault_among_writers_is_noticed_by_none() {
    for seed in 0..6 * seeds() {
        let mut disk = Disk::new(setups()[1]).await;
        let call = [Call::Prepare, Call::Resolve, Call::Discard][seed as usize % 3];
        let faults = disk.factory.faults.clone();
        let planned = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(2 + 3 * seed)).await;
            faults.plan(call, Act::Trap);
        });
        let workers = work(&disk.node, 2000 + seed, 300, false).await;
        planned.await.unwrap();
        disk.node.close().await.unwrap();
        disk.open_again().await;
        for worker in &workers {
            for sector in 0..worker.model.len() {
                let at = (sector as u64 * OWNERS + worker.me) * SECTOR;
                let buf = disk.node.read(at, Buf::zeroed(SECTOR as usize));
                let expected = [worker.model[sector]; SECTOR as usize];
                assert_eq!(buf.await.unwrap().as_slice(), expected);
            }
        }
        // Reservations of the instance that trapped may have leaked.
        disk.check().await;
        disk.model.clear();
    }
}

#[tokio::test]
async fn discards_resizes_and_flushes_beside_readers_and_writers() {
    let mut disk = Disk::new(Setup {
        bits: 9,
        size: 256 << 10,
        // So little that freed space is used again at once.
        capacity: 512 + 40,
        ..Setup::default()
    })
    .await;
    let thread = IoThread::start("mover").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU64::new(0));
    let half = disk.setup.size / 2;
    // The first half holds its own number in each sector, or zeroes.
    let mover = {
        let (node, stop, rounds) = (disk.node.clone(), stop.clone(), rounds.clone());
        let work = move || async move {
            let mut random = Random::new(3);
            while !stop.load(Ordering::Relaxed) {
                let range = random.range(half, 4096, 40_000).align_in(512);
                match random.below(6) {
                    0 => node
                        .resize(half * 2 + random.below(20) * 512)
                        .await
                        .unwrap(),
                    1 => node.flush().await.unwrap(),
                    2 | 3 if !range.is_empty() => node.discard(range).await.unwrap(),
                    _ => {
                        for sector in range.offset() / 512..range.end() / 512 {
                            let buf = Buf::from_slice(&sector.to_le_bytes().repeat(64));
                            node.write(sector * 512, &buf, false).await.unwrap();
                        }
                    }
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::spawn(async move { thread.run(work).await })
    };
    let mut random = Random::new(4);
    while rounds.load(Ordering::Relaxed) < 150 * seeds() && !mover.is_finished() {
        let sector = random.below(half / 512);
        let mut inline = [0; 512];
        match disk.node.try_read(sector * 512, &mut inline) {
            Some(done) => done.unwrap(),
            None => {
                let buf = disk.node.read(sector * 512, Buf::zeroed(512)).await;
                inline.copy_from_slice(buf.unwrap().as_slice());
            }
        }
        let mine = sector.to_le_bytes().repeat(64);
        let zero = inline.iter().all(|b| *b == 0);
        assert!(zero || inline[..] == mine[..], "sector {sector}: another's");
        tokio::task::yield_now().await;
    }
    stop.store(true, Ordering::Relaxed);
    mover.await.unwrap().unwrap();
    disk.reopen().await;
    disk.check().await;
    disk.model.clear();
}
