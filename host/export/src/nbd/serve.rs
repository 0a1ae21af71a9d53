//! Carrying out checked requests: at once where the node can, in a task where
//! it must wait.
//!
//! On the connection's iothread. Invariant: every request gets exactly one
//! reply, unless the connection ends first.

use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use outport_block::metacontext::{EXTENTS_AT_ONCE, LOOKS_MAX};
use outport_block::{Buf, ByteRange, Errno};

use super::connection::Shared;
use super::out::Out;
use super::reads;
use super::reply::ReplyTo;
use super::session::{Checked, Operation};
use super::status::{StatusAsked, StatusExtents};
use super::wire::Request;
use crate::export::Export;
use crate::pool;
use crate::stats::Waited;

/// `NBD_STATE_HOLE`.
const STATE_HOLE: u64 = 1;
/// `NBD_STATE_ZERO`.
const STATE_ZERO: u64 = 2;

/// A reply that a task made, or one chunk of it.
pub(super) struct Reply {
    pub(super) head: Vec<u8>,
    pub(super) payload: Option<Buf>,
}

impl Reply {
    /// Bytes that it keeps until it is sent.
    fn len(&self) -> u64 {
        (self.head.len() + self.payload.as_ref().map_or(0, Buf::len)) as u64
    }

    /// Put it into the send queue, which counts it from now on.
    pub(super) fn queue(self, shared: &Shared, out: &mut Out) {
        shared.bytes.set(shared.bytes.get() - self.len());
        out.written(self.head);
        if let Some(payload) = self.payload {
            out.payload(payload);
        }
    }
}

/// Block status requests of a connection that are being answered; the others wait in turn. One that
/// asks for all of a large image keeps a thread busy, and a client may ask for thousands.
pub(super) const STATUS_AT_ONCE: usize = 4;

/// A request without payload.
pub(super) fn request(shared: &Rc<Shared>, request: &Request, checked: Checked, out: &mut Out) {
    let to = shared.session.reply_to(request);
    shared.user.export().stats().touch();
    let range = ByteRange::between(checked.offset, checked.offset + checked.length);
    match checked.operation {
        Operation::Read { .. } => reads::read(shared, to, checked, range, out),
        Operation::Cache => spawn(shared, to, checked, move |shared| async move {
            shared.user.export().node().prefetch(range).await
        }),
        Operation::Flush => {
            count(&shared.user.export().stats().flushes, 1);
            spawn(shared, to, checked, move |shared| async move {
                shared.user.export().node().flush().await
            });
        }
        Operation::Trim { fua } => {
            count(&shared.user.export().stats().discards, 1);
            spawn(shared, to, checked, move |shared| async move {
                let export = shared.user.export();
                export.node().discard(range).await?;
                if fua || export.options().writethrough {
                    export.node().flush().await?;
                }
                Ok(())
            });
        }
        Operation::WriteZeroes { fua, no_hole, fast } => {
            count(&shared.user.export().stats().writes, 1);
            spawn(shared, to, checked, move |shared| async move {
                let export = shared.user.export();
                let node = export.node();
                if fast {
                    node.zero_fast(range, !no_hole).await?;
                } else {
                    node.write_zeroes(range, !no_hole).await?;
                }
                if fua || export.options().writethrough {
                    node.flush().await?;
                }
                Ok(())
            });
        }
        Operation::BlockStatus { .. } => status(shared, to, checked, range),
        // These have a payload or were dealt with before.
        Operation::Write { .. } | Operation::FilteredStatus { .. } | Operation::Disconnect => {
            out.bytes(|bytes| to.done(bytes));
        }
    }
}

/// A request whose payload is in the receive buffer.
pub(super) fn small_payload(
    shared: &Rc<Shared>,
    request: &Request,
    checked: Checked,
    payload: &[u8],
    out: &mut Out,
) {
    let Operation::Write { fua } = checked.operation else {
        return filtered_status(shared, request, payload, out);
    };
    let export = shared.user.export();
    export.stats().touch();
    if !fua && !export.options().writethrough {
        let to = shared.session.reply_to(request);
        match export.node().try_write(checked.offset, payload) {
            Some(Ok(())) => {
                count(&export.stats().writes, 1);
                count(&export.stats().write_bytes, checked.length);
                return out.bytes(|bytes| to.done(bytes));
            }
            Some(Err(e)) => return fail(shared, to, checked.operation, e, out),
            None => {}
        }
    }
    start_write(shared, request, checked, Buf::from_slice(payload));
}

/// A write whose payload has its own buffer.
pub(super) fn start_write(shared: &Rc<Shared>, request: &Request, checked: Checked, buf: Buf) {
    let to = shared.session.reply_to(request);
    let Operation::Write { fua } = checked.operation else {
        return;
    };
    let stats = shared.user.export().stats();
    stats.touch();
    count(&stats.writes, 1);
    count(&stats.write_bytes, checked.length);
    spawn(shared, to, checked, move |shared| async move {
        let export = shared.user.export();
        let fua = fua || export.options().writethrough;
        let result = export.node().write(checked.offset, &buf, fua).await;
        pool::give_back(buf);
        result
    });
}

fn filtered_status(shared: &Rc<Shared>, request: &Request, payload: &[u8], out: &mut Out) {
    let to = shared.session.reply_to(request);
    let size = shared.user.export().node().size();
    match shared.session.check_status_payload(request, payload, size) {
        Ok(checked) => {
            let range = ByteRange::between(checked.offset, checked.offset + checked.length);
            status(shared, to, checked, range);
        }
        Err(super::session::Reject::Answer { errno, text, .. }) => {
            out.bytes(|bytes| to.error(errno, text, bytes));
        }
        Err(super::session::Reject::Disconnect(_)) => {}
    }
}

fn status(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, range: ByteRange) {
    let (one, mask) = match checked.operation {
        Operation::BlockStatus { one, contexts } => (one, contexts),
        _ => return,
    };
    let size = shared.user.export().node().size();
    let asked = StatusAsked {
        one,
        requested: range.len(),
        available: size.saturating_sub(range.offset()),
        contexts: mask.count(),
    };
    let task = Task::begin(shared, asked.reply_max(), checked.operation);
    tokio::task::spawn_local(async move {
        let Ok(_turn) = task.0.status_turns.acquire().await else {
            return;
        };
        let mut head = Vec::new();
        let export = task.0.user.export();
        let ids: Vec<u32> = task.0.session.contexts_in(mask).map(|c| c.id).collect();
        for (n, id) in ids.iter().enumerate() {
            let mut extents = StatusExtents::begin(to, *id, asked, &mut head);
            if let Err(e) = describe(export, *id, range, &mut extents).await {
                return task.error(to, checked.operation, e);
            }
            extents.finish(n + 1 == ids.len());
        }
        task.reply(Reply {
            head,
            payload: None,
        });
    });
}

/// Fills in what the context `id` has to say of the range.
async fn describe(
    export: &Export,
    id: u32,
    range: ByteRange,
    extents: &mut StatusExtents<'_>,
) -> Result<(), Errno> {
    let node = export.node();
    let rest = |extents: &StatusExtents<'_>, end| {
        let at = range.offset() + extents.covered();
        Some(ByteRange::between(at, end)).filter(|rest| !rest.is_empty())
    };
    let mut offered = export.options().contexts.iter();
    let Some(context) = offered.find(|context| context.id == id) else {
        let mut looks = 0;
        // Look past the end of the request: the last extent may, too.
        while let Some(rest) = rest(extents, node.size()) {
            let status = node.status(rest).await?;
            let hole = if status.data { 0 } else { STATE_HOLE };
            let zero = if status.zero { STATE_ZERO } else { 0 };
            if !extents.push(status.len, hole | zero) {
                break;
            }
            looks += 1;
            if looks % LOOKS_MAX == 0 {
                tokio::task::yield_now().await;
            }
        }
        return Ok(());
    };
    while let Some(rest) = rest(extents, range.end()) {
        let before = extents.covered();
        let room = extents.room().min(EXTENTS_AT_ONCE);
        let told = context.provider.extents(rest, room).await?;
        let more = extents.push_all(&told);
        // Who has nothing to say is not asked again: what is missing is status 0.
        if !more || extents.covered() == before {
            break;
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Carry out in a task and answer with success or an error.
fn spawn<F, Fut>(shared: &Rc<Shared>, to: ReplyTo, checked: Checked, work: F)
where
    F: FnOnce(Rc<Shared>) -> Fut + 'static,
    Fut: Future<Output = Result<(), Errno>>,
{
    let task = Task::begin(shared, checked.payload, checked.operation);
    tokio::task::spawn_local(async move {
        match work(task.0.clone()).await {
            Ok(()) => {
                let mut head = Vec::with_capacity(32);
                to.done(&mut head);
                task.reply(Reply {
                    head,
                    payload: None,
                });
            }
            Err(e) => task.error(to, checked.operation, e),
        }
    });
}

/// A request in flight: accounted for while it lives.
pub(super) struct Task(pub(super) Rc<Shared>, u64, Instant, Waited);

impl Task {
    pub(super) fn begin(shared: &Rc<Shared>, bytes: u64, operation: Operation) -> Self {
        shared.in_flight.set(shared.in_flight.get() + 1);
        shared.bytes.set(shared.bytes.get() + bytes);
        shared.user.export().stats().begin();
        let waited = match operation {
            Operation::Read { .. } => Waited::Read,
            Operation::Write { .. } | Operation::WriteZeroes { .. } => Waited::Write,
            Operation::Flush => Waited::Flush,
            Operation::Trim { .. } => Waited::Discard,
            _ => Waited::Other,
        };
        Self(shared.clone(), bytes, Instant::now(), waited)
    }

    pub(super) fn reply(&self, reply: Reply) {
        let bytes = &self.0.bytes;
        bytes.set(bytes.get() + reply.len());
        self.0.replies.borrow_mut().push(reply);
    }

    pub(super) fn error(&self, to: ReplyTo, operation: Operation, e: Errno) {
        count(&self.0.user.export().stats().errors, 1);
        let mut head = Vec::new();
        to.error(operation.wire_errno(e), &e.to_string(), &mut head);
        self.reply(Reply {
            head,
            payload: None,
        });
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let shared = &self.0;
        shared.in_flight.set(shared.in_flight.get() - 1);
        shared.bytes.set(shared.bytes.get() - self.1);
        shared.user.export().stats().end(self.3, self.2.elapsed());
        shared.ready.notify_one();
    }
}

pub(super) fn fail(
    shared: &Rc<Shared>,
    to: ReplyTo,
    operation: Operation,
    e: Errno,
    out: &mut Out,
) {
    count(&shared.user.export().stats().errors, 1);
    out.bytes(|bytes| to.error(operation.wire_errno(e), &e.to_string(), bytes));
}

pub(super) fn count(counter: &std::sync::atomic::AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
