//! One queue's load.

use std::io;
use std::time::{Duration, Instant};

use outport_tests::Rng;

use crate::args::{Args, Op};
use crate::cpu;
use crate::disk::Lane;
use crate::histogram::Histogram;

/// What one queue did.
pub(crate) struct Outcome {
    pub(crate) ops: u64,
    pub(crate) errors: u64,
    /// Blocks that read as something else than what was written.
    pub(crate) wrong: u64,
    pub(crate) elapsed: Duration,
    pub(crate) latency: Histogram,
    pub(crate) client_cpu: Duration,
    pub(crate) server_cpu: Option<Duration>,
}

/// A queue at work.
struct Work<'a, 'b> {
    args: &'a Args,
    lane: Lane<'b>,
    /// Blocks of this queue: the first, and how many.
    first: u64,
    count: u64,
    /// What each slot does, and since when.
    slots: Vec<(u64, Instant)>,
    done: Vec<(usize, i32)>,
    errors: u64,
}

impl Work<'_, '_> {
    fn offset(&self, block: u64) -> u64 {
        (self.first + block) * self.args.block_size as u64
    }

    fn start(&mut self, write: bool, block: u64, slot: usize, now: Instant) -> io::Result<()> {
        self.slots[slot] = (block, now);
        let offset = self.offset(block);
        if write {
            self.lane.write(offset, slot)
        } else {
            self.lane.read(offset, slot)
        }
    }

    /// Completions; waits for at least one.
    fn finish(&mut self) -> io::Result<()> {
        self.done.clear();
        loop {
            self.lane.completed(&mut self.done);
            if !self.done.is_empty() {
                self.errors += self.done.iter().filter(|it| it.1 != 0).count() as u64;
                return Ok(());
            }
            if self.args.poll {
                std::hint::spin_loop();
            } else {
                self.lane.wait()?;
            }
        }
    }
}

/// Runs one queue to its end.
pub(crate) fn run(
    args: &Args,
    index: u64,
    capacity: u64,
    mut lane: Lane<'_>,
) -> io::Result<Outcome> {
    lane.want_calls(!args.poll);
    let size = args.size.unwrap_or(capacity).min(capacity);
    let count = size / args.block_size as u64 / args.queues as u64;
    let mut work = Work {
        args,
        lane,
        first: index * count,
        count,
        slots: vec![(0, Instant::now()); args.depth],
        done: Vec::new(),
        errors: 0,
    };
    match args.op {
        Op::Verify => verify(&mut work, index),
        Op::Read => measure(&mut work, index, false),
        Op::Write => measure(&mut work, index, true),
    }
}

fn measure(work: &mut Work<'_, '_>, index: u64, write: bool) -> io::Result<Outcome> {
    let args = work.args;
    let mut rng = Rng::new(args.seed + index);
    let mut at = 0;
    let count = work.count;
    let mut next = || {
        if args.sequential {
            at = (at + 1) % count;
            at
        } else {
            rng.below(count)
        }
    };
    for slot in 0..args.depth {
        work.lane.fill(slot, |n| n ^ (slot as u64) << 32);
    }
    let begun = Instant::now();
    for slot in 0..args.depth {
        work.start(write, next(), slot, begun)?;
    }
    work.lane.kick()?;
    let mut outcome = None;
    let clocks = || (cpu::of_this_thread(), args.pid.and_then(cpu::of_process));
    let mut before = clocks();
    let mut since = begun;
    loop {
        work.finish()?;
        let now = Instant::now();
        if outcome.is_none() && now - begun >= args.ramp {
            outcome = Some((0_u64, Histogram::new()));
            (before, since) = (clocks(), now);
        } else if let Some((ops, latency)) = &mut outcome {
            *ops += work.done.len() as u64;
            for (slot, _) in &work.done {
                let took = now - work.slots[*slot].1;
                latency.record(took.as_nanos() as u64);
            }
            if now - since >= args.measured {
                break;
            }
        }
        let done = std::mem::take(&mut work.done);
        for (slot, _) in &done {
            work.start(write, next(), *slot, now)?;
        }
        work.done = done;
        work.lane.kick()?;
    }
    let (ops, latency) = outcome.unwrap_or((0, Histogram::new()));
    let after = clocks();
    let server_cpu = after.1.zip(before.1).map(|(after, before)| after - before);
    Ok(Outcome {
        ops,
        errors: work.errors,
        wrong: 0,
        elapsed: since.elapsed(),
        latency,
        client_cpu: after.0 - before.0,
        server_cpu,
    })
}

/// What block `block` holds.
fn word(seed: u64, block: u64) -> impl Fn(u64) -> u64 {
    move |n| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block << 20 ^ n
}

fn verify(work: &mut Work<'_, '_>, index: u64) -> io::Result<Outcome> {
    let args = work.args;
    let mut rng = Rng::new(args.seed + index);
    let begun = Instant::now();
    let (mut ops, mut wrong) = (0, 0);
    for write in [true, false] {
        let mut blocks: Vec<u64> = (0..work.count).collect();
        for n in (1..blocks.len()).rev() {
            blocks.swap(n, rng.below(n as u64 + 1) as usize);
        }
        let mut free: Vec<usize> = (0..args.depth).collect();
        let total = blocks.len();
        let mut finished = 0;
        while finished < total {
            while let (Some(slot), Some(block)) = (free.last().copied(), blocks.last().copied()) {
                free.pop();
                blocks.pop();
                if write {
                    work.lane.fill(slot, word(args.seed, work.first + block));
                }
                work.start(write, block, slot, begun)?;
            }
            work.lane.kick()?;
            work.finish()?;
            for (slot, _) in &work.done {
                let block = work.first + work.slots[*slot].0;
                if !write && !work.lane.holds(*slot, word(args.seed, block)) {
                    wrong += 1;
                }
                free.push(*slot);
            }
            finished += work.done.len();
            ops += work.done.len() as u64;
        }
    }
    Ok(Outcome {
        ops,
        errors: work.errors,
        wrong,
        elapsed: begun.elapsed(),
        latency: Histogram::new(),
        client_cpu: cpu::of_this_thread(),
        server_cpu: None,
    })
}
