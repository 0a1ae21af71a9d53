//! What a hit costs, layer by layer: printed, not judged.
//!
//! `cargo test --release -p outport-block --lib -- --ignored --nocapture cost`

use std::hint::black_box;
use std::time::Instant;

use super::disk::{Disk, Setup};
use crate::ByteRange;
use crate::engine::buffer::Buf;
use crate::file::{FileOptions, HostFile};
use crate::gate::Gate;
use crate::node::{Kind, Node};

const SIZE: u64 = 64 << 20;
const OPS: u64 = 5_000;
const ROUNDS: usize = 31;

/// Cheap, and the same for every layer.
struct Offsets(u64);

impl Offsets {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % (SIZE / 4096) * 4096
    }
}

struct Line {
    what: &'static str,
    rounds: Vec<f64>,
    /// Operations that would have waited, and so were not done.
    waited: u64,
}

impl Line {
    /// `op` says whether it was done.
    fn round(&mut self, mut op: impl FnMut(u64) -> bool) {
        let mut offsets = Offsets(7);
        let mut waited = 0;
        let start = Instant::now();
        for _ in 0..OPS {
            waited += u64::from(!op(offsets.next()));
        }
        let ns = start.elapsed().as_secs_f64() * 1e9 / OPS as f64;
        self.waited += waited;
        if waited == 0 {
            self.rounds.push(ns);
        }
    }

    async fn read(&mut self, node: &Node, ops: u64) {
        let mut offsets = Offsets(9);
        let mut buf = Buf::zeroed(4096);
        let start = Instant::now();
        for _ in 0..ops {
            buf = node.read(offsets.next(), buf).await.unwrap();
        }
        let ns = start.elapsed().as_secs_f64() * 1e9 / ops as f64;
        self.rounds.push(ns);
    }
}

async fn fill(node: &Node) {
    let buf = Buf::from_slice(&vec![7; 1 << 20]);
    for at in (0..SIZE).step_by(1 << 20) {
        node.write(at, &buf, false).await.unwrap();
    }
    node.flush().await.unwrap();
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_a_hit() {
    let mut disk = Disk::new(Setup {
        bits: 16,
        size: SIZE,
        ..Setup::default()
    })
    .await;
    disk.model = Vec::new();
    let mapped = disk.node.clone();
    let path = disk.path().with_extension("raw");
    std::fs::write(&path, b"").unwrap();
    let file = HostFile::open(FileOptions::new(path)).unwrap();
    let raw = Node::new("raw0", "file", false, Kind::File(file));
    fill(&raw).await;
    fill(&mapped).await;
    let image = mapped.image().unwrap().clone();
    let gate = Gate::default();
    let mut buf = vec![0; 4096];
    let mut lines = [
        "gate: enter and leave",
        "map: find the run",
        "Node::try_read, raw",
        "Node::try_read, mapped",
        "Node::try_write, raw",
        "Node::try_write, mapped",
        "Node::read, raw, through the engine",
        "Node::read, mapped, through the engine",
    ]
    .map(|what| Line {
        what,
        rounds: Vec::new(),
        waited: 0,
    });
    // Raw and mapped take turns.
    for _ in 0..ROUNDS {
        lines[0].round(|_| black_box(gate.try_enter()).is_some());
        lines[1].round(|at| black_box(image.map.run(ByteRange::between(at, at + 4096))).len > 0);
        lines[2].round(|at| black_box(raw.try_read(at, &mut buf)).is_some());
        lines[3].round(|at| black_box(mapped.try_read(at, &mut buf)).is_some());
        lines[4].round(|at| black_box(raw.try_write(at, &buf)).is_some());
        lines[5].round(|at| black_box(mapped.try_write(at, &buf)).is_some());
        lines[6].read(&raw, OPS / 10).await;
        lines[7].read(&mapped, OPS / 10).await;
    }
    println!("{:40} {:>9} {:>9} {:>9}", "ns", "median", "best", "worst");
    for line in &mut lines {
        line.rounds.sort_by(f64::total_cmp);
        let n = line.rounds.len();
        if n == 0 {
            println!("{:40} not measured: every round had to wait", line.what);
            continue;
        }
        let [best, median, worst] = [0, n / 2, n - 1].map(|i| line.rounds[i]);
        println!(
            "{:40} {median:>9.1} {best:>9.1} {worst:>9.1}   {n} rounds, {} would have waited",
            line.what, line.waited
        );
    }
}
