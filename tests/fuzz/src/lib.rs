//! A small mutation fuzzer for stable Rust.
//!
//! Each target is a test (`tests/targets.rs`) that feeds mutated seeds and pure
//! noise to one parser until its time is up. The time comes from
//! `FUZZ_SECONDS`; `make test` gives a short slice, `make fuzz` as much as you
//! like. A find prints the input in hexadecimal, so that it becomes a named
//! regression test.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

/// Inputs that are tried however short the time is.
const ROUNDS_MIN: u64 = 2000;

/// A generator whose whole state is its seed (xorshift64*).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// From a seed; 0 counts as 1.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 {
            0
        } else {
            (self.next() % end as u64) as usize
        }
    }
}

/// Numbers that parsers get wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// One input: a seed, changed a little or a lot, or noise.
pub fn mutate(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = match seeds.get(rng.below(seeds.len() + 1)) {
        Some(seed) => seed.clone(),
        None => (0..rng.below(256)).map(|_| rng.next() as u8).collect(),
    };
    for _ in 0..=rng.below(6) {
        let at = rng.below(data.len());
        match rng.below(8) {
            0 => data.truncate(at),
            1 if !data.is_empty() => data[at] ^= 1 << rng.below(8),
            2 if !data.is_empty() => data[at] = rng.next() as u8,
            3 => data.insert(at, rng.next() as u8),
            4 if data.len() >= at + 8 => {
                let edge = EDGES[rng.below(EDGES.len())];
                data[at..at + 8].copy_from_slice(&edge.to_be_bytes());
            }
            5 if data.len() >= at + 4 => {
                let edge = EDGES[rng.below(EDGES.len())] as u32;
                data[at..at + 4].copy_from_slice(&edge.to_be_bytes());
            }
            6 => {
                let end = at + rng.below(data.len() - at + 1).min(512);
                let piece = data[at..end].to_vec();
                let to = rng.below(data.len());
                data.splice(to..to, piece);
            }
            _ => {
                if let Some(other) = seeds.get(rng.below(seeds.len())) {
                    let from = rng.below(other.len());
                    data.truncate(at);
                    data.extend_from_slice(&other[from..]);
                }
            }
        }
    }
    data
}

/// Feed `target` until its time is up; prints the input that broke it.
pub fn run(name: &str, seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
    let seconds: u64 = std::env::var("FUZZ_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let seed: u64 = std::env::var("FUZZ_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let mut rng = Rng::new(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0;
    while rounds < ROUNDS_MIN || Instant::now() < until {
        let data = mutate(&mut rng, seeds);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(&data))) {
            let hex: String = data.iter().map(|b| format!("{b:02x}")).collect();
            eprintln!("{name}: FUZZ_SEED={seed} round {rounds} broke on {hex}");
            resume_unwind(panic);
        }
        rounds += 1;
    }
    println!("{name}: {rounds} inputs");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_bug_is_found() {
        let seeds = [b"hello".to_vec()];
        let found = catch_unwind(|| {
            run("planted", &seeds, |data| {
                assert!(!data.starts_with(b"hellp"), "planted")
            });
        });
        // One bit away from the seed: it must not take long.
        assert!(found.is_err());
    }
}
