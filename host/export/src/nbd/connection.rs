//! One client in its transmission phase.
//!
//! A task on an iothread owns the socket. Each turn takes what the socket
//! holds, answers every complete request that can be answered at once, and
//! sends all replies in one batch; requests that must wait become tasks of
//! their own and queue their reply when done.
//!
//! ```text
//!   recv -> parse -> check -> inline answer ----> out -> sendmsg / sendfile / TLS records
//!                        \-> task (slow) -> replies -/
//! ```
//!
//! Invariants: at most [`IN_FLIGHT_MAX`] requests and [`BYTES_MAX`] bytes wait
//! (then nothing more is read); the export stays in use until the last task of
//! the connection ended.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno as SysErrno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::out::{Out, Sent};
use super::serve::{self, Reply};
use super::session::{Checked, Operation, Reject, Session};
use super::stream::{Received, Stream, StreamError};
use super::wire::Request;
use crate::export::ExportUser;
use crate::lease::{Lease, Pace};
use crate::pool;
use crate::tls;
use outport_block::Buf;
use outport_block::authz::Peer;

/// Requests of one client that wait for something: deeper queues than any
/// client has, and each costs a task of about a kilobyte.
pub(super) const IN_FLIGHT_MAX: usize = 4096;

/// Bytes of payload in flight and of replies not sent, per client: two of the
/// largest default requests.
pub(super) const BYTES_MAX: u64 = 64 << 20;

/// The receive buffer: one read takes a deep queue of small writes.
const RECEIVE: usize = 256 << 10;

/// Writes up to this size are taken from the receive buffer.
const SMALL_PAYLOAD: u64 = 64 << 10;

/// Replies that are collected before they are sent: eleven reads of 4 KiB.
///
/// A third of a queue of 32, so that a client on another processor works on one part while this
/// side works on the next: 1.5 times the rate of whole queues in turns. On one processor it costs
/// a twentieth. Half of it costs there a fifth, and twice of it gains nothing here.
const BATCH_BYTES: u64 = 44 << 10;

/// Turns without waiting before other tasks of the iothread get theirs.
const TURNS_MAX: u32 = 8;

/// What the control plane hands over.
pub(super) struct Handover {
    pub(super) fd: OwnedFd,
    /// Its encryption, after the handshake.
    pub(super) tls: Option<Box<tls::Session>>,
    pub(super) session: Box<Session>,
    pub(super) rest: Vec<u8>,
    pub(super) user: ExportUser,
    pub(super) peer: Peer,
    /// What it was granted; `None`: nobody was asked.
    pub(super) lease: Option<Arc<Lease>>,
    pub(super) slot: OwnedSemaphorePermit,
}

/// A socket, non-blocking, known to this thread's reactor.
pub(super) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    outport_block::engine::register(fd)
}

/// What the connection's tasks share with it.
pub(super) struct Shared {
    pub(super) user: ExportUser,
    pub(super) session: Session,
    pub(super) replies: RefCell<Vec<Reply>>,
    pub(super) ready: Notify,
    pub(super) in_flight: Cell<usize>,
    /// Payload that waits, replies included that are not in the send queue yet.
    pub(super) bytes: Cell<u64>,
    /// Turns of block status requests.
    pub(super) status_turns: Semaphore,
}

/// Why it ended, for the log.
#[derive(Debug)]
enum End {
    /// DISC, or the client closed its side.
    Client,
    /// The export was shut down.
    Export,
    /// It may no longer use the export.
    Grant,
    /// The client broke the protocol.
    Protocol(String),
    /// The socket, or a file in the middle of a reply, failed.
    System(SysErrno),
    /// TLS failed.
    Tls(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client => f.write_str("the client left"),
            Self::Export => f.write_str("the export was shut down"),
            Self::Grant => f.write_str("its grant has ended"),
            Self::Protocol(what) => f.write_str(what),
            Self::System(e) => write!(f, "{e}"),
            Self::Tls(e) => write!(f, "TLS: {e}"),
        }
    }
}

impl From<SysErrno> for End {
    fn from(e: SysErrno) -> Self {
        match e {
            SysErrno::PIPE | SysErrno::CONNRESET => Self::Client,
            other => Self::System(other),
        }
    }
}

impl From<StreamError> for End {
    fn from(e: StreamError) -> Self {
        match e {
            StreamError::System(e) => e.into(),
            StreamError::Tls(e) => Self::Tls(e.to_string()),
        }
    }
}

/// The life of a connection, from hand-over to its end.
pub(super) async fn run(handover: Handover) {
    let Handover {
        fd,
        tls,
        session,
        rest,
        user,
        peer,
        lease,
        slot,
    } = handover;
    let export = user.export().clone();
    let Ok(fd) = register(fd) else { return };
    let shared = Rc::new(Shared {
        user,
        session: *session,
        replies: RefCell::default(),
        ready: Notify::new(),
        in_flight: Cell::new(0),
        bytes: Cell::new(0),
        status_turns: Semaphore::new(serve::STATUS_AT_ONCE),
    });
    let mut connection = Connection {
        stream: Stream::resume(fd, tls),
        shared,
        input: Input::new(rest),
        out: Out::default(),
        large: None,
        turns: 0,
        closing: false,
        lease: lease.clone(),
        pace: Pace::new(Instant::now()),
        paused_until: None,
    };
    let ended = async {
        match &lease {
            Some(lease) => lease.ended().await,
            None => std::future::pending().await,
        }
    };
    let end = tokio::select! {
        biased;
        end = connection.serve() => end,
        () = export.cut() => End::Export,
        () = ended => End::Grant,
    };
    connection.stream.say_goodbye();
    drop(connection);
    pool::clear();
    drop(slot);
    match end {
        End::Client => tracing::debug!(export = export.name(), %peer, "connection closed"),
        other => {
            let reason = other.to_string();
            tracing::info!(export = export.name(), %peer, reason, "connection closed");
        }
    }
}

/// Bytes received and not yet used.
struct Input {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new(rest: Vec<u8>) -> Self {
        let end = rest.len();
        let mut buf = rest;
        buf.resize(RECEIVE.max(end), 0);
        Self { buf, start: 0, end }
    }

    fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Room to receive into; moves what is left to the front if need be.
    fn room(&mut self) -> &mut [u8] {
        if self.buf.len() - self.end < self.buf.len() / 4 && self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buf[self.end..]
    }
}

/// A payload that does not go through the receive buffer.
struct Large {
    request: Request,
    checked: Checked,
    buf: Buf,
    have: usize,
}

/// What stands between the input and the next request.
enum Pending {
    /// Receive a payload into its own buffer.
    Payload(Large),
    /// Throw bytes away, then the answer is already queued.
    Swallow(u64),
}

struct Connection {
    stream: Stream,
    shared: Rc<Shared>,
    input: Input,
    out: Out,
    large: Option<Pending>,
    turns: u32,
    /// DISC, or the end of the stream: finish what is in flight, then close.
    closing: bool,
    lease: Option<Arc<Lease>>,
    pace: Pace,
    /// It took what it was granted: no request begins before.
    paused_until: Option<Instant>,
}

impl Connection {
    async fn serve(&mut self) -> End {
        loop {
            match self.turn() {
                Ok(true) => {
                    self.turns += 1;
                    if self.turns >= TURNS_MAX {
                        self.turns = 0;
                        tokio::task::yield_now().await;
                    }
                }
                Ok(false) => {
                    self.turns = 0;
                    if let Err(end) = self.wait().await {
                        return end;
                    }
                }
                Err(end) => return end,
            }
        }
    }

    /// One turn; `false`: nothing more can be done without waiting.
    fn turn(&mut self) -> Result<bool, End> {
        self.take_replies();
        let mut moved = self.process()?;
        if self.has_output() {
            let before = self.out.len();
            self.send()?;
            moved |= self.out.len() != before;
        }
        if self.closing {
            let idle = self.shared.in_flight.get() == 0 && !self.has_output();
            return if idle && self.shared.replies.borrow().is_empty() {
                Err(End::Client)
            } else {
                Ok(false)
            };
        }
        if self.may_receive() {
            moved |= self.receive()?;
        }
        Ok(moved)
    }

    /// Is there room for more requests?
    fn may_receive(&self) -> bool {
        !self.closing
            && self.paused_until.is_none()
            && self.shared.in_flight.get() < IN_FLIGHT_MAX
            && self.shared.bytes.get() + self.out.len() < BYTES_MAX
    }

    /// Wait until the socket, a slow request or room lets us go on.
    async fn wait(&mut self) -> Result<(), End> {
        let paused_until = self.paused_until;
        let receive = self.may_receive();
        let send = self.has_output();
        let fd = self.stream.fd();
        let readable = async {
            if receive {
                fd.readable().await.map(|_| ())
            } else {
                std::future::pending().await
            }
        };
        let writable = async {
            if send {
                fd.writable().await.map(|_| ())
            } else {
                std::future::pending().await
            }
        };
        let resumed = async {
            match paused_until {
                Some(then) => tokio::time::sleep_until(then.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.shared.ready.notified() => Ok(()),
            () = resumed => {
                self.paused_until = None;
                Ok(())
            }
            result = writable => result.map_err(|_| End::Client),
            result = readable => result.map_err(|_| End::Client),
        }
    }

    fn take_replies(&mut self) {
        let mut replies = self.shared.replies.borrow_mut();
        for reply in replies.drain(..) {
            reply.queue(&self.shared, &mut self.out);
        }
    }

    /// Receive once. `Ok(true)`: something came.
    fn receive(&mut self) -> Result<bool, End> {
        let into = match &mut self.large {
            Some(Pending::Payload(large)) => &mut large.buf.as_mut_slice()[large.have..],
            _ => self.input.room(),
        };
        if into.is_empty() {
            return Ok(false);
        }
        match self.stream.try_receive(into)? {
            Received::End => {
                // The client closed its side: as DISC. It may still be reading.
                self.closing = true;
                Ok(true)
            }
            Received::Bytes(n) => {
                match &mut self.large {
                    Some(Pending::Payload(large)) => large.have += n,
                    _ => self.input.end += n,
                }
                Ok(true)
            }
            Received::Nothing => Ok(false),
        }
    }

    /// Something waits to be sent: replies, or what TLS has to say.
    fn has_output(&self) -> bool {
        !self.out.is_empty() || self.stream.wants_send()
    }

    /// Send what the socket takes.
    fn send(&mut self) -> Result<Sent, End> {
        let (socket, tls) = self.stream.sender();
        let sent = match tls {
            None => self.out.send(socket)?,
            Some(tls) => self.out.send_sealed(socket, tls)?,
        };
        if sent == Sent::Blocked {
            self.stream.clear_writable();
        }
        Ok(sent)
    }

    /// Use what was received; `true`: anything happened.
    fn process(&mut self) -> Result<bool, End> {
        let mut moved = false;
        while !self.closing && self.may_receive() {
            let step = match self.large.take() {
                Some(pending) => self.go_on(pending),
                None => self.next_request()?,
            };
            if !step {
                break;
            }
            moved = true;
            if self.out.len() >= BATCH_BYTES && self.send()? == Sent::Blocked {
                break;
            }
        }
        Ok(moved)
    }

    /// Continue a payload or a swallow; `false`: more input is needed.
    fn go_on(&mut self, pending: Pending) -> bool {
        match pending {
            Pending::Swallow(left) => {
                let n = (left).min(self.input.bytes().len() as u64);
                self.input.consume(n as usize);
                if n < left {
                    self.large = Some(Pending::Swallow(left - n));
                }
                n > 0 || left == 0
            }
            Pending::Payload(large) if large.have < large.buf.len() => {
                self.large = Some(Pending::Payload(large));
                false
            }
            Pending::Payload(Large {
                request,
                checked,
                buf,
                ..
            }) => {
                serve::start_write(&self.shared, &request, checked, buf);
                true
            }
        }
    }

    /// Begin the next request; `false`: more input is needed.
    fn next_request(&mut self) -> Result<bool, End> {
        let bytes = self.input.bytes();
        let request = match self.shared.session.parse(bytes) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(false),
            Err(magic) => return Err(End::Protocol(format!("bad request magic {:#x}", magic.0))),
        };
        let header = self.shared.session.header_len();
        let export = self.shared.user.export();
        let node = export.node();
        let checked = self.shared.session.check(&request, node.size());
        let checked = match node.is_active() {
            true => checked,
            false => checked.and_then(Session::check_inactive),
        };
        match checked {
            Ok(checked) => {
                if self.is_too_early(&checked, header) {
                    return Ok(false);
                }
                self.begin(&request, checked, header)
            }
            Err(Reject::Answer {
                errno,
                text,
                swallow,
            }) => {
                export.stats().errors.fetch_add(1, Ordering::Relaxed);
                let to = self.shared.session.reply_to(&request);
                self.input.consume(header);
                self.out.bytes(|out| to.error(errno, text, out));
                if swallow > 0 {
                    self.large = Some(Pending::Swallow(swallow));
                }
                Ok(true)
            }
            Err(Reject::Disconnect(len)) => Err(End::Protocol(format!(
                "a request declares {len} bytes of payload"
            ))),
        }
    }

    /// Whether the next request is more than what was granted until now. It waits where it is.
    fn is_too_early(&mut self, checked: &Checked, header: usize) -> bool {
        let Some(lease) = &self.lease else {
            return false;
        };
        let payload = checked.payload as usize;
        let complete = self.input.bytes().len() >= header + payload;
        if checked.payload <= SMALL_PAYLOAD && !complete {
            // It begins, and is charged, when all of it is here.
            return false;
        }
        let moved = match checked.operation {
            Operation::Read { .. } => checked.length,
            _ => checked.payload,
        };
        let admitted = self.pace.admit(lease, Instant::now(), moved);
        self.paused_until = admitted.err();
        self.paused_until.is_some()
    }

    fn begin(&mut self, request: &Request, checked: Checked, header: usize) -> Result<bool, End> {
        if checked.operation == Operation::Disconnect {
            self.input.consume(header);
            self.closing = true;
            return Ok(true);
        }
        if checked.payload == 0 {
            self.input.consume(header);
            serve::request(&self.shared, request, checked, &mut self.out);
            return Ok(true);
        }
        let payload = checked.payload as usize;
        if checked.payload <= SMALL_PAYLOAD {
            if self.input.bytes().len() < header + payload {
                return Ok(false);
            }
            let bytes = &self.input.bytes()[header..header + payload];
            serve::small_payload(&self.shared, request, checked, bytes, &mut self.out);
            self.input.consume(header + payload);
            return Ok(true);
        }
        self.input.consume(header);
        let mut buf = pool::take(payload);
        let have = payload.min(self.input.bytes().len());
        buf.as_mut_slice()[..have].copy_from_slice(&self.input.bytes()[..have]);
        self.input.consume(have);
        self.large = Some(Pending::Payload(Large {
            request: *request,
            checked,
            buf,
            have,
        }));
        Ok(true)
    }
}
