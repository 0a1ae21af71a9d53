//! The socket of a front-end.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::{Guest, Split};
use crate::wait::DEADLINE;

/// Request numbers of the protocol's document.
#[allow(missing_docs, reason = "the names are the document's")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Feature bits of device and transport.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod features {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const PACKED: u64 = 1 << 34;
}

/// Feature bits of the protocol.
#[allow(missing_docs, reason = "the names are the document's")]
pub mod protocol {
    pub const MQ: u64 = 1;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT: u64 = 1 << 12;
    pub const MEM_SLOTS: u64 = 1 << 15;
}

/// What was received.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Version, reply, need-reply.
    pub flags: u32,
    /// The rest.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// How a back-end turned a message down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An answer that is not zero.
    Answer(u64),
    /// The end of the connection.
    End,
}

/// A front-end.
#[derive(Debug)]
pub struct FrontEnd {
    socket: UnixStream,
}

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

impl FrontEnd {
    /// Connects; says nothing yet.
    ///
    /// # Errors
    /// The system's.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.set_write_timeout(Some(DEADLINE))?;
        Ok(Self { socket })
    }

    /// Connects and negotiates these features with every feature of the protocol that this
    /// harness knows.
    #[track_caller]
    pub fn negotiated(path: &Path, features: u64) -> Self {
        let mut front_end = Self::connect(path).expect("the export listens");
        front_end.negotiate(features);
        front_end
    }

    /// Negotiates.
    #[track_caller]
    pub fn negotiate(&mut self, features: u64) {
        let all = protocol::MQ
            | protocol::LOG_SHMFD
            | protocol::REPLY_ACK
            | protocol::BACKEND_REQ
            | protocol::CONFIG
            | protocol::INFLIGHT
            | protocol::MEM_SLOTS;
        assert_eq!(self.get(request::GET_PROTOCOL_FEATURES) & all, all);
        self.send(
            request::SET_PROTOCOL_FEATURES,
            VERSION,
            &all.to_ne_bytes(),
            &[],
        )
        .expect("the back-end reads");
        self.ok(request::SET_OWNER, &[], &[]);
        let wanted = features | features::PROTOCOL | features::VERSION_1;
        assert_eq!(self.get(request::GET_FEATURES) & wanted, wanted, "features");
        self.ok(request::SET_FEATURES, &wanted.to_ne_bytes(), &[]);
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends one message.
    ///
    /// # Errors
    /// The system's.
    pub fn send(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let size = u32::try_from(payload.len()).expect("payloads are short");
        let mut bytes = Vec::new();
        for word in [request, flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes, whatever they are.
    ///
    /// # Errors
    /// The system's.
    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let bytes = [IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Receives one message.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` at the end.
    pub fn receive(&mut self) -> io::Result<Message> {
        let mut fds = Vec::new();
        let mut header = [0; 12];
        self.fill(&mut header, &mut fds)?;
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| header[at + i]));
        let mut payload = vec![0; word(8) as usize];
        self.fill(&mut payload, &mut fds)?;
        Ok(Message {
            request: word(0),
            flags: word(4),
            payload,
            fds,
        })
    }

    fn fill(&mut self, mut buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        while !buf.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(buf)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = rustix::net::recvmsg(&self.socket, &mut into, &mut control, flags)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if got.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buf = &mut buf[got.bytes..];
        }
        Ok(())
    }

    /// A request that is answered with a number.
    #[track_caller]
    pub fn get(&mut self, request: u32) -> u64 {
        let reply = self.call(request, &[], &[]).expect("an answer");
        u64::from_ne_bytes(reply.payload.try_into().expect("a number"))
    }

    /// A request that has an answer of its own.
    ///
    /// # Errors
    /// The connection ended.
    pub fn call(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<Message> {
        self.send(request, VERSION, payload, fds)?;
        let reply = self.receive()?;
        assert_eq!((reply.request, reply.flags), (request, VERSION | 4));
        Ok(reply)
    }

    /// A request that only changes something.
    ///
    /// # Errors
    /// It was refused.
    pub fn set(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Refusal> {
        let sent = self.send(request, VERSION | NEED_REPLY, payload, fds);
        let reply = sent.and_then(|()| self.receive());
        let Ok(reply) = reply else {
            return Err(Refusal::End);
        };
        let number: [u8; 8] = reply.payload.try_into().expect("an answer is a number");
        match u64::from_ne_bytes(number) {
            0 => Ok(()),
            other => Err(Refusal::Answer(other)),
        }
    }

    /// The same, which must not be refused.
    #[track_caller]
    pub fn ok(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.set(request, payload, fds), Ok(()), "request {request}");
    }

    /// Shares all of a guest's memory.
    #[track_caller]
    pub fn add_memory(&mut self, guest: &Guest) {
        self.ok(request::ADD_MEM_REG, &guest.region(), &[guest.fd()]);
    }

    /// Sets a queue up, all but its kick, which starts it.
    #[track_caller]
    pub fn describe(&mut self, queue: &Split, base: u32) {
        let index = queue.index;
        self.ok(request::SET_VRING_NUM, &pair(index, queue.size.into()), &[]);
        self.ok(request::SET_VRING_BASE, &pair(index, base), &[]);
        self.ok(request::SET_VRING_ADDR, &queue.addresses(), &[]);
        let number = u64::from(index).to_ne_bytes();
        self.ok(request::SET_VRING_CALL, &number, &[queue.call.as_fd()]);
        self.ok(request::SET_VRING_ERR, &number, &[queue.err.as_fd()]);
    }

    /// Sets a queue up and starts it.
    #[track_caller]
    pub fn start(&mut self, queue: &Split, base: u32) {
        self.describe(queue, base);
        let number = u64::from(queue.index).to_ne_bytes();
        self.ok(request::SET_VRING_KICK, &number, &[queue.kick.as_fd()]);
        self.ok(request::SET_VRING_ENABLE, &pair(queue.index, 1), &[]);
    }

    /// Stops a queue; where it would go on.
    #[track_caller]
    pub fn stop(&mut self, index: u32) -> u32 {
        let reply = self.call(request::GET_VRING_BASE, &pair(index, 0), &[]);
        let payload = reply.expect("a base").payload;
        u32::from_ne_bytes(payload[4..].try_into().expect("two numbers"))
    }

    /// Part of the configuration space; empty if that was an error.
    #[track_caller]
    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let mut payload = Vec::new();
        for word in [offset, size, 0] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        payload.resize(12 + size as usize, 0);
        let reply = self.call(request::GET_CONFIG, &payload, &[]);
        let payload = reply.expect("an answer").payload;
        payload.get(12..).unwrap_or_default().to_vec()
    }

    /// Bytes of the disk, as the configuration space says.
    #[track_caller]
    pub fn capacity(&mut self) -> u64 {
        let sectors = self.config(0, 8).try_into().expect("eight bytes");
        u64::from_le_bytes(sectors) * 512
    }

    /// Turns the guest's cache on or off.
    #[track_caller]
    pub fn set_writeback(&mut self, on: bool) {
        let mut payload = Vec::new();
        for word in [32_u32, 1, 0] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        payload.push(u8::from(on));
        self.ok(request::SET_CONFIG, &payload, &[]);
    }
}

/// Two numbers.
pub(super) fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    bytes
}
