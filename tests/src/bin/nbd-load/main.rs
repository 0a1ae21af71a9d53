//! `nbd-load`: a load generator that leaves the NBD server as the bottleneck.
//!
//! fio's nbd engine and nbdcopy spend several times more CPU per operation than a good server
//! does, so that they measure themselves. This client sends in batches, receives as much as there
//! is, parses headers only, and takes two time stamps per turn.

mod args;
mod connection;
mod poll;
mod worker;

use std::io;
use std::process::ExitCode;

use outport_tests::load::{self, Totals, rounded};
use serde_json::{Value, json};

use args::Args;
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
    match run(&args) {
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
fn run(args: &Args) -> io::Result<Vec<Outcome>> {
    let opened = (0..args.threads)
        .map(|first| worker::connect(args, first))
        .collect::<io::Result<Vec<_>>>()?;
    let work = opened
        .into_iter()
        .map(|connections| move || worker::run(args, connections));
    load::together(work.collect())
}

/// The shares of all requests whose latencies are reported.
const LATENCIES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p99", 0.99),
    ("p999", 0.999),
    ("max", 1.0),
];

fn report(args: &Args, outcomes: &[Outcome]) -> Value {
    let totals = Totals::of(outcomes.iter().map(|one| (&one.tally, &one.spent)));
    let mut report = totals.report(u64::from(args.block_size), &LATENCIES);
    let flush = outcomes[0].flush.map(|time| time.as_secs_f64() * 1e3);
    report["client_busy"] = json!(totals.client_busy());
    report["flush_ms"] = json!(flush.map(rounded));
    report
}
