//! Carrying out requests: at once where the node can, in a task where it must wait.
//!
//! On the data thread. Invariant: whatever becomes of a request, exactly one outcome is told.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use outport_block::engine::buffer::SharedMem;
use outport_block::{Errno, Node};

use super::memory::{Gather, Memory};
use super::request::{Operation, Piece, Status};
use super::worker::{Done, Results, Shared, Ticket};
use crate::stats::Waited;

/// Reads up to this size are copied on this thread: longer ones would keep it from the others.
const INLINE_READ_MAX: u64 = 128 << 10;

/// How a request ended.
pub(super) type Outcome = Result<(), Status>;

fn status(errno: Errno) -> Status {
    match errno {
        Errno::NotSup => Status::Unsupported,
        _ => Status::IoError,
    }
}

/// Tell the driver.
pub(super) fn answer(memory: &Memory, addr: u64, outcome: Outcome) {
    let status = outcome.err().unwrap_or(Status::Ok);
    // The address was looked up when the request was parsed.
    let _ = memory.store(addr, &[status.byte()]);
}

/// Carry it out if that takes no waiting.
pub(super) fn at_once(shared: &Shared, operation: &Operation, payload: &Gather) -> Option<Outcome> {
    let export = shared.user.export();
    let stats = export.stats();
    let outcome = match operation {
        Operation::Read(offset) if payload.len() <= INLINE_READ_MAX => {
            let result = export.node().try_read_iov(*offset, payload.iov())?;
            stats.reads.fetch_add(1, Ordering::Relaxed);
            stats.read_bytes.fetch_add(payload.len(), Ordering::Relaxed);
            result.map_err(status)
        }
        Operation::Write(offset) if !shared.write_through.load(Ordering::Relaxed) => {
            let result = export.node().try_write_iov(*offset, payload.iov())?;
            stats.writes.fetch_add(1, Ordering::Relaxed);
            stats
                .write_bytes
                .fetch_add(payload.len(), Ordering::Relaxed);
            result.map_err(status)
        }
        Operation::GetId => {
            let into = payload.iov();
            let len = into.len().min(shared.serial.len());
            into.part(0, len).copy_from(&shared.serial[..len]);
            Ok(())
        }
        Operation::Fail(status) => Err(*status),
        _ => return None,
    };
    if outcome.is_err() {
        stats.errors.fetch_add(1, Ordering::Relaxed);
    }
    Some(outcome)
}

/// Carry it out in a task.
pub(super) fn spawn(
    shared: &Arc<Shared>,
    results: &Rc<Results>,
    queue: u16,
    ticket: Ticket,
    operation: Operation,
    payload: &Gather,
) {
    let (shared, results) = (shared.clone(), results.clone());
    let memory = payload.shared();
    shared.user.export().stats().begin();
    tokio::task::spawn_local(async move {
        let begun = Instant::now();
        let waited = match &operation {
            Operation::Read(_) => Waited::Read,
            Operation::Write(_) | Operation::WriteZeroes(_) => Waited::Write,
            Operation::Flush => Waited::Flush,
            Operation::Discard(_) => Waited::Discard,
            Operation::GetId | Operation::Fail(_) => Waited::Other,
        };
        let result = carry_out(&shared, operation, &memory).await;
        let stats = shared.user.export().stats();
        stats.end(waited, begun.elapsed());
        if result.is_err() {
            stats.errors.fetch_add(1, Ordering::Relaxed);
        }
        results.push(Done {
            queue,
            ticket,
            outcome: result.map_err(status),
        });
    });
}

async fn carry_out(shared: &Shared, operation: Operation, memory: &SharedMem) -> Result<(), Errno> {
    let export = shared.user.export();
    let (node, stats) = (export.node(), export.stats());
    let through = shared.write_through.load(Ordering::Relaxed);
    match operation {
        Operation::Read(offset) => {
            stats.reads.fetch_add(1, Ordering::Relaxed);
            stats
                .read_bytes
                .fetch_add(memory.len() as u64, Ordering::Relaxed);
            node.read_shared(offset, memory).await
        }
        Operation::Write(offset) => {
            stats.writes.fetch_add(1, Ordering::Relaxed);
            stats
                .write_bytes
                .fetch_add(memory.len() as u64, Ordering::Relaxed);
            node.write_shared(offset, memory, through).await
        }
        Operation::Flush => {
            stats.flushes.fetch_add(1, Ordering::Relaxed);
            node.flush().await
        }
        Operation::Discard(pieces) => {
            stats.discards.fetch_add(1, Ordering::Relaxed);
            for piece in pieces {
                node.discard(piece.range).await?;
            }
            sync(node, through).await
        }
        Operation::WriteZeroes(pieces) => {
            stats.writes.fetch_add(1, Ordering::Relaxed);
            for Piece { range, unmap } in pieces {
                node.write_zeroes(range, unmap).await?;
            }
            sync(node, through).await
        }
        // These take no waiting.
        Operation::GetId | Operation::Fail(_) => Err(Errno::Io),
    }
}

async fn sync(node: &Node, through: bool) -> Result<(), Errno> {
    if through { node.flush().await } else { Ok(()) }
}
