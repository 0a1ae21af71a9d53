//! Reads: which chunks a reply has, and how the bytes of each get to the client.
//!
//! On the connection's iothread. What reads as zeroes is looked up when the request comes, without
//! waiting, and travels as holes; the rest is data, whether it is zero or not. Invariants: the
//! chunks of a reply cover the range once; a hole was one at some moment since the request came;
//! only the last chunk says that it is.

mod layout;

use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use outport_block::node::Segment;
use outport_block::{Buf, ByteRange, Errno, Node};

use super::connection::Shared;
use super::out::Out;
use super::reply::{DATA_HEADER_MAX, ReplyMode, ReplyTo};
use super::serve::{Reply, Task, count, fail};
use super::session::{Checked, Operation};
use crate::pool;
use layout::{Layout, Piece, layout};

/// From this size on, reads of warm files are sent from the page cache.
const SENDFILE_MIN: u64 = 16 << 10;

/// Reads up to this size are copied into the reply batch.
const INLINE_READ_MAX: u64 = 128 << 10;

/// A read with DF, which is answered with one content chunk.
const UNFRAGMENTED: Operation = Operation::Read { df: true };

pub(super) fn read(
    shared: &Rc<Shared>,
    to: ReplyTo,
    checked: Checked,
    range: ByteRange,
    out: &mut Out,
) {
    let export = shared.user.export();
    if range.is_empty() {
        return out.bytes(|bytes| to.done(bytes));
    }
    count(&export.stats().reads, 1);
    count(&export.stats().read_bytes, range.len());
    if !export.options().reads.permit(range) {
        return fail(shared, to, checked.operation, Errno::Perm, out);
    }
    if discards(shared) {
        return spawn_read(shared, to, checked, range);
    }
    if to.mode() != ReplyMode::Simple {
        match layout(export.node(), range) {
            Layout::Data => {}
            Layout::Zero => return hole(to, range, true, out),
            Layout::Unasked => return spawn_learning(shared, to, checked, range),
            Layout::Mixed(_) if checked.operation == UNFRAGMENTED => {}
            Layout::Mixed(pieces) => return fragments(shared, to, checked, &pieces, out),
        }
    }
    match at_once(shared, to, range, INLINE_READ_MAX, true, out) {
        Some(Ok(())) => {}
        Some(Err(e)) => fail(shared, to, checked.operation, e, out),
        None => spawn_read(shared, to, checked, range),
    }
}

/// Whether what is read is given up. Not by a client that may only read: what it was granted is to
/// change nothing.
fn discards(shared: &Shared) -> bool {
    shared.user.export().options().reads.discard && shared.session.may_write()
}

/// The check bounds a read by the maximum payload, which fits 32 bits.
fn hole(to: ReplyTo, range: ByteRange, last: bool, out: &mut Out) {
    out.bytes(|bytes| {
        to.hole(range.offset(), range.len() as u32, last, bytes);
    });
}

/// A reply of several chunks: from the first one that must wait on it is a task's.
fn fragments(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, pieces: &[Piece], out: &mut Out) {
    let mut copied_max = INLINE_READ_MAX;
    for (n, piece) in pieces.iter().enumerate() {
        let (range, last) = (piece.range, n + 1 == pieces.len());
        if piece.zero {
            hole(to, range, last, out);
            continue;
        }
        match at_once(shared, to, range, copied_max, last, out) {
            Some(Ok(())) => copied_max = copied_max.saturating_sub(range.len()),
            Some(Err(e)) => return fail(shared, to, checked.operation, e, out),
            None => return spawn_pieces(shared, to, checked, pieces[n..].to_vec()),
        }
    }
}

/// One chunk of data, or a simple reply, if no byte of it has to be waited for; `None`: one has.
fn at_once(
    shared: &Rc<Shared>,
    to: ReplyTo,
    range: ByteRange,
    copied_max: u64,
    last: bool,
    out: &mut Out,
) -> Option<Result<(), Errno>> {
    if range.len() >= SENDFILE_MIN && send_from_cache(shared, to, range, last, out) {
        return Some(Ok(()));
    }
    if range.len() > copied_max {
        return None;
    }
    out.filled(
        |header| to.data(range.offset(), range.len() as u32, last, header),
        range.len() as usize,
        |data| shared.user.export().node().try_read(range.offset(), data),
    )
}

/// Queue the range as pieces of warm files; `false`: it is not all that.
fn send_from_cache(
    shared: &Rc<Shared>,
    to: ReplyTo,
    range: ByteRange,
    last: bool,
    out: &mut Out,
) -> bool {
    let node = shared.user.export().node();
    // An image may move a cluster while the socket still refers to its pages,
    // unless nobody can write it.
    if node.may_move() {
        return false;
    }
    let Some(segments) = warm(node, range) else {
        return false;
    };
    out.bytes(|bytes| to.data(range.offset(), range.len() as u32, last, bytes));
    for segment in segments {
        match segment {
            Segment::File { node, offset, len } => out.file(node, offset, len),
            Segment::Zero { len } | Segment::Unknown { len } => out.zeroes(len),
        }
    }
    true
}

/// The segments of the range, if all of them are zeroes or in the page cache.
fn warm(node: &Arc<Node>, range: ByteRange) -> Option<Vec<Segment>> {
    let mut segments = Vec::new();
    let mut at = range.offset();
    while at < range.end() {
        let segment = node.segment(ByteRange::between(at, range.end()));
        match &segment {
            Segment::File { node, offset, len } => {
                let part = ByteRange::between(*offset, offset + len);
                if !node.host_file().is_some_and(|f| f.is_resident(part)) {
                    return None;
                }
            }
            Segment::Zero { .. } => {}
            Segment::Unknown { .. } => return None,
        }
        at += segment.len();
        segments.push(segment);
    }
    Some(segments)
}

/// All of it as one chunk, or a simple reply, in a task.
fn spawn_read(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, range: ByteRange) {
    let task = Task::begin(shared, range.len(), checked.operation);
    tokio::task::spawn_local(async move { answer(&task, to, checked, range).await });
}

async fn answer(task: &Task, to: ReplyTo, checked: Checked, range: ByteRange) {
    let node = task.0.user.export().node();
    let read = async {
        let buf = pool::take(range.len() as usize);
        let buf = node.read(range.offset(), buf).await?;
        if discards(&task.0) {
            node.discard(range).await?;
        }
        Ok(buf)
    };
    match read.await {
        Ok(buf) => {
            let piece = Piece { range, zero: false };
            task.reply(chunk(to, piece, Some(buf), true));
        }
        Err(e) => task.error(to, checked.operation, e),
    }
}

/// A range that nobody was asked about yet, in a task.
fn spawn_learning(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, range: ByteRange) {
    let task = Task::begin(shared, range.len(), checked.operation);
    tokio::task::spawn_local(async move {
        let node = task.0.user.export().node();
        // A read would fail of the same, having asked once more.
        if let Err(e) = node.learn(range).await {
            return task.error(to, checked.operation, e);
        }
        match layout(node, range) {
            Layout::Zero => {
                let piece = Piece { range, zero: true };
                task.reply(chunk(to, piece, None, true));
            }
            Layout::Mixed(pieces) if checked.operation != UNFRAGMENTED => {
                answer_pieces(&task, to, checked, &pieces).await;
            }
            _ => answer(&task, to, checked, range).await,
        }
    });
}

/// The pieces, which end with the request, in a task. None goes out before all were read.
fn spawn_pieces(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, pieces: Vec<Piece>) {
    let data = pieces.iter().filter(|piece| !piece.zero);
    let bytes = data.map(|piece| piece.range.len()).sum();
    let task = Task::begin(shared, bytes, checked.operation);
    tokio::task::spawn_local(async move { answer_pieces(&task, to, checked, &pieces).await });
}

async fn answer_pieces(task: &Task, to: ReplyTo, checked: Checked, pieces: &[Piece]) {
    let node = task.0.user.export().node();
    let reads = pieces.iter().map(async |piece| {
        if piece.zero {
            return Ok(None);
        }
        // The pool's are 64 KiB at least: many would take more memory than is counted.
        let buf = Buf::zeroed(piece.range.len() as usize);
        node.read(piece.range.offset(), buf).await.map(Some)
    });
    let payloads: Result<Vec<_>, Errno> = join_all(reads).await.into_iter().collect();
    match payloads {
        Ok(payloads) => {
            let last = pieces.len() - 1;
            for (n, (piece, payload)) in pieces.iter().zip(payloads).enumerate() {
                task.reply(chunk(to, *piece, payload, n == last));
            }
        }
        Err(e) => task.error(to, checked.operation, e),
    }
}

fn chunk(to: ReplyTo, piece: Piece, payload: Option<Buf>, last: bool) -> Reply {
    let (offset, len) = (piece.range.offset(), piece.range.len() as u32);
    let mut head = Vec::with_capacity(DATA_HEADER_MAX);
    if piece.zero {
        to.hole(offset, len, last, &mut head);
    } else {
        to.data(offset, len, last, &mut head);
    }
    Reply { head, payload }
}
