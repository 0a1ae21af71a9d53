//! What a connection still has to send, in order.
//!
//! Owned by one connection on its iothread. Small replies are collected in one
//! vector and leave in one `sendmsg`; large payload is sent from its buffer, or
//! from the page cache by `sendfile`. With TLS all of it becomes records, which are full as long as
//! there is enough to send. Invariant: once a part began to go out,
//! all of it goes out or the connection ends.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use outport_block::{Buf, Node};
use rustix::io::Errno as SysErrno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::stream::{SEAL_MAX, Socket, StreamError};
use crate::tls::Session;

/// Parts of one `sendmsg`.
const IOVECS_MAX: usize = 64;

/// A vector that grew beyond this is not kept for reuse.
const SPARE_MAX: usize = 1 << 20;

/// What is at least so long goes out from where it was written: a long status reply.
const LONG: usize = 64 << 10;

enum Part {
    Bytes(Batch),
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

impl Part {
    fn into_batch(self) -> Option<Batch> {
        match self {
            Self::Bytes(batch) => Some(batch),
            _ => None,
        }
    }
}

/// Small replies, one after the other.
///
/// What lies beyond `end` was used before: reading a block into it needs no
/// clearing first.
#[derive(Default)]
struct Batch {
    buf: Vec<u8>,
    end: usize,
}

impl Batch {
    fn as_slice(&self) -> &[u8] {
        &self.buf[..self.end]
    }

    /// Room for `len` bytes more, with whatever is in it.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.end + len;
        if end > self.buf.len() {
            self.buf.resize(end, 0);
        }
        &mut self.buf[self.end..end]
    }

    fn append(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.end += bytes.len();
    }
}

static ZEROES: [u8; 65536] = [0; 65536];

/// The send queue.
#[derive(Default)]
pub(super) struct Out {
    parts: VecDeque<Part>,
    /// Bytes of the front part that went out (byte parts only).
    sent: usize,
    len: u64,
    spare: Option<Batch>,
    /// Where a reply is written before it is appended.
    head: Vec<u8>,
    /// Where a piece of a file is read that is to be encrypted.
    clear: Vec<u8>,
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

    /// Append what `write` writes.
    pub(super) fn bytes(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.head.clear();
        write(&mut self.head);
        let head = std::mem::take(&mut self.head);
        self.batch().append(&head);
        self.len += head.len() as u64;
        self.head = head;
    }

    /// Append what was written elsewhere; what is long is not copied.
    pub(super) fn written(&mut self, bytes: Vec<u8>) {
        if bytes.len() < LONG {
            return self.bytes(|head| head.extend_from_slice(&bytes));
        }
        self.len += bytes.len() as u64;
        self.parts.push_back(Part::Bytes(Batch {
            end: bytes.len(),
            buf: bytes,
        }));
    }

    /// Append a header and `len` bytes that `fill` puts there. When it cannot (anything but
    /// `Some(Ok)`), nothing is appended.
    pub(super) fn filled<E>(
        &mut self,
        header: impl FnOnce(&mut Vec<u8>),
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<Result<(), E>>,
    ) -> Option<Result<(), E>> {
        let before = self.len;
        self.bytes(header);
        let added = (self.len - before) as usize;
        let batch = self.batch();
        let result = fill(batch.room(len));
        if matches!(result, Some(Ok(()))) {
            batch.end += len;
            self.len += len as u64;
        } else {
            batch.end -= added;
            if batch.end == 0 {
                self.spare = self.parts.pop_back().and_then(Part::into_batch);
            }
            self.len = before;
        }
        result
    }

    /// The batch at the end of the queue.
    fn batch(&mut self) -> &mut Batch {
        if !matches!(self.parts.back(), Some(Part::Bytes(_))) {
            let fresh = self.spare.take().unwrap_or_default();
            self.parts.push_back(Part::Bytes(fresh));
        }
        match self.parts.back_mut() {
            Some(Part::Bytes(batch)) => batch,
            _ => unreachable!("it was pushed just now"),
        }
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
                Part::Bytes(batch) => batch.as_slice(),
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
                Part::Bytes(batch) => batch.end - self.sent,
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
                Part::File { offset, left, .. } => {
                    let took = (sent as u64).min(*left);
                    *offset += took;
                    *left -= took;
                    sent -= took as usize;
                    if *left > 0 {
                        return;
                    }
                    0
                }
            };
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            match self.parts.pop_front() {
                Some(Part::Bytes(mut batch)) if batch.buf.len() <= SPARE_MAX => {
                    batch.end = 0;
                    self.spare = Some(batch);
                }
                Some(Part::Payload(buf)) => crate::pool::give_back(buf),
                _ => {}
            }
        }
    }

    /// Send what the socket takes, encrypted.
    ///
    /// # Errors
    /// As [`Out::send`], or TLS has come to its end.
    pub(super) fn send_sealed(
        &mut self,
        socket: &OwnedFd,
        tls: &mut Session,
    ) -> Result<Sent, StreamError> {
        loop {
            while tls.wants_send() {
                match tls.send(&mut Socket(socket)) {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Blocked),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(super::socket::errno(e).into()),
                }
            }
            if self.parts.is_empty() {
                return Ok(Sent::All);
            }
            let sealed = self.seal(tls)?;
            self.advance(sealed);
        }
    }

    /// Encrypts the front of the queue; how much of it.
    fn seal(&mut self, tls: &mut Session) -> Result<usize, StreamError> {
        let mut clear = std::mem::take(&mut self.clear);
        let mut ready = self.read_ahead(&mut clear)?;
        let mut slices: [IoSlice<'_>; IOVECS_MAX] = std::array::from_fn(|_| IoSlice::new(&[]));
        let (mut count, mut room, mut skip) = (0, SEAL_MAX, self.sent);
        for part in self.parts.iter().take(IOVECS_MAX) {
            let (bytes, whole) = match part {
                Part::Bytes(batch) => (&batch.as_slice()[skip..], true),
                Part::Payload(buf) => (&buf.as_slice()[skip..], true),
                Part::Zeroes(len) => {
                    let now = (*len).min(ZEROES.len() as u64);
                    (&ZEROES[..now as usize], now == *len)
                }
                // Only the first file was read, and only if there is room for it.
                Part::File { .. } if ready == 0 => break,
                Part::File { left, .. } => {
                    let read = std::mem::take(&mut ready);
                    (&clear[..read], read as u64 == *left)
                }
            };
            skip = 0;
            let now = bytes.len().min(room);
            slices[count] = IoSlice::new(&bytes[..now]);
            count += 1;
            room -= now;
            if room == 0 || !whole {
                break;
            }
        }
        let sealed = tls.write(&slices[..count])?;
        self.clear = clear;
        Ok(sealed)
    }

    /// Reads the first file of the queue if it may be among what is encrypted next; how much.
    fn read_ahead(&self, into: &mut Vec<u8>) -> Result<usize, StreamError> {
        let mut room = SEAL_MAX as u64 + self.sent as u64;
        let mut parts = self.parts.iter().take(IOVECS_MAX);
        let (node, offset, wanted) = loop {
            let len = match parts.next() {
                Some(Part::File { node, offset, left }) => break (node, *offset, room.min(*left)),
                Some(Part::Bytes(batch)) => batch.end as u64,
                Some(Part::Payload(buf)) => buf.len() as u64,
                Some(Part::Zeroes(len)) => *len,
                None => return Ok(0),
            };
            if len >= room {
                return Ok(0);
            }
            room -= len;
        };
        let file = node.host_file().ok_or(SysErrno::IO)?;
        let wanted = wanted.min(SEAL_MAX as u64) as usize;
        into.resize(SEAL_MAX, 0);
        let read = loop {
            match rustix::io::pread(file.as_fd(), &mut into[..wanted], offset) {
                Err(SysErrno::INTR) => {}
                read => break read?,
            }
        };
        // Beyond its end there are zeroes.
        if read == 0 {
            into[..wanted].fill(0);
            return Ok(wanted);
        }
        Ok(read)
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
