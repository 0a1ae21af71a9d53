//! One client thread: its connections, its clock, its loop.

use std::io;
use std::time::{Duration, Instant};

use outport_tests::load::{Mark, Spent, Tally};
use outport_tests::nbd::Haggle;

use crate::args::{Args, Order};
use crate::connection::{Blocks, Connection};
use crate::poll::Epoll;

/// What one thread measured.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    pub(crate) spent: Spent,
    pub(crate) flush: Option<Duration>,
}

/// Opens connections `first`, `first + threads`, ... of the whole set.
pub(crate) fn connect(args: &Args, first: usize) -> io::Result<Vec<Connection>> {
    (first..args.connections)
        .step_by(args.threads)
        .map(|number| {
            let mut haggle = haggle(args)?;
            if !args.simple {
                // An old server may refuse; simple replies then.
                let _ = haggle.structured_replies();
            }
            let client = haggle.go(&args.export)?;
            let blocks = blocks(args, client.export.size, number)?;
            let mut connection =
                Connection::new(client, args, blocks, args.seed + 1000 * number as u64);
            connection.socket().set_timeout(None)?;
            Ok(connection)
        })
        .collect()
}

fn haggle(args: &Args) -> io::Result<Haggle> {
    let haggle = Haggle::connect(&args.address)?;
    match &args.authority {
        Some(authority) => haggle.start_tls(authority),
        None => Ok(haggle),
    }
}

/// The part of the export that connection `number` visits, and in which order.
fn blocks(args: &Args, export_size: u64, number: usize) -> io::Result<Blocks> {
    let size = args.size.unwrap_or(export_size.saturating_sub(args.offset));
    let all = size / args.stride;
    let mut blocks = Blocks {
        offset: args.offset,
        count: all,
        next: 0,
        shuffled: Vec::new(),
    };
    let share = all / args.connections as u64;
    if args.order != Order::Random {
        blocks.offset += share * number as u64 * args.stride;
        blocks.count = share;
    }
    if args.order == Order::Once {
        blocks.shuffled = (0..share as u32).collect();
        outport_tests::Rng::new(args.seed + number as u64).shuffle(&mut blocks.shuffled);
    }
    if blocks.count == 0 || args.offset + size > export_size {
        return Err(io::Error::other(format!(
            "the export has only {export_size} bytes"
        )));
    }
    Ok(blocks)
}

/// Loads the server until the time is over or every block was visited.
pub(crate) fn run(args: &Args, mut connections: Vec<Connection>) -> io::Result<Outcome> {
    let origin = Instant::now();
    let clock = || origin.elapsed().as_nanos() as u64;
    // A single connection blocks in recv, which saves a system call per turn.
    let poll = (connections.len() > 1)
        .then(|| Epoll::new(&mut connections))
        .transpose()?;
    let mut ready: Vec<usize> = (0..connections.len()).collect();
    let (mut measured, mut around) = (Tally::default(), Tally::default());
    let (mut begin, mut end) = (None, None);
    loop {
        let now = origin.elapsed();
        if begin.is_none() && now >= args.ramp {
            begin = Some(Mark::now(args.pid));
        }
        let over = args.order != Order::Once && now >= args.ramp + args.measured;
        if end.is_none() && over {
            end = Some(Mark::now(args.pid));
        }
        for &at in &ready {
            let connection = &mut connections[at];
            if end.is_none() {
                connection.issue(now.as_nanos() as u64);
            }
            connection.flush()?;
            if let Some(poll) = &poll {
                poll.want_output(connection, at)?;
            }
        }
        if connections.iter().all(Connection::idle) {
            break;
        }
        if let Some(poll) = &poll {
            poll.wait(&mut ready)?;
        }
        let counted = begin.is_some() && end.is_none();
        let tally = if counted { &mut measured } else { &mut around };
        for &at in &ready {
            connections[at].receive(tally, clock)?;
        }
    }
    let begin = begin.unwrap_or_else(|| Mark::now(args.pid));
    let end = end.unwrap_or_else(|| Mark::now(args.pid));
    measured.errors += around.errors;
    let flush = args.final_flush.then(|| flush(args)).transpose()?;
    Ok(Outcome {
        tally: measured,
        spent: begin.until(&end),
        flush,
    })
}

/// One FLUSH on a connection of its own.
fn flush(args: &Args) -> io::Result<Duration> {
    let mut client = haggle(args)?.go(&args.export)?;
    client.socket().set_timeout(None)?;
    let start = Instant::now();
    client
        .flush()?
        .map_err(|errno| io::Error::other(format!("FLUSH failed: {errno}")))?;
    Ok(start.elapsed())
}
