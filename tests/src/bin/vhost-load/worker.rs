//! One queue's load.

use std::io;
use std::time::Instant;

use outport_tests::Rng;
use outport_tests::load::{Mark, Spent, Tally};

use crate::args::{Args, Op};
use crate::disk::Lane;

/// What one queue did.
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    /// Blocks that read as something else than what was written.
    pub(crate) wrong: u64,
    pub(crate) spent: Spent,
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
    tally: Tally,
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
                self.tally.errors += self.done.iter().filter(|it| it.1 != 0).count() as u64;
                return Ok(());
            }
            if self.args.poll {
                std::hint::spin_loop();
            } else {
                self.lane.wait()?;
            }
        }
    }

    /// Adds the completions to the measured ones.
    fn tally(&mut self, now: Instant) {
        self.tally.ops += self.done.len() as u64;
        for (slot, _) in &self.done {
            let took = now - self.slots[*slot].1;
            self.tally.latency.record(took.as_nanos() as u64);
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
        tally: Tally::default(),
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
    let mut measured: Option<Mark> = None;
    let spent = loop {
        work.finish()?;
        let now = Instant::now();
        match measured {
            None if now - begun >= args.ramp => measured = Some(Mark::now(args.pid)),
            None => {}
            Some(begin) => {
                work.tally(now);
                if now - begin.at >= args.measured {
                    break begin.until(&Mark::now(args.pid));
                }
            }
        }
        let done = std::mem::take(&mut work.done);
        for (slot, _) in &done {
            work.start(write, next(), *slot, now)?;
        }
        work.done = done;
        work.lane.kick()?;
    };
    Ok(Outcome {
        tally: std::mem::take(&mut work.tally),
        wrong: 0,
        spent,
    })
}

/// What block `block` holds.
fn word(seed: u64, block: u64) -> impl Fn(u64) -> u64 {
    move |n| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block << 20 ^ n
}

fn verify(work: &mut Work<'_, '_>, index: u64) -> io::Result<Outcome> {
    let args = work.args;
    let mut rng = Rng::new(args.seed + index);
    let begun = Mark::now(None);
    let mut wrong = 0;
    for write in [true, false] {
        let mut blocks: Vec<u64> = (0..work.count).collect();
        rng.shuffle(&mut blocks);
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
                work.start(write, block, slot, begun.at)?;
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
            work.tally.ops += work.done.len() as u64;
        }
    }
    Ok(Outcome {
        tally: std::mem::take(&mut work.tally),
        wrong,
        spent: begun.until(&Mark::now(None)),
    })
}
