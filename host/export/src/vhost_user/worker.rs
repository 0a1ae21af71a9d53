//! The data plane: one task per front-end and iothread, which serves its share of the queues.
//!
//! ```text
//!   kick -> take -> parse -> inline ----------> give -> publish -> call
//!                      \--> task (slow) -> done -/
//!   session -- commands --> between two turns
//! ```
//!
//! Invariants: a chain that was taken is given back exactly once, or the session has ended; memory
//! that a request uses stays mapped until the request ended; a ring is only stopped, and a memory
//! table only replaced, when nothing of it is in flight.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use outport_block::Errno;
use outport_block::engine::polling;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, oneshot};

use super::config::Shape;
use super::dirty::DirtyLog;
use super::limits::{IN_FLIGHT_BYTES_MAX, IN_FLIGHT_MAX};
use super::memory::{Gather, Memory};
use super::request::{self, Device};
use super::ring::{Broken, Chain, Ring, Segment, Setup, Taken};
use super::serve::{self, Outcome};
use crate::export::ExportUser;

/// Chains of one ring before the next ring gets its turn.
const BATCH: usize = 64;

/// Used buffers that are published together while there is more to do: the driver works on them
/// while we go on.
const PUBLISH: usize = 16;

/// Turns without waiting before other tasks of the iothread get theirs.
const TURNS_MAX: u32 = 8;

/// How often a ring without a kick descriptor is looked at while nothing happens.
const UNKICKED: Duration = Duration::from_millis(1);

/// What all workers of a front-end share with its session.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) user: ExportUser,
    pub(super) shape: Shape,
    /// What GET_ID says.
    pub(super) serial: [u8; 20],
    /// Bytes of the device, as the guest was told.
    pub(super) size: AtomicU64,
    /// A completed write is durable.
    pub(super) write_through: AtomicBool,
}

impl Shared {
    fn device(&self) -> Device {
        Device {
            size: self.size.load(Ordering::Relaxed),
            block_size: self.shape.block_size,
            writable: self.shape.writable,
        }
    }
}

/// A ring, handed over.
pub(super) struct Start {
    pub(super) index: u16,
    pub(super) setup: Setup,
    pub(super) ring: Ring,
    /// `None`: the ring is looked at every now and then.
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
}

/// What the session wants. Whoever waits for an answer gets it when it is true.
pub(super) enum Command {
    Start(Box<Start>, oneshot::Sender<Result<(), Errno>>),
    /// Finish what is in flight, and tell where to go on.
    Stop(u16, oneshot::Sender<u32>),
    Kick(u16, Option<OwnedFd>, oneshot::Sender<Result<(), Errno>>),
    Call(u16, Option<OwnedFd>),
    Err(u16, Option<OwnedFd>),
    /// The ring is elsewhere.
    Move(u16, Setup, Arc<Memory>, oneshot::Sender<Result<(), Errno>>),
    /// From now on this memory. `bool`: nothing may be in flight in the old one.
    Memory(Arc<Memory>, bool, oneshot::Sender<()>),
    Log(Option<Arc<DirtyLog>>, oneshot::Sender<()>),
}

/// A request that a task carried out.
pub(super) struct Done {
    pub(super) queue: u16,
    pub(super) ticket: Ticket,
    pub(super) outcome: Outcome,
}

/// What must be known to answer a request.
pub(super) struct Ticket {
    pub(super) taken: Taken,
    /// Guest address of the status byte.
    pub(super) status: u64,
    pub(super) written: u32,
    /// Of its payload.
    pub(super) bytes: u64,
    /// What was written, for the log.
    pub(super) segments: Box<[Segment]>,
}

/// Where tasks leave their results.
#[derive(Default)]
pub(super) struct Results {
    done: RefCell<Vec<Done>>,
    ready: Notify,
}

impl Results {
    pub(super) fn push(&self, done: Done) {
        self.done.borrow_mut().push(done);
        self.ready.notify_one();
    }
}

struct Queue {
    setup: Setup,
    ring: Ring,
    kick: Option<AsyncFd<OwnedFd>>,
    call: Option<Bell>,
    err: Option<Bell>,
    in_flight: usize,
    /// The driver was asked to kick.
    kicks: bool,
    broken: bool,
    stopping: Option<oneshot::Sender<u32>>,
}

impl Queue {
    fn is_served(&self) -> bool {
        !self.broken && self.stopping.is_none()
    }

    fn publish(&mut self, log: Option<&DirtyLog>) {
        if self.ring.publish(log)
            && let Some(call) = &self.call
        {
            call.ring();
        }
    }

    fn want_kicks(&mut self, wanted: bool, log: Option<&DirtyLog>) {
        if self.kicks != wanted {
            self.kicks = wanted;
            self.ring.want_kicks(wanted, log);
        }
    }
}

/// A descriptor that the front-end waits on. Its flags are the front-end's: some read it blocking.
struct Bell {
    fd: OwnedFd,
    /// A write to a full one would wait.
    blocks: bool,
}

impl Bell {
    fn new(fd: OwnedFd) -> Self {
        let flags = rustix::fs::fcntl_getfl(&fd);
        let blocks = !flags.is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { fd, blocks }
    }

    fn ring(&self) {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        // A full one has told everything that there is to tell.
        if self.blocks && !poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0) {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }
}

/// One share of a front-end's queues.
pub(super) struct Worker {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedReceiver<Command>,
    queues: BTreeMap<u16, Queue>,
    memory: Arc<Memory>,
    /// Of `memory`.
    gather: Gather,
    chain: Chain,
    log: Option<Arc<DirtyLog>>,
    results: Rc<Results>,
    in_flight: usize,
    /// Payload of what is in flight.
    bytes: u64,
    poll: polling::Poll,
    /// A memory table that waits until nothing is in flight.
    next_memory: Option<(Arc<Memory>, oneshot::Sender<()>)>,
    closing: bool,
}

impl Worker {
    /// On the thread that will run it.
    pub(super) fn new(shared: Arc<Shared>, commands: mpsc::UnboundedReceiver<Command>) -> Self {
        Self {
            shared,
            commands,
            queues: BTreeMap::new(),
            memory: Arc::default(),
            gather: Gather::new(Arc::default()),
            chain: Chain::default(),
            log: None,
            results: Rc::default(),
            in_flight: 0,
            bytes: 0,
            poll: polling::Poll::new(),
            next_memory: None,
            closing: false,
        }
    }

    /// Serve until the session drops its end of the commands and everything in flight has ended.
    pub(super) async fn run(mut self) {
        let mut turns = 0;
        while !(self.closing && self.in_flight == 0) {
            if self.turn() {
                turns += 1;
                if turns >= TURNS_MAX {
                    turns = 0;
                    tokio::task::yield_now().await;
                }
            } else if !self.finds_more() {
                turns = 0;
                self.wait().await;
            }
        }
    }

    /// One turn; `false`: there was nothing to do.
    fn turn(&mut self) -> bool {
        let mut moved = self.obey();
        moved |= self.finish_done();
        self.settle();
        if self.next_memory.is_some() || self.closing {
            return moved;
        }
        let device = self.shared.device();
        let mut queues = std::mem::take(&mut self.queues);
        for (index, queue) in &mut queues {
            if queue.is_served() {
                moved |= self.serve(*index, queue, &device);
            }
        }
        self.queues = queues;
        moved
    }

    /// Take what there is of one ring, within bounds.
    fn serve(&mut self, index: u16, queue: &mut Queue, device: &Device) -> bool {
        let mut count = 0;
        while count < BATCH && !self.is_full() {
            match self.serve_one(index, queue, device) {
                Ok(true) => count += 1,
                Ok(false) => break,
                Err(broken) => {
                    self.give_up(index, queue, broken);
                    break;
                }
            }
            if count == 1 {
                queue.want_kicks(false, self.log.as_deref());
            }
            if queue.ring.unpublished() >= PUBLISH {
                queue.publish(self.log.as_deref());
            }
        }
        queue.publish(self.log.as_deref());
        if count > 0 {
            self.shared.user.export().stats().touch();
        }
        count > 0
    }

    fn serve_one(
        &mut self,
        index: u16,
        queue: &mut Queue,
        device: &Device,
    ) -> Result<bool, Broken> {
        let memory = &*self.memory;
        let Some(taken) = queue.ring.take(memory, &mut self.chain)? else {
            return Ok(false);
        };
        let request = request::parse(&self.chain, device, memory, &mut self.gather)?;
        if let Some(outcome) = serve::at_once(&self.shared, &request.operation, &self.gather) {
            serve::answer(memory, request.status, outcome);
            if let Some(log) = &self.log {
                mark(log, self.chain.segments());
            }
            queue.ring.give(taken, request.written);
        } else {
            let ticket = Ticket {
                taken,
                status: request.status,
                written: request.written,
                bytes: self.gather.len(),
                segments: self.chain.segments().iter().copied().collect(),
            };
            self.in_flight += 1;
            self.bytes += ticket.bytes;
            queue.in_flight += 1;
            let operation = request.operation;
            serve::spawn(
                &self.shared,
                &self.results,
                index,
                ticket,
                operation,
                &self.gather,
            );
        }
        Ok(true)
    }

    fn give_up(&self, index: u16, queue: &mut Queue, broken: Broken) {
        queue.broken = true;
        let export = self.shared.user.export().id();
        tracing::warn!(export, queue = index, reason = %broken, "a ring is broken");
        if let Some(err) = &queue.err {
            err.ring();
        }
    }

    /// What tasks have finished.
    fn finish_done(&mut self) -> bool {
        if self.results.done.borrow().is_empty() {
            return false;
        }
        let done = self.results.done.take();
        let memory = &*self.memory;
        for Done {
            queue: index,
            ticket,
            outcome,
        } in done
        {
            self.in_flight -= 1;
            self.bytes -= ticket.bytes;
            let Some(queue) = self.queues.get_mut(&index) else {
                continue;
            };
            queue.in_flight -= 1;
            // After the session has ended, the next one finds the request undone.
            if self.closing {
                continue;
            }
            serve::answer(memory, ticket.status, outcome);
            if let Some(log) = &self.log {
                mark(log, &ticket.segments);
            }
            queue.ring.give(ticket.taken, ticket.written);
        }
        for queue in self.queues.values_mut() {
            queue.publish(self.log.as_deref());
        }
        true
    }

    /// Commands that are there.
    fn obey(&mut self) -> bool {
        let mut moved = false;
        while !self.closing {
            match self.commands.try_recv() {
                Ok(command) => self.command(command),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => self.closing = true,
            }
            moved = true;
        }
        moved
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start(start, told) => {
                let _ = told.send(self.start(*start));
            }
            Command::Stop(index, told) => match self.queues.get_mut(&index) {
                Some(queue) => queue.stopping = Some(told),
                None => drop(told),
            },
            Command::Kick(index, fd, told) => {
                let result = register(fd).map(|kick| {
                    if let Some(queue) = self.queues.get_mut(&index) {
                        queue.kick = kick;
                    }
                });
                let _ = told.send(result);
            }
            Command::Call(index, fd) => {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.call = fd.map(Bell::new);
                    // What was published with the old one may have told nobody.
                    if let Some(call) = &queue.call {
                        call.ring();
                    }
                }
            }
            Command::Err(index, fd) => {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.err = fd.map(Bell::new);
                }
            }
            Command::Move(index, setup, memory, told) => {
                let moved = self.queues.get_mut(&index).map(|queue| {
                    queue.setup = setup;
                    queue.ring.relocate(&setup, &memory)
                });
                let _ = told.send(moved.unwrap_or(Ok(())));
            }
            Command::Memory(memory, true, told) => self.next_memory = Some((memory, told)),
            Command::Memory(memory, false, told) => {
                self.use_memory(memory);
                let _ = told.send(());
            }
            Command::Log(log, told) => {
                self.log = log;
                let _ = told.send(());
            }
        }
    }

    fn start(&mut self, start: Start) -> Result<(), Errno> {
        let kick = register(start.kick)?;
        let queue = Queue {
            setup: start.setup,
            ring: start.ring,
            kick,
            call: start.call.map(Bell::new),
            err: start.err.map(Bell::new),
            in_flight: 0,
            kicks: false,
            broken: false,
            stopping: None,
        };
        // A back-end that died after it published used buffers and before it rang for them may
        // have left a driver that sleeps. Whether there are such buffers cannot be seen: indices
        // go round. One call too many is what drivers are made for.
        if let Some(call) = &queue.call {
            call.ring();
        }
        self.queues.insert(start.index, queue);
        Ok(())
    }

    /// What waits for the end of requests, if they have ended.
    fn settle(&mut self) {
        self.queues.retain(|_, queue| {
            let ends = queue.in_flight == 0 && queue.stopping.is_some();
            if ends && let Some(told) = queue.stopping.take() {
                queue.ring.retire();
                let _ = told.send(queue.ring.base());
            }
            !ends
        });
        if self.in_flight > 0 {
            return;
        }
        if let Some((memory, told)) = self.next_memory.take() {
            let mut lost = Vec::new();
            for (index, queue) in &mut self.queues {
                if queue.ring.relocate(&queue.setup, &memory).is_err() {
                    lost.push(*index);
                }
            }
            self.use_memory(memory);
            for index in lost {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.broken = true;
                }
            }
            let _ = told.send(());
        }
    }

    fn use_memory(&mut self, memory: Arc<Memory>) {
        self.memory = memory.clone();
        self.gather = Gather::new(memory);
    }

    /// Look for more for a while, then ask for kicks and look once more.
    fn finds_more(&mut self) -> bool {
        if self.closing || self.next_memory.is_some() {
            return false;
        }
        // The reactor is not looked at meanwhile: only while nobody waits for it.
        let window = self.poll.window();
        if self.in_flight == 0 && !window.is_zero() && !self.queues.is_empty() {
            let begun = Instant::now();
            while begun.elapsed() < window {
                if self.has_more() || !self.commands.is_empty() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        for queue in self.queues.values_mut().filter(|queue| queue.is_served()) {
            queue.want_kicks(true, self.log.as_deref());
        }
        self.has_more()
    }

    /// What is in flight is enough.
    const fn is_full(&self) -> bool {
        self.in_flight >= IN_FLIGHT_MAX || self.bytes >= IN_FLIGHT_BYTES_MAX
    }

    fn has_more(&self) -> bool {
        let mut served = self.queues.values().filter(|queue| queue.is_served());
        !self.is_full() && served.any(|queue| queue.ring.has_more())
    }

    /// Sleep until there is something to do.
    async fn wait(&mut self) {
        let idle_since = (self.in_flight == 0).then(Instant::now);
        let Self {
            commands,
            queues,
            results,
            closing,
            ..
        } = self;
        let unkicked = queues
            .values()
            .any(|it| it.is_served() && it.kick.is_none());
        let look = async {
            match unkicked && !*closing {
                true => tokio::time::sleep(UNKICKED).await,
                false => std::future::pending().await,
            }
        };
        let command = async {
            match *closing {
                true => std::future::pending().await,
                false => commands.recv().await,
            }
        };
        let command = tokio::select! {
            biased;
            () = poll_fn(|cx| kicked(queues, cx)) => None,
            () = results.ready.notified() => None,
            command = command => Some(command),
            () = look => None,
        };
        if let Some(since) = idle_since {
            // It has looked for a window before it slept.
            let looked = self.poll.window();
            self.poll.waited(since.elapsed() + looked);
        }
        match command {
            Some(Some(command)) => self.command(command),
            Some(None) => self.closing = true,
            None => {}
        }
    }
}

/// Ready when any ring was kicked. The descriptors are never read: the reactor reports edges, and
/// each kick is one.
fn kicked(queues: &BTreeMap<u16, Queue>, cx: &mut Context<'_>) -> Poll<()> {
    let mut result = Poll::Pending;
    for queue in queues.values() {
        let Some(kick) = queue.kick.as_ref().filter(|_| queue.is_served()) else {
            continue;
        };
        match kick.poll_read_ready(cx) {
            Poll::Ready(Ok(mut ready)) => {
                ready.clear_ready();
                result = Poll::Ready(());
            }
            Poll::Ready(Err(_)) | Poll::Pending => {}
        }
    }
    result
}

fn register(fd: Option<OwnedFd>) -> Result<Option<AsyncFd<OwnedFd>>, Errno> {
    let registered = fd.map(outport_block::engine::register).transpose();
    registered.map_err(Errno::from)
}

/// Everything that a request has written, status byte included: whoever clears a bit copies the
/// page after that, and what is written later would be lost.
fn mark(log: &DirtyLog, segments: &[Segment]) {
    for segment in segments.iter().filter(|segment| segment.writable) {
        log.mark(segment.addr, u64::from(segment.len));
    }
}
