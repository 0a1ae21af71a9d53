//! An iothread's io_uring.
//!
//! Owned by one iothread and used only there. Operations are queued while the
//! loop runs tasks and submitted in batches, the rest of a turn by the submitter
//! task; the reaper task wakes when the ring's descriptor is readable.
//!
//! Invariant: an operation's file and memory live in `inflight` from submission
//! until its completion was reaped, whatever happened to the waiting future.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use io_uring::{IoUring, opcode, types};
use slab::Slab;
use tokio::sync::Notify;

use super::completion::Completion;
use super::lanes::Lanes;
use super::op::{Op, OpKind};

/// Submission queue entries: a turn rarely queues more, and more is only a
/// second `io_uring_enter`.
const ENTRIES: u32 = 256;

/// Completion queue entries, and so operations in the kernel at one time; others wait in `lanes`.
/// Room for sixteen files that do not answer; 32 KiB.
const INFLIGHT_MAX: u32 = 2048;

struct InFlight {
    done: Completion,
    /// Keeps descriptor and memory alive.
    op: Op,
    /// Keeps the iovec array alive until the kernel copied it.
    _iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs are copies of pointers in `op`, which may move between
// threads; the value itself stays on its iothread.
unsafe impl Send for InFlight {}

/// The ring and what is in it.
pub(crate) struct Ring {
    ring: IoUring,
    inflight: Slab<InFlight>,
    /// What the completion queue holds, so that it never overflows.
    inflight_max: usize,
    lanes: Lanes<(Op, Completion)>,
    queued: usize,
    /// Completions delivered since the start.
    reaped: u64,
    /// Told of each delivery: whoever measures waits for it.
    delivered: Rc<Notify>,
}

impl Ring {
    /// A new ring; an error says that the kernel or its policy refuses one.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .setup_cqsize(INFLIGHT_MAX)
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        Ok(Self {
            inflight_max: ring.params().cq_entries() as usize,
            ring,
            inflight: Slab::new(),
            lanes: Lanes::new(),
            queued: 0,
            reaped: 0,
            delivered: Rc::default(),
        })
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Queue an operation; [`Ring::submit`] hands it to the kernel.
    pub(crate) fn push(&mut self, op: Op, done: Completion) {
        let room = self.inflight.len() < self.inflight_max;
        let file = op.fd.as_raw_fd();
        if let Some((op, done)) = self.lanes.enter(file, (op, done), room) {
            self.start(op, done);
        }
    }

    fn start(&mut self, op: Op, done: Completion) {
        let fd = types::Fd(op.fd.as_raw_fd());
        let mut iovecs = Vec::new();
        let entry = match &op.kind {
            OpKind::Read(mem) => match mem.single() {
                Some((ptr, len)) => opcode::Read::new(fd, ptr, len as u32)
                    .offset(op.offset)
                    .build(),
                None => {
                    iovecs = mem.iovecs();
                    opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.len() as u32)
                        .offset(op.offset)
                        .build()
                }
            },
            OpKind::Write(mem, dsync) => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                match mem.single() {
                    Some((ptr, len)) => opcode::Write::new(fd, ptr, len as u32)
                        .offset(op.offset)
                        .rw_flags(flags)
                        .build(),
                    None => {
                        iovecs = mem.iovecs();
                        opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.len() as u32)
                            .offset(op.offset)
                            .rw_flags(flags)
                            .build()
                    }
                }
            }
            OpKind::Datasync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            OpKind::Fallocate { mode, len } => opcode::Fallocate::new(fd, *len)
                .offset(op.offset)
                .mode(*mode)
                .build(),
        };
        let key = self.inflight.insert(InFlight {
            done,
            op,
            _iovecs: iovecs,
        });
        let entry = entry.user_data(key as u64);
        loop {
            // SAFETY: descriptor, memory and iovecs of the entry are owned by
            // `inflight[key]` until its completion is reaped.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.queued += 1;
                return;
            }
            self.submit();
        }
    }

    /// Hand everything queued to the kernel.
    pub(crate) fn submit(&mut self) {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(n) => {
                    self.queued -= n.min(self.queued);
                    if n == 0 {
                        // The kernel took all that it had seen.
                        self.queued = self.ring.submission().len();
                        break;
                    }
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // EBUSY/EAGAIN: completions must be reaped first.
                Err(_) => {
                    self.reap();
                    if self.inflight.is_empty() {
                        break;
                    }
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Deliver what has completed; returns how many.
    pub(crate) fn reap(&mut self) -> usize {
        let mut reaped = 0;
        loop {
            let Some(cqe) = self.ring.completion().next() else {
                break;
            };
            reaped += 1;
            if let Some(entry) = self.inflight.try_remove(cqe.user_data() as usize) {
                self.lanes.leave(entry.op.fd.as_raw_fd());
                entry.finish(cqe.result());
            }
        }
        if reaped > 0 {
            self.reaped = self.reaped.wrapping_add(reaped as u64);
            self.delivered.notify_waiters();
        }
        while self.inflight.len() < self.inflight_max {
            let Some((op, done)) = self.lanes.next() else {
                break;
            };
            self.start(op, done);
        }
        reaped
    }

    /// Completions delivered since the start.
    pub(crate) fn reaped(&self) -> u64 {
        self.reaped
    }

    /// Told of the next delivery.
    pub(crate) fn signal(&self) -> Rc<Notify> {
        self.delivered.clone()
    }

    /// Nothing in the kernel?
    pub(crate) fn is_idle(&self) -> bool {
        self.inflight.is_empty()
    }

    /// Operations that the kernel does not know of yet.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Anything queued that the kernel does not know of?
    pub(crate) fn needs_submit(&self) -> bool {
        self.queued > 0
    }

    /// Submit and deliver until nothing more is ready.
    pub(crate) fn turn(&mut self) {
        self.submit();
        // Reaping makes room for what waits, which must be submitted in turn.
        while self.reap() > 0 || self.needs_submit() {
            self.submit();
        }
    }
}

impl InFlight {
    fn finish(self, result: i32) {
        // Memory first: a waiter may take the buffer as its only owner.
        drop(self.op);
        self.done.set(result);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Memory must outlive the kernel's use of it.
        self.submit();
        while !self.inflight.is_empty() {
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::yield_now();
            }
            self.reap();
        }
    }
}
