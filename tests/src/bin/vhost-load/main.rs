//! `vhost-load`: a load generator and verifier for vhost-user-blk, on libblkio's Rust core.
//!
//! One thread per queue, or one for all; what it spends per request is a fraction of what a server
//! does. `--op verify` writes blocks that name themselves and reads them back.

mod args;
mod disk;
mod worker;

use std::io;
use std::process::ExitCode;

use outport_tests::load::{self, Totals};
use serde_json::{Value, json};

use args::Args;
use disk::Disk;
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
    match run(&args) {
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
fn run(args: &Args) -> io::Result<Vec<Outcome>> {
    let mut disk = Disk::open(args)?;
    let capacity = disk.capacity();
    let work = (0_u64..)
        .zip(disk.lanes())
        .map(|(index, lane)| move || worker::run(args, index, capacity, lane));
    load::together(work.collect())
}

/// The shares of all requests whose latencies are reported.
const LATENCIES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("max", 1.0)];

fn report(args: &Args, outcomes: &[Outcome]) -> Value {
    let totals = Totals::of(outcomes.iter().map(|one| (&one.tally, &one.spent)));
    let mut report = totals.report(args.block_size as u64, &LATENCIES);
    let wrong: u64 = outcomes.iter().map(|one| one.wrong).sum();
    report["wrong"] = json!(wrong);
    report
}
