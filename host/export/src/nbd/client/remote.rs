//! The server's export as the block layer sees it.
//!
//! Turns what a node wants into the commands that this server understands. Used from any thread;
//! it only queues. What the server does not have is done without, if that is allowed: hints are
//! dropped, FUA becomes a flush.

use std::sync::Arc;

use outport_block::engine::transfer::{Landing, Payload};
use outport_block::node::{NodeFuture, Status};
use outport_block::remote::{Remote, RemoteLimits};
use outport_block::{ByteRange, Errno, IoThread};
use tokio::sync::oneshot;

use super::super::reply::ReplyMode;
use super::super::wire::{Command, CommandFlags, TransmissionFlags};
use super::handshake::Agreed;
use super::queue::{Body, CLOSE_MAX, Queue, Submission};

/// Bytes of one request without payload where lengths have 32 bits: blocks have up to 64 KiB.
const EFFECT_MAX_COMPACT: u64 = 0xffff_0000;

/// The same where lengths have 64 bits.
const EFFECT_MAX_EXTENDED: u64 = 1 << 60;

/// `NBD_STATE_HOLE`.
const STATE_HOLE: u64 = 1;
/// `NBD_STATE_ZERO`.
const STATE_ZERO: u64 = 2;

#[derive(Debug)]
pub(super) struct NbdRemote {
    queue: Arc<Queue>,
    agreed: Agreed,
    name: String,
    /// Its thread lives as long as the link.
    _iothread: IoThread,
}

impl NbdRemote {
    pub(super) fn new(queue: Arc<Queue>, agreed: Agreed, name: String, iothread: IoThread) -> Self {
        Self {
            queue,
            agreed,
            name,
            _iothread: iothread,
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.has(TransmissionFlags::READ_ONLY)
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.agreed.flags.contains(flag)
    }

    /// A request without payload.
    fn plain(&self, command: Command, flags: CommandFlags, range: ByteRange) -> NodeFuture<'_, ()> {
        let (done, end) = oneshot::channel();
        self.submit(command, flags, range, Body::Plain(done));
        Box::pin(async move { end.await.unwrap_or(Err(Errno::Io)) })
    }

    fn submit(&self, command: Command, flags: CommandFlags, range: ByteRange, body: Body) {
        self.queue.push(Submission {
            command,
            flags,
            offset: range.offset(),
            length: range.len(),
            body,
        });
    }
}

impl Remote for NbdRemote {
    fn len_bytes(&self) -> u64 {
        self.agreed.size
    }

    fn limits(&self) -> RemoteLimits {
        RemoteLimits {
            block_min: self.agreed.block_min,
            preferred: self.agreed.preferred,
            transfer_max: self.agreed.payload_max,
            effect_max: match self.agreed.mode {
                ReplyMode::Extended => EFFECT_MAX_EXTENDED,
                ReplyMode::Simple | ReplyMode::Structured => EFFECT_MAX_COMPACT,
            },
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn read(&self, offset: u64, into: Landing) {
        let range = ByteRange::between(offset, offset.saturating_add(into.len() as u64));
        self.submit(
            Command::READ,
            CommandFlags::empty(),
            range,
            Body::Read(into),
        );
    }

    fn write(&self, offset: u64, from: Payload, fua: bool) -> NodeFuture<'_, ()> {
        let range = ByteRange::between(offset, offset.saturating_add(from.len() as u64));
        let (done, end) = oneshot::channel();
        let mut flags = CommandFlags::empty();
        flags.set(
            CommandFlags::FUA,
            fua && self.has(TransmissionFlags::SEND_FUA),
        );
        let flush = fua && !flags.contains(CommandFlags::FUA);
        self.submit(Command::WRITE, flags, range, Body::Write(from, done));
        Box::pin(async move {
            end.await.unwrap_or(Err(Errno::Io))?;
            if flush { self.flush().await } else { Ok(()) }
        })
    }

    fn flush(&self) -> NodeFuture<'_, ()> {
        if !self.has(TransmissionFlags::SEND_FLUSH) {
            // The server says that it has nothing to flush.
            return Box::pin(std::future::ready(Ok(())));
        }
        let nothing = ByteRange::between(0, 0);
        self.plain(Command::FLUSH, CommandFlags::empty(), nothing)
    }

    fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        if !self.has(TransmissionFlags::SEND_TRIM) {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.plain(Command::TRIM, CommandFlags::empty(), range)
    }

    fn zero(&self, range: ByteRange, may_unmap: bool, fast: bool) -> NodeFuture<'_, ()> {
        let knows = self.has(TransmissionFlags::SEND_WRITE_ZEROES);
        if !knows || fast && !self.has(TransmissionFlags::SEND_FAST_ZERO) {
            return Box::pin(std::future::ready(Err(Errno::NotSup)));
        }
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::NO_HOLE, !may_unmap);
        flags.set(CommandFlags::FAST_ZERO, fast);
        self.plain(Command::WRITE_ZEROES, flags, range)
    }

    fn prefetch(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        if !self.has(TransmissionFlags::SEND_CACHE) {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.plain(Command::CACHE, CommandFlags::empty(), range)
    }

    fn status(&self, range: ByteRange) -> NodeFuture<'_, Status> {
        if self.agreed.allocation.is_none() {
            // Not known: data is always true.
            let status = Status {
                len: range.len(),
                data: true,
                zero: false,
                depth: 1,
            };
            return Box::pin(std::future::ready(Ok(status)));
        }
        let (done, end) = oneshot::channel();
        let body = Body::Status(done);
        self.submit(Command::BLOCK_STATUS, CommandFlags::REQ_ONE, range, body);
        Box::pin(async move {
            let extent = end.await.unwrap_or(Err(Errno::Io))?.ok_or(Errno::Io)?;
            Ok(Status {
                len: extent.length.min(range.len()),
                data: extent.flags & STATE_HOLE == 0,
                zero: extent.flags & STATE_ZERO != 0,
                depth: 1,
            })
        })
    }

    fn hurry(&self) {
        self.queue.hurry();
    }

    fn close(&self) -> NodeFuture<'_, ()> {
        Box::pin(async move {
            let ended = self.queue.ended.notified();
            self.queue.close();
            // A server that does not read must not hold up the daemon.
            let _ = tokio::time::timeout(CLOSE_MAX * 2, ended).await;
            Ok(())
        })
    }
}

impl Drop for NbdRemote {
    fn drop(&mut self) {
        self.queue.close();
    }
}
