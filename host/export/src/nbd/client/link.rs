//! The connection of one node: sends what is queued, hands replies back, connects again.
//!
//! ```text
//! connected --stream ends--> waiting --reconnect-delay over--> failing
//!     ^  requests sent again   |                                  |
//!     '------------------------+---------- connected again -------'
//! connected --protocol broken--> over: every request fails
//! ```
//!
//! One task on the node's iothread. Invariants: at most [`OPEN_MAX`] requests are with the server;
//! what is with the server when the stream ends is sent again or fails, never forgotten.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use outport_block::Errno;
use outport_block::engine::transfer::Payload;
use rustix::io::Errno as SysErrno;
use tokio::time::Instant;

use super::super::reply::ReplyMode;
use super::super::stream::{Received, Stream, StreamError};
use super::super::wire::{Command, CommandFlags, Request};
use super::super::{connection, socket};
use super::ClientOptions;
use super::handshake::{Agreed, Handshake, Step};
use super::queue::{Body, CLOSE_MAX, Queue, Submission};
use super::receiver::{Event, OPEN_MAX, Open, Receiver};

/// The receive buffer: one read takes many replies.
const RECEIVE: usize = 256 << 10;

/// Pieces of one `sendmsg`.
const PIECES_MAX: usize = 64;

/// A server that does not finish its handshake is given up after this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// The pause before another try; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// As often as this a server that is away is looked for.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Turns without waiting before other tasks of the iothread get theirs.
const TURNS_MAX: u32 = 8;

const END_OF_FILE: &str = "Unexpected end-of-file before all data were read";

/// Connects and leaves a task behind that serves the queue.
///
/// # Errors
/// In QEMU's words.
pub(super) async fn open(options: ClientOptions, queue: Arc<Queue>) -> Result<Agreed, String> {
    let until = Instant::now() + options.open_timeout;
    let mut pause = PAUSE_MIN;
    let connection = loop {
        match establish(&options).await {
            Ok(connection) => break connection,
            Err(reason) if Instant::now() + pause >= until => return Err(reason),
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    };
    let agreed = connection.agreed;
    tokio::task::spawn_local(async move {
        Link { options, queue }.run(connection).await;
    });
    Ok(agreed)
}

/// Dials and shakes hands.
async fn establish(options: &ClientOptions) -> Result<Connection, String> {
    let work = async {
        let fd = options.server.connect().await?;
        let fd = connection::register(fd).map_err(|e| e.to_string())?;
        shake(Stream::new(fd), options).await
    };
    let limited = tokio::time::timeout(HANDSHAKE_MAX, work).await;
    limited.unwrap_or_else(|_| Err("The NBD server does not finish its handshake".to_owned()))
}

async fn shake(mut stream: Stream, options: &ClientOptions) -> Result<Connection, String> {
    let mut handshake = match &options.tls {
        Some(_) => Handshake::encrypted(&options.export),
        None => Handshake::new(&options.export),
    };
    let mut input = Vec::new();
    let mut chunk = vec![0; 4096];
    loop {
        let (used, step) = handshake.drive(&input);
        input.drain(..used);
        match step {
            Step::NeedInput => match stream.receive(&mut chunk).await {
                Ok(0) => return Err(handshake.ended(END_OF_FILE)),
                Ok(n) => input.extend_from_slice(&chunk[..n]),
                Err(e) => return Err(handshake.ended(&unreadable(&e))),
            },
            Step::Send => {
                // If the server hung up, reading says so in better words.
                let _ = stream.send(&handshake.take_output()).await;
            }
            Step::StartTls => {
                let tls = options.tls.as_ref().ok_or("no TLS credentials")?;
                let session = tls.credentials.connect(tls.hostname.as_deref())?;
                let started = stream.start_tls(session).await;
                started.map_err(|e| tls.refusal(&e))?;
                handshake.tls_established();
            }
            Step::Done(agreed) => return Ok(Connection::new(stream, agreed, input)),
            Step::Fail(sentence) => return Err(sentence),
        }
    }
}

fn unreadable(e: &StreamError) -> String {
    match e {
        StreamError::System(e) => {
            let reason = outport_block::strerror(e.raw_os_error());
            format!("Unable to read from socket: {reason}")
        }
        StreamError::Tls(e) => format!("Cannot read from TLS channel: {e}"),
    }
}

/// Why a connection is over.
#[derive(Debug)]
enum Lost {
    /// The node was closed.
    Closed,
    /// The stream ended or failed.
    Stream(String),
    /// The server broke the protocol.
    Protocol(String),
}

impl From<StreamError> for Lost {
    fn from(e: StreamError) -> Self {
        Self::Stream(match e {
            StreamError::System(e) => outport_block::strerror(e.raw_os_error()),
            StreamError::Tls(e) => format!("TLS: {e}"),
        })
    }
}

impl From<SysErrno> for Lost {
    fn from(e: SysErrno) -> Self {
        StreamError::from(e).into()
    }
}

struct Link {
    options: ClientOptions,
    queue: Arc<Queue>,
}

impl Link {
    async fn run(self, mut connection: Connection) {
        loop {
            let agreed = connection.agreed;
            let lost = connection.serve(&self.queue).await;
            let sent = connection.take_back();
            let server = self.options.server.uri(&self.options.export);
            match lost {
                Lost::Closed => break self.end(sent),
                Lost::Protocol(reason) => {
                    tracing::error!(server, reason, "NBD server broke the protocol");
                    break self.end(sent);
                }
                Lost::Stream(reason) => {
                    tracing::warn!(server, reason, "connection to NBD server lost");
                }
            }
            drop(connection);
            if self.options.reconnect_delay.is_zero() {
                self.queue.fail_requests();
            }
            self.queue.put_back(sent);
            match self.reconnect(agreed).await {
                Some(next) => connection = next,
                None => break self.end(Vec::new()),
            }
            tracing::warn!(server, "connected to NBD server again");
            self.queue.take_requests();
        }
    }

    fn end(&self, sent: Vec<Submission>) {
        self.queue.close();
        // The queue is closed: these fail.
        self.queue.put_back(sent);
        self.queue.ended.notify_one();
    }

    /// Connects again, for as long as the node lives. `None`: it was closed, or the daemon ends.
    async fn reconnect(&self, before: Agreed) -> Option<Connection> {
        let until = Instant::now() + self.options.reconnect_delay;
        let mut pause = PAUSE_MIN;
        let mut said = String::new();
        let attempts = async {
            loop {
                let found = establish(&self.options).await;
                match found.and_then(|connection| same_export(before, connection)) {
                    Ok(connection) => return connection,
                    Err(reason) if reason != said => {
                        let server = self.options.server.uri(&self.options.export);
                        tracing::warn!(server, reason, "NBD server is away");
                        said = reason;
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        tokio::pin!(attempts);
        let mut failing = self.options.reconnect_delay.is_zero();
        // What was said before the connection was lost is not said again.
        while !self.queue.is_closed() && !self.queue.is_hurried() {
            tokio::select! {
                connection = &mut attempts => return Some(connection),
                () = tokio::time::sleep_until(until), if !failing => {
                    failing = true;
                    self.queue.fail_requests();
                }
                () = self.queue.wake.notified() => {}
            }
        }
        None
    }
}

/// The export must be what users were told: its length, and what it can do.
fn same_export(before: Agreed, connection: Connection) -> Result<Connection, String> {
    let now = connection.agreed;
    let lost = before.flags - now.flags;
    let same = now.size == before.size
        && now.block_min <= before.block_min
        && now.payload_max >= before.payload_max
        && now.mode == before.mode
        && now.allocation.is_some() == before.allocation.is_some()
        && lost.is_empty()
        && now
            .flags
            .contains(super::super::wire::TransmissionFlags::READ_ONLY)
            == before
                .flags
                .contains(super::super::wire::TransmissionFlags::READ_ONLY);
    match same {
        true => Ok(connection),
        false => Err("the export is not the one that it was".to_owned()),
    }
}

/// What is still to be sent.
enum Piece {
    Bytes(Vec<u8>),
    Payload(Payload),
}

impl Piece {
    fn slices(&self) -> Vec<&[u8]> {
        match self {
            Self::Bytes(bytes) => vec![bytes],
            Self::Payload(payload) => payload.slices().collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Payload(payload) => payload.len(),
        }
    }
}

struct Connection {
    stream: Stream,
    agreed: Agreed,
    receiver: Receiver,
    /// By slot, with the order in which they were sent.
    open: Vec<Option<(u64, Submission)>>,
    sent: u64,
    out: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    out_at: usize,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// When the node was closed, and when the daemon began to end.
    closed: Option<Instant>,
    hurried: Option<Instant>,
    /// So long the server may take to answer what it has.
    until: Option<Instant>,
    /// When something was sent or received last.
    moved: Instant,
}

impl Connection {
    fn new(stream: Stream, agreed: Agreed, rest: Vec<u8>) -> Self {
        let end = rest.len();
        let mut input = rest;
        input.resize(RECEIVE.max(end), 0);
        Self {
            stream,
            agreed,
            receiver: Receiver::new(agreed.mode, agreed.allocation),
            open: Vec::new(),
            sent: 0,
            out: VecDeque::new(),
            out_at: 0,
            input,
            start: 0,
            end,
            closed: None,
            hurried: None,
            until: None,
            moved: Instant::now(),
        }
    }

    /// Sends and receives until the connection is lost.
    async fn serve(&mut self, queue: &Queue) -> Lost {
        let mut turns = 0;
        loop {
            match self.turn(queue) {
                Ok(true) => {
                    if queue.is_hurried() {
                        self.moved = Instant::now();
                    }
                    turns += 1;
                    if turns >= TURNS_MAX {
                        turns = 0;
                        tokio::task::yield_now().await;
                    }
                }
                Ok(false) => {
                    turns = 0;
                    if queue.is_closed() {
                        let closed = self.closed.get_or_insert_with(Instant::now);
                        let until = *closed + CLOSE_MAX;
                        self.until = Some(until);
                        if self.receiver.open() == 0 {
                            self.disconnect().await;
                            return Lost::Closed;
                        }
                        if Instant::now() >= until {
                            return Lost::Closed;
                        }
                    }
                    if queue.is_hurried() && self.receiver.open() > 0 && !queue.is_closed() {
                        let hurried = self.hurried.get_or_insert_with(Instant::now);
                        let until = self.moved.max(*hurried) + CLOSE_MAX;
                        if Instant::now() >= until {
                            return Lost::Closed;
                        }
                        self.until = Some(until);
                    }
                    if let Err(lost) = self.wait(queue).await {
                        return lost;
                    }
                }
                Err(lost) => return lost,
            }
        }
    }

    async fn wait(&self, queue: &Queue) -> Result<(), Lost> {
        // After the node was closed nothing is queued, but the end of the wait is looked for.
        let room = self.receiver.open() < OPEN_MAX || queue.is_closed();
        let until = async {
            match self.until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let fd = self.stream.fd();
        let sends = !self.out.is_empty() || self.stream.wants_send();
        tokio::select! {
            biased;
            ready = fd.readable() => ready.map(drop),
            ready = fd.writable(), if sends => ready.map(drop),
            () = queue.wake.notified(), if room => Ok(()),
            () = until => Ok(()),
        }
        .map_err(|e| socket::errno(e).into())
    }

    /// One turn; `false`: nothing more can be done without waiting.
    fn turn(&mut self, queue: &Queue) -> Result<bool, Lost> {
        let mut moved = false;
        while self.receiver.open() < OPEN_MAX {
            let Some(submission) = queue.pop() else { break };
            self.queue_request(submission);
            moved = true;
        }
        moved |= self.send()?;
        moved |= self.receive()?;
        Ok(moved)
    }

    fn queue_request(&mut self, submission: Submission) {
        let open = Open {
            command: submission.command,
            offset: submission.offset,
            length: submission.length,
        };
        let Some((slot, cookie)) = self.receiver.begin(open) else {
            // The caller has looked.
            return submission.answer(Err(Errno::Io));
        };
        let mut flags = submission.flags;
        let extended = self.agreed.mode == ReplyMode::Extended;
        flags.set(
            CommandFlags::PAYLOAD_LEN,
            extended && submission.command == Command::WRITE,
        );
        let request = Request {
            flags,
            command: submission.command,
            cookie,
            offset: submission.offset,
            length: submission.length,
        };
        self.push_header(&request);
        if let Body::Write(payload, _) = &submission.body {
            self.out.push_back(Piece::Payload(payload.clone()));
        }
        if self.open.len() <= slot {
            self.open.resize_with(slot + 1, || None);
        }
        self.sent += 1;
        self.open[slot] = Some((self.sent, submission));
    }

    fn push_header(&mut self, request: &Request) {
        let extended = request.to_extended();
        let compact = request.to_compact();
        let header = match self.agreed.mode {
            ReplyMode::Extended => &extended[..],
            ReplyMode::Simple | ReplyMode::Structured => &compact[..],
        };
        // The first piece may be on its way already.
        match self.out.back_mut() {
            Some(Piece::Bytes(bytes)) => bytes.extend_from_slice(header),
            _ => self.out.push_back(Piece::Bytes(header.to_vec())),
        }
    }

    /// Sends what it can; `true`: something went.
    fn send(&mut self) -> Result<bool, Lost> {
        let mut moved = false;
        while !self.out.is_empty() {
            let slices: Vec<_> = self.out.iter().flat_map(Piece::slices).collect();
            let mut skip = self.out_at;
            let mut vector = Vec::with_capacity(PIECES_MAX);
            for slice in slices {
                if skip >= slice.len() {
                    skip -= slice.len();
                    continue;
                }
                vector.push(IoSlice::new(&slice[skip..]));
                skip = 0;
                if vector.len() == PIECES_MAX {
                    break;
                }
            }
            let sent = self.stream.try_send(&vector)?;
            if sent == 0 {
                return Ok(moved);
            }
            self.forget(sent);
            moved = true;
        }
        self.stream.try_flush()?;
        Ok(moved)
    }

    /// Drops bytes that were sent.
    fn forget(&mut self, sent: usize) {
        self.out_at += sent;
        while let Some(first) = self.out.front() {
            let len = first.len();
            if self.out_at < len {
                return;
            }
            self.out_at -= len;
            self.out.pop_front();
        }
    }

    /// Receives once and hands out what came; `true`: something came.
    fn receive(&mut self) -> Result<bool, Lost> {
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let room = &mut self.input[self.end..];
        match self.stream.try_receive(room)? {
            Received::End => return Err(Lost::Stream(END_OF_FILE.to_owned())),
            Received::Bytes(n) => self.end += n,
            Received::Nothing if self.start == self.end => return Ok(false),
            Received::Nothing => {}
        }
        self.hand_out()
    }

    /// What was received becomes answers; `true`: there was something.
    fn hand_out(&mut self) -> Result<bool, Lost> {
        let mut moved = false;
        loop {
            let input = &self.input[self.start..self.end];
            let driven = self.receiver.drive(input);
            let (used, event) = driven.map_err(|broken| Lost::Protocol(broken.0))?;
            self.start += used;
            moved |= used > 0;
            match event {
                None => return Ok(moved),
                Some(Event::Data { slot, at, bytes }) => {
                    if let Some((
                        _,
                        Submission {
                            body: Body::Read(landing),
                            ..
                        },
                    )) = self.open[slot].as_mut()
                    {
                        landing.put(at, bytes);
                    }
                }
                Some(Event::Zero { slot, at, len }) => {
                    if let Some((
                        _,
                        Submission {
                            body: Body::Read(landing),
                            ..
                        },
                    )) = self.open[slot].as_mut()
                    {
                        landing.zero(at, len);
                    }
                }
                Some(Event::Done { slot, outcome }) => {
                    if let Some((_, submission)) = self.open[slot].take() {
                        submission.answer(outcome.map_err(errno));
                    }
                }
            }
        }
    }

    /// The requests that were not answered, in their order.
    fn take_back(&mut self) -> Vec<Submission> {
        let mut sent: Vec<_> = self.open.drain(..).flatten().collect();
        sent.sort_by_key(|(order, _)| *order);
        sent.into_iter().map(|(_, submission)| submission).collect()
    }

    /// Says goodbye.
    async fn disconnect(&mut self) {
        let request = Request {
            flags: CommandFlags::empty(),
            command: Command::DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        self.push_header(&request);
        for piece in std::mem::take(&mut self.out) {
            for slice in piece.slices() {
                // Whether it is heard does not matter.
                let _ = self.stream.send(slice).await;
            }
        }
    }
}

/// A server's error number; what the protocol does not name is an invalid argument, as in QEMU.
fn errno(wire: u32) -> Errno {
    match wire {
        1 => Errno::Perm,
        5 => Errno::Io,
        12 => Errno::NoMem,
        28 => Errno::NoSpc,
        75 => Errno::Overflow,
        95 => Errno::NotSup,
        108 => Errno::Shutdown,
        _ => Errno::Inval,
    }
}
