//! What a connection still has to send, in order.
//!
//! Owned by one connection on its iothread. Small replies are collected in one
//! vector and leave in one `sendmsg`; large payload is sent from its buffer, or
//! from the page cache by `sendfile`. Invariant: once a part began to go out,
//! all of it goes out or the connection ends.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use outport_block::{Buf, Node};
use rustix::io::Errno as SysErrno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

/// Parts of one `sendmsg`.
const IOVECS_MAX: usize = 64;

/// A vector that grew beyond this is not kept for reuse.
const SPARE_MAX: usize = 1 << 20;

enum Part {
    Bytes(Vec<u8>),
    Payload(Buf),
    /// A range of a host file, warm when it was queued.
    File {
        node: Arc<Node>,
        offset: u64,
        left: u64,
    },
    /// Zero bytes without a buffer of their own.
    Zeroes(u64),
}

static ZEROES: [u8; 65536] = [0; 65536];

/// The send queue.
#[derive(Default)]
pub(super) struct Out {
    parts: VecDeque<Part>,
    /// Bytes of the front part that went out (byte parts only).
    sent: usize,
    len: u64,
    spare: Option<Vec<u8>>,
}

/// What an attempt to send came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing is left.
    All,
    /// The socket is full.
    Blocked,
}

impl Out {
    /// Bytes that wait.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Append through `write`; returns what it returned.
    pub(super) fn bytes<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        if !matches!(self.parts.back(), Some(Part::Bytes(_))) {
            let fresh = self
                .spare
                .take()
                .unwrap_or_else(|| Vec::with_capacity(64 << 10));
            self.parts.push_back(Part::Bytes(fresh));
        }
        let Some(Part::Bytes(bytes)) = self.parts.back_mut() else {
            return write(&mut Vec::new());
        };
        let before = bytes.len();
        let result = write(bytes);
        // A writer that failed halfway takes back what it appended.
        self.len = self.len + bytes.len() as u64 - before as u64;
        result
    }

    /// Append a buffer.
    pub(super) fn payload(&mut self, buf: Buf) {
        self.len += buf.len() as u64;
        self.parts.push_back(Part::Payload(buf));
    }

    /// Append a file range.
    pub(super) fn file(&mut self, node: Arc<Node>, offset: u64, len: u64) {
        self.len += len;
        self.parts.push_back(Part::File {
            node,
            offset,
            left: len,
        });
    }

    /// Append zero bytes.
    pub(super) fn zeroes(&mut self, len: u64) {
        self.len += len;
        self.parts.push_back(Part::Zeroes(len));
    }

    /// Send what the socket takes.
    ///
    /// # Errors
    /// The client is gone, or a file failed after its header went out: the
    /// connection must end.
    pub(super) fn send(&mut self, socket: &OwnedFd) -> Result<Sent, SysErrno> {
        while !self.parts.is_empty() {
            let result = if matches!(self.parts.front(), Some(Part::File { .. })) {
                self.send_file(socket)
            } else {
                self.send_bytes(socket)
            };
            match result {
                Ok(()) | Err(SysErrno::INTR) => {}
                Err(SysErrno::AGAIN) => return Ok(Sent::Blocked),
                Err(e) => return Err(e),
            }
        }
        Ok(Sent::All)
    }

    fn send_bytes(&mut self, socket: &OwnedFd) -> Result<(), SysErrno> {
        let mut slices: [IoSlice<'_>; IOVECS_MAX] = std::array::from_fn(|_| IoSlice::new(&[]));
        let mut count = 0;
        let mut skip = self.sent;
        let mut more = false;
        for part in &self.parts {
            let bytes: &[u8] = match part {
                Part::Bytes(bytes) => bytes,
                Part::Payload(buf) => buf.as_slice(),
                Part::Zeroes(len) => &ZEROES[..(*len as usize).min(ZEROES.len())],
                Part::File { .. } => {
                    more = true;
                    break;
                }
            };
            slices[count] = IoSlice::new(&bytes[skip.min(bytes.len())..]);
            skip = 0;
            count += 1;
            if count == IOVECS_MAX || matches!(part, Part::Zeroes(len) if *len > 65536) {
                break;
            }
        }
        let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if more {
            flags |= SendFlags::MORE;
        }
        let mut control: [MaybeUninit<u8>; 0] = [];
        let mut control = SendAncillaryBuffer::new(&mut control);
        let sent = rustix::net::sendmsg(socket, &slices[..count], &mut control, flags)?;
        self.advance(sent);
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        self.len -= sent as u64;
        while let Some(part) = self.parts.front_mut() {
            let left = match part {
                Part::Bytes(bytes) => bytes.len() - self.sent,
                Part::Payload(buf) => buf.len() - self.sent,
                Part::Zeroes(len) => {
                    let took = (sent as u64).min(*len);
                    *len -= took;
                    sent -= took as usize;
                    if *len > 0 {
                        return;
                    }
                    0
                }
                Part::File { .. } => return,
            };
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            match self.parts.pop_front() {
                Some(Part::Bytes(mut bytes)) if bytes.capacity() <= SPARE_MAX => {
                    bytes.clear();
                    self.spare = Some(bytes);
                }
                Some(Part::Payload(buf)) => super::pool::give_back(buf),
                _ => {}
            }
        }
    }

    fn send_file(&mut self, socket: &OwnedFd) -> Result<(), SysErrno> {
        let Some(Part::File { node, offset, left }) = self.parts.front_mut() else {
            return Ok(());
        };
        let Some(file) = node.host_file() else {
            return Err(SysErrno::IO);
        };
        let mut at = *offset;
        let count = (*left).min(1 << 30) as usize;
        let n = rustix::fs::sendfile(socket, file.as_fd(), Some(&mut at), count)? as u64;
        let missing = *left;
        *offset += n;
        *left -= n;
        self.len -= n;
        if *left == 0 {
            self.parts.pop_front();
        } else if n == 0 {
            // The file ends here (or was cut): beyond its end there are zeroes.
            self.parts.pop_front();
            self.parts.push_front(Part::Zeroes(missing));
        }
        Ok(())
    }
}
