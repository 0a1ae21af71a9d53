//! `nbd-load`: a load generator that leaves the NBD server as the bottleneck.
//!
//! fio's nbd engine and nbdcopy spend several times more CPU per operation than a good server
//! does, so that they measure themselves. This client sends in batches, receives as much as there
//! is, parses headers only, and takes two time stamps per turn.

mod args;
mod connection;
mod cpu;
mod histogram;
mod poll;
mod worker;

use std::io;
use std::process::ExitCode;
use std::sync::Barrier;

use serde_json::{Value, json};

use args::Args;
use histogram::Histogram;
use worker::Outcome;

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(text) if text == args::USAGE => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprintln!("nbd-load: {text}");
            return ExitCode::from(2);
        }
    };
    match load(&args) {
        Ok(outcomes) => {
            println!("{}", report(&args, &outcomes));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nbd-load: {}: {error}", args.address);
            ExitCode::FAILURE
        }
    }
}

/// Runs all threads; they start together, after every connection is open.
fn load(args: &Args) -> io::Result<Vec<Outcome>> {
    let opened = (0..args.threads)
        .map(|first| worker::connect(args, first))
        .collect::<io::Result<Vec<_>>>()?;
    let start = Barrier::new(args.threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = opened
            .into_iter()
            .map(|connections| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    worker::run(args, connections)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a worker does not panic"))
            .collect()
    })
}

fn report(args: &Args, outcomes: &[Outcome]) -> Value {
    let ops: u64 = outcomes.iter().map(|one| one.tally.ops).sum();
    let errors: u64 = outcomes.iter().map(|one| one.tally.errors).sum();
    let per_second: f64 = outcomes
        .iter()
        .map(|one| one.tally.ops as f64 / one.elapsed.as_secs_f64())
        .sum();
    let seconds = outcomes
        .iter()
        .map(|one| one.elapsed.as_secs_f64())
        .fold(0.0, f64::max);
    let client: f64 = outcomes
        .iter()
        .map(|one| one.client_cpu.as_secs_f64())
        .sum();
    let mut latency = Histogram::new();
    outcomes
        .iter()
        .for_each(|one| latency.merge(&one.tally.latency));
    let per_op = |cpu: f64| rounded(cpu * 1e6 / (ops.max(1)) as f64);
    let server = outcomes[0].server_cpu.map(|cpu| cpu.as_secs_f64());
    json!({
        "ops": ops,
        "errors": errors,
        "bytes": ops * u64::from(args.block_size),
        "seconds": rounded(seconds),
        "iops": rounded(per_second),
        "mb_per_s": rounded(per_second * f64::from(args.block_size) / 1e6),
        "server_cpu_us_per_op": server.map(per_op),
        "server_busy": server.map(|cpu| rounded(cpu / seconds)),
        "client_cpu_us_per_op": per_op(client),
        "client_busy": rounded(client / seconds / outcomes.len() as f64),
        "flush_ms": outcomes[0].flush.map(|time| rounded(time.as_secs_f64() * 1e3)),
        "latency_us": {
            "p50": latency.percentile_us(0.5),
            "p90": latency.percentile_us(0.9),
            "p99": latency.percentile_us(0.99),
            "p999": latency.percentile_us(0.999),
            "max": latency.percentile_us(1.0),
        },
    })
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
