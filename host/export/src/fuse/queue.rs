//! One queue: a descriptor of `/dev/fuse` on an iothread.
//!
//! ```text
//!   readv -> parse -> inline answer --------> write
//!                  \-> task (slow) -> answer -> writev
//! ```
//! The kernel keeps one list of requests for all queues of a connection; whoever reads first has
//! it. Each read gives one request, each write is one answer. Invariants: at most
//! [`IN_FLIGHT_MAX`] requests and [`BYTES_MAX`] bytes of a queue wait, then nothing more is read;
//! the export is not gone before the last task of the queue ended; a queue that ends, for whatever
//! reason, ends the export.

use std::cell::{Cell, RefCell};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use outport_block::Buf;
use outport_block::engine::{READABLE, register_readable};
use rustix::io::Errno as SysErrno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};

use super::file::File;
use super::reply::{HEADER, Message};
use super::request::{self, Malformed, PREFIX, WRITE_PREFIX};
use super::serve;
use crate::export::{Export, ExportHold};
use crate::pool;

/// Most bytes of one READ or WRITE: what the kernel allows without being told otherwise.
pub(super) const DATA_MAX: usize = 1 << 20;

/// Requests of one queue that wait for something.
const IN_FLIGHT_MAX: usize = 4096;

/// Bytes in flight in one queue: as for an NBD client.
const BYTES_MAX: u64 = 64 << 20;

/// Requests in a row before other tasks of the iothread get their turn.
const TURN: u32 = 64;

/// What the control plane hands over.
pub(super) struct Handover {
    pub(super) device: OwnedFd,
    pub(super) file: Arc<File>,
    pub(super) hold: ExportHold,
    /// Becomes true when the file is not mounted any more.
    pub(super) unmounted: watch::Receiver<bool>,
    /// The first queue tells the kernel of changes.
    pub(super) first: bool,
}

/// What the queue's tasks share with it.
pub(super) struct Shared {
    pub(super) file: Arc<File>,
    device: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
    room: Notify,
    in_flight: Cell<usize>,
    bytes: Cell<u64>,
    /// Last: while tasks live, the export is not gone.
    _hold: ExportHold,
}

impl Shared {
    pub(super) fn answer(&self, message: &Message) {
        self.write(&[IoSlice::new(message.as_bytes())]);
    }

    /// One message. The kernel refuses those that nobody waits for any more.
    pub(super) fn write(&self, pieces: &[IoSlice<'_>]) {
        let device = self.device.borrow();
        let Some(device) = &*device else { return };
        match rustix::io::writev(device.get_ref(), pieces) {
            Ok(_) | Err(SysErrno::NOENT | SysErrno::NODEV | SysErrno::CONNABORTED) => {}
            Err(reason) => tracing::debug!(%reason, "an answer was not taken"),
        }
    }

    /// The kernel's number of the file that it may read itself, if it may.
    pub(super) fn backing(&self) -> Option<i32> {
        let device = self.device.borrow();
        let passthrough = self.file.passthrough.as_ref()?;
        passthrough.id((**device.as_ref()?).get_ref())
    }

    pub(super) fn begin(&self, bytes: u64) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
    }

    pub(super) fn end(&self, bytes: u64) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.bytes.set(self.bytes.get() - bytes);
        self.room.notify_one();
    }

    fn is_full(&self) -> bool {
        self.in_flight.get() >= IN_FLIGHT_MAX || self.bytes.get() >= BYTES_MAX
    }
}

/// Ends the export with the queue.
struct Ends(Arc<Export>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

/// The life of a queue.
pub(super) async fn run(handover: Handover) {
    let Handover {
        device,
        file,
        hold,
        mut unmounted,
        first,
    } = handover;
    let export = file.export().clone();
    let ends = Ends(export.clone());
    let device = match register_readable(device) {
        Ok(device) => Rc::new(device),
        Err(reason) => {
            tracing::warn!(export = export.id(), %reason, "cannot wait for requests");
            return;
        }
    };
    let shared = Rc::new(Shared {
        file,
        device: RefCell::new(Some(device.clone())),
        room: Notify::new(),
        in_flight: Cell::new(0),
        bytes: Cell::new(0),
        _hold: hold,
    });
    let mut queue = Queue {
        device,
        shared: shared.clone(),
        prefix: [0; PREFIX],
        payload: Buf::zeroed(DATA_MAX),
        out: vec![0; HEADER + DATA_MAX],
    };
    tokio::select! {
        biased;
        reason = queue.serve() => {
            if first && !export.is_shutting_down() {
                tracing::warn!(export = export.id(), %reason, "the file is not mounted any more");
            }
        }
        _ = unmounted.wait_for(|unmounted| *unmounted) => {}
        () = changes(&shared, first) => {}
    }
    drop(ends);
    drop(queue);
    shared.device.take();
    pool::clear();
}

/// Tells the kernel whenever somebody else resized the node.
async fn changes(shared: &Shared, first: bool) {
    if !first {
        return std::future::pending().await;
    }
    let export = shared.file.export();
    loop {
        export.resized().await;
        shared.answer(&Message::forget_attributes());
    }
}

/// What the loop owns.
pub(super) struct Queue {
    device: Rc<AsyncFd<OwnedFd>>,
    pub(super) shared: Rc<Shared>,
    prefix: [u8; PREFIX],
    /// Data of a WRITE; exchanged when a task needs it for longer.
    pub(super) payload: Buf,
    /// An answer with data.
    pub(super) out: Vec<u8>,
}

impl Queue {
    /// Serves until the connection ends, and says why it did.
    async fn serve(&mut self) -> SysErrno {
        let mut turn = 0;
        loop {
            while self.shared.is_full() {
                self.shared.room.notified().await;
            }
            match self.receive() {
                Ok(received) => {
                    if let Err(end) = self.one(received) {
                        return end;
                    }
                    turn += 1;
                    if turn >= TURN {
                        turn = 0;
                        tokio::task::yield_now().await;
                    }
                }
                Err(SysErrno::AGAIN) => {
                    turn = 0;
                    match self.device.ready(READABLE).await {
                        // The reactor reports edges; what came since, the next read sees.
                        Ok(mut ready) => ready.clear_ready(),
                        Err(_) => return SysErrno::NODEV,
                    }
                }
                // The one who asked gave up before it was read.
                Err(SysErrno::NOENT | SysErrno::INTR) => {}
                Err(end) => return end,
            }
        }
    }

    fn receive(&mut self) -> Result<usize, SysErrno> {
        let (prefix, _) = self.prefix.split_at_mut(WRITE_PREFIX);
        let mut into = [
            IoSliceMut::new(prefix),
            IoSliceMut::new(self.payload.as_mut_slice()),
        ];
        rustix::io::readv(self.device.get_ref(), &mut into)
    }

    fn one(&mut self, received: usize) -> Result<(), SysErrno> {
        // What does not carry data is parsed in one piece.
        let more = received
            .saturating_sub(WRITE_PREFIX)
            .min(PREFIX - WRITE_PREFIX);
        let (_, rest) = self.prefix.split_at_mut(WRITE_PREFIX);
        rest[..more].copy_from_slice(&self.payload.as_slice()[..more]);
        let prefix = &self.prefix[..received.min(PREFIX)];
        match request::parse(prefix, received) {
            Ok(request) => serve::request(self, &request),
            Err(Malformed::Body { unique }) => {
                self.shared.answer(&Message::error(unique, libc::EINVAL));
            }
            Err(Malformed::Header) => return Err(SysErrno::PROTO),
        }
        Ok(())
    }
}
