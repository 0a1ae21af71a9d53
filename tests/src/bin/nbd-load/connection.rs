//! One connection's state: what is in flight, what is half received, what is half sent.
//!
//! ```text
//! free slots --issue()--> outbox --flush()--> socket --receive()--> slots free again
//! ```
//! Requests leave in one send for all slots that came free, replies come in one receive for as
//! many as there are: the client spends about two system calls per turn, however deep the queue.

use std::io::{self, ErrorKind, IoSlice, Read, Write};

use outport_tests::Rng;
use outport_tests::load::Tally;
use outport_tests::nbd::wire::{self, cmd};
use outport_tests::nbd::{Client, Request, Socket};

use crate::args::{Args, Order};

/// Messages offered to one writev; the kernel takes 1024 parts.
const MESSAGES_PER_WRITE_MAX: usize = 256;

/// Which blocks a connection visits.
pub(crate) struct Blocks {
    pub(crate) offset: u64,
    pub(crate) count: u64,
    pub(crate) next: u64,
    pub(crate) shuffled: Vec<u32>,
}

pub(crate) struct Connection {
    socket: Socket,
    structured: bool,
    order: Order,
    stride: u64,
    request: Request,
    blocks: Blocks,
    rng: Rng,
    started_ns: Vec<u64>,
    free: Vec<u32>,
    /// Headers not yet sent, whole; and how many bytes of the first message have left.
    outbox: Vec<[u8; 28]>,
    sent: usize,
    payload: Vec<u8>,
    inbox: Vec<u8>,
    held: usize,
    /// Bytes of content still to come before the next header, and the slot that they end.
    skip: usize,
    ends: Option<u32>,
}

impl Connection {
    pub(crate) fn new(client: Client, args: &Args, blocks: Blocks, seed: u64) -> Self {
        let structured = client.structured();
        let mut rng = Rng::new(seed);
        let payload_len = if args.op == cmd::WRITE {
            args.block_size as usize
        } else {
            0
        };
        let len = if args.op == cmd::FLUSH {
            0
        } else {
            args.block_size
        };
        Self {
            socket: client.into_socket(),
            structured,
            order: args.order,
            stride: args.stride,
            request: Request {
                kind: args.op,
                len,
                ..Request::default()
            },
            blocks,
            payload: rng.bytes(payload_len),
            rng,
            started_ns: vec![0; args.depth],
            free: (0..args.depth as u32).collect(),
            outbox: Vec::with_capacity(args.depth),
            sent: 0,
            inbox: vec![0; args.recv_buffer],
            held: 0,
            skip: 0,
            ends: None,
        }
    }

    pub(crate) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Nothing is in flight.
    pub(crate) fn idle(&self) -> bool {
        self.free.len() == self.started_ns.len()
    }

    /// Something waits to be sent.
    pub(crate) fn has_output(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Turns free slots into requests.
    pub(crate) fn issue(&mut self, now_ns: u64) {
        while let Some(slot) = self.free.pop() {
            let Some(block) = self.next_block() else {
                self.free.push(slot);
                return;
            };
            self.request.cookie = u64::from(slot);
            self.request.offset = if self.request.kind == cmd::FLUSH {
                0
            } else {
                self.blocks.offset + block * self.stride
            };
            self.started_ns[slot as usize] = now_ns;
            self.outbox.push(self.request.bytes());
        }
    }

    fn next_block(&mut self) -> Option<u64> {
        let at = self.blocks.next;
        match self.order {
            Order::Random => Some(self.rng.below(self.blocks.count)),
            Order::Sequential => {
                self.blocks.next = (at + 1) % self.blocks.count;
                Some(at)
            }
            Order::Once => {
                let block = *self.blocks.shuffled.get(at as usize)?;
                self.blocks.next += 1;
                Some(u64::from(block))
            }
        }
    }

    /// Sends what it can; `WouldBlock` is no error.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let message = 28 + self.payload.len();
        while !self.outbox.is_empty() {
            let wrote = if self.payload.is_empty() {
                self.socket.write(&self.outbox.as_flattened()[self.sent..])
            } else {
                let mut parts = Vec::with_capacity(2 * MESSAGES_PER_WRITE_MAX);
                for header in self.outbox.iter().take(MESSAGES_PER_WRITE_MAX) {
                    parts.extend([IoSlice::new(header), IoSlice::new(&self.payload)]);
                }
                let mut parts = &mut parts[..];
                IoSlice::advance_slices(&mut parts, self.sent);
                write_vectored(&mut self.socket, parts)
            };
            match wrote {
                Ok(bytes) => {
                    self.sent += bytes;
                    self.outbox.drain(..self.sent / message);
                    self.sent %= message;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives once and takes in what came; false when nothing was there.
    pub(crate) fn receive(
        &mut self,
        tally: &mut Tally,
        clock: impl Fn() -> u64,
    ) -> io::Result<bool> {
        let got = match self.socket.read(&mut self.inbox[self.held..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        let now_ns = clock();
        let end = self.held + got;
        let mut at = 0;
        loop {
            let passed = self.skip.min(end - at);
            at += passed;
            self.skip -= passed;
            if self.skip > 0 {
                break;
            }
            if let Some(slot) = self.ends.take() {
                tally.ops += 1;
                tally
                    .latency
                    .record(now_ns.saturating_sub(self.started_ns[slot as usize]));
                self.free.push(slot);
            }
            match self.header(at, end, tally)? {
                0 => break,
                bytes => at += bytes,
            }
        }
        self.inbox.copy_within(at..end, 0);
        self.held = end - at;
        Ok(true)
    }

    /// Takes in one reply header; its length, or 0 when it is not all there.
    fn header(&mut self, at: usize, end: usize, tally: &mut Tally) -> io::Result<usize> {
        let have = &self.inbox[at..end];
        let be32 =
            |at: usize| u32::from_be_bytes([have[at], have[at + 1], have[at + 2], have[at + 3]]);
        if have.len() < 16 {
            return Ok(0);
        }
        match be32(0) {
            wire::SIMPLE_REPLY_MAGIC => {
                let failed = be32(4) != 0;
                tally.errors += u64::from(failed);
                let content = self.request.kind == cmd::READ && !failed;
                self.skip = if content {
                    self.request.len as usize
                } else {
                    0
                };
                self.ends = Some(be32(12));
                Ok(16)
            }
            wire::CHUNK_MAGIC if self.structured => {
                if have.len() < 20 {
                    return Ok(0);
                }
                let (flags, kind) = (be32(4) >> 16, be32(4) & 0xffff);
                tally.errors += u64::from(kind >> 15);
                self.skip = be32(16) as usize;
                self.ends = (flags & 1 != 0).then(|| be32(12));
                Ok(20)
            }
            other => Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("reply magic {other:x}"),
            )),
        }
    }
}

fn write_vectored(socket: &mut Socket, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    match socket {
        Socket::Unix(socket) => socket.write_vectored(parts),
        Socket::Tcp(socket) => socket.write_vectored(parts),
        Socket::Tls(socket) => socket.write_vectored(parts),
    }
}
