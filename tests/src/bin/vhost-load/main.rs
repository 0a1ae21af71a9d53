//! `vhost-load`: a load generator and verifier for vhost-user-blk, on libblkio's Rust core.
//!
//! One thread per queue, or one for all; what it spends per request is a fraction of what a server
//! does. `--op verify` writes blocks that name themselves and reads them back.

mod args;
#[path = "../nbd-load/cpu.rs"]
mod cpu;
mod disk;
#[path = "../nbd-load/histogram.rs"]
mod histogram;
mod worker;

use std::io;
use std::process::ExitCode;
use std::sync::Barrier;

use serde_json::{Value, json};

use args::Args;
use disk::Disk;
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
            eprintln!("vhost-load: {text}");
            return ExitCode::from(2);
        }
    };
    match load(&args) {
        Ok(outcomes) => {
            println!("{}", report(&args, &outcomes));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vhost-load: {}: {error}", args.socket.display());
            ExitCode::FAILURE
        }
    }
}

/// One thread per queue; they start together.
fn load(args: &Args) -> io::Result<Vec<Outcome>> {
    let mut disk = Disk::open(args)?;
    let capacity = disk.capacity();
    let start = Barrier::new(args.queues);
    let lanes = disk.lanes();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0_u64..)
            .zip(lanes)
            .map(|(index, lane)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    worker::run(args, index, capacity, lane)
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
    let ops: u64 = outcomes.iter().map(|one| one.ops).sum();
    let errors: u64 = outcomes.iter().map(|one| one.errors).sum();
    let wrong: u64 = outcomes.iter().map(|one| one.wrong).sum();
    let rate = |one: &Outcome| one.ops as f64 / one.elapsed.as_secs_f64();
    let per_second: f64 = outcomes.iter().map(rate).sum();
    let longest = outcomes.iter().map(|one| one.elapsed.as_secs_f64());
    let seconds = longest.fold(0.0, f64::max);
    let client: f64 = outcomes
        .iter()
        .map(|one| one.client_cpu.as_secs_f64())
        .sum();
    let mut latency = Histogram::new();
    outcomes.iter().for_each(|one| latency.merge(&one.latency));
    let per_op = |cpu: f64| rounded(cpu * 1e6 / (ops.max(1)) as f64);
    let server = outcomes[0].server_cpu.map(|cpu| cpu.as_secs_f64());
    json!({
        "ops": ops,
        "errors": errors,
        "wrong": wrong,
        "bytes": ops * args.block_size as u64,
        "seconds": rounded(seconds),
        "iops": rounded(per_second),
        "mb_per_s": rounded(per_second * args.block_size as f64 / 1e6),
        "server_cpu_us_per_op": server.map(per_op),
        "server_busy": server.map(|cpu| rounded(cpu / seconds)),
        "client_cpu_us_per_op": per_op(client),
        "latency_us": {
            "p50": latency.percentile_us(0.5),
            "p99": latency.percentile_us(0.99),
            "max": latency.percentile_us(1.0),
        },
    })
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
