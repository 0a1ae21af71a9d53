//! An iothread: one OS thread with a single-threaded runtime and a ring.
//!
//! Control hands work over with [`IoThread::spawn`]; nothing else crosses. A
//! task that panics is logged and ends; the thread goes on. The thread ends when
//! the last handle is gone: tasks are dropped (what must not stop midway moves
//! to `background`), then the ring is drained and closed.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use futures_util::FutureExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tokio::task::LocalSet;

use super::completion::{Completion, OpFuture};
use super::op::Op;
use super::polling::{self, IoLimits, Poll, Shared};
use super::pool;
use super::uring::Ring;

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;
type Job = Box<dyn FnOnce() -> LocalFuture + Send>;

/// Operations handed to the kernel at once where `aio-max-batch` says nothing: the device works on
/// the first ones while we queue the next. A whole turn of 32 at once makes it and us take turns
/// instead of working side by side, and single ones cost a system call each.
const BATCH: u64 = 8;

struct Local {
    ring: Rc<RefCell<Ring>>,
    /// Wakes the submitter task of this thread.
    submit: Rc<Notify>,
    limits: Arc<Shared>,
}

thread_local! {
    static LOCAL: RefCell<Option<Local>> = const { RefCell::new(None) };
}

/// Which engine a file asked for (`aio` of the file driver).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// Blocking calls on the pool.
    Threads,
    /// QEMU's Linux AIO: needs `cache.direct=on`; served by the ring.
    Native,
    /// The ring.
    #[default]
    IoUring,
}

/// Start an operation now; the future only waits for it.
pub(crate) fn submit(op: Op, aio: Aio) -> OpFuture {
    let (future, done) = OpFuture::new();
    if aio == Aio::Threads {
        pool::pool().submit(op, done);
        return future;
    }
    if let Some((op, done)) = submit_ring(op, done) {
        pool::pool().submit(op, done);
    }
    future
}

/// Queue on this thread's ring; gives the operation back where there is none.
fn submit_ring(op: Op, done: Completion) -> Option<(Op, Completion)> {
    LOCAL.with_borrow(|local| match local {
        Some(local) => {
            let mut ring = local.ring.borrow_mut();
            if !ring.needs_submit() {
                local.submit.notify_one();
            }
            ring.push(op, done);
            let batch = match local.limits.get().batch_max {
                0 => BATCH,
                told => told,
            };
            if ring.queued() as u64 >= batch {
                ring.submit();
            }
            None
        }
        None => Some((op, done)),
    })
}

/// A handle to an iothread. Clones share the thread.
#[derive(Clone, Debug)]
pub struct IoThread {
    name: Arc<str>,
    jobs: mpsc::UnboundedSender<Job>,
    limits: Arc<Shared>,
}

impl IoThread {
    /// Start the thread. `name` is the object id.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub fn start(name: &str) -> io::Result<Self> {
        let (jobs, queue) = mpsc::unbounded_channel();
        let limits = Arc::new(Shared::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name(format!("io-{name}").chars().take(15).collect())
            .spawn({
                let limits = limits.clone();
                move || run(&runtime, queue, limits)
            })?;
        Ok(Self {
            name: Arc::from(name),
            jobs,
            limits,
        })
    }

    /// The object id.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the thread may spend on polling, and how much it submits at once, from now on. A thread
    /// that was told nothing does not poll.
    pub fn set_limits(&self, limits: IoLimits) {
        self.limits.set(limits);
    }

    /// The limits as they are now.
    #[must_use]
    pub fn limits(&self) -> IoLimits {
        self.limits.get()
    }

    /// Run a future on the thread. `make` runs there, so the future itself
    /// need not be `Send`.
    pub fn spawn<F, Fut>(&self, make: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        // The thread lives as long as a handle does, and `self` is one.
        let _ = self
            .jobs
            .send(Box::new(move || Box::pin(async move { make().await })));
    }

    /// Run a future on the thread and wait for its result.
    ///
    /// Returns `None` only if the future panicked.
    pub async fn run<F, Fut, T>(&self, make: F) -> Option<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.spawn(move || async move {
            let _ = tx.send(make().await);
        });
        rx.await.ok()
    }
}

fn run(
    runtime: &tokio::runtime::Runtime,
    mut queue: mpsc::UnboundedReceiver<Job>,
    limits: Arc<Shared>,
) {
    polling::enter(limits.clone());
    let set = LocalSet::new();
    set.block_on(runtime, async move {
        start_ring(limits);
        while let Some(job) = queue.recv().await {
            tokio::task::spawn_local(guarded(job()));
        }
    });
    // Tasks first: they may still queue operations as they go.
    drop(set);
    LOCAL.with_borrow_mut(Option::take);
}

/// A bug in one connection's task is that connection's end, and is seen.
async fn guarded(task: LocalFuture) {
    let result = std::panic::AssertUnwindSafe(task).catch_unwind().await;
    if let Err(panic) = result {
        let reason = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name(),
            reason,
            "a task panicked on an iothread"
        );
    }
}

/// The ring's descriptor; keeps the ring open while the reactor knows it.
struct RingFd {
    fd: RawFd,
    _ring: Rc<RefCell<Ring>>,
}

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

/// Says it once: the other threads have no ring for the same reason.
fn say_no_ring(reason: &io::Error) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            %reason,
            "io_uring is not available, requests that must wait use a thread pool"
        );
    }
}

/// Give this thread a ring, or say why there is none.
fn start_ring(limits: Arc<Shared>) {
    let ring = match Ring::new() {
        Ok(ring) => ring,
        Err(e) => return say_no_ring(&e),
    };
    let interest = tokio::io::Interest::READABLE;
    let fd = ring.raw_fd();
    let ring = Rc::new(RefCell::new(ring));
    let ring_fd = RingFd {
        fd,
        _ring: ring.clone(),
    };
    // SAFETY: the descriptor is the ring's, which never changes it and closes
    // it only after `RingFd` is dropped, since that holds the ring.
    let fd = match unsafe { AsyncFd::register_with_interest(ring_fd, interest) } {
        Ok(fd) => fd,
        Err(e) => return say_no_ring(&e.into()),
    };
    let submit = Rc::new(Notify::new());
    let poller = Rc::new(Notify::new());
    let submitter = submitter(ring.clone(), submit.clone(), poller.clone(), limits.clone());
    tokio::task::spawn_local(submitter);
    tokio::task::spawn_local(poll_ring(ring.clone(), poller));
    tokio::task::spawn_local(reaper(ring.clone(), fd));
    LOCAL.with_borrow_mut(|local| {
        *local = Some(Local {
            ring,
            submit,
            limits,
        });
    });
}

/// Woken by the first operation of a turn; runs after the tasks that are
/// already queued, so one `io_uring_enter` carries what a turn left below a full batch.
async fn submitter(
    ring: Rc<RefCell<Ring>>,
    wake: Rc<Notify>,
    poller: Rc<Notify>,
    limits: Arc<Shared>,
) {
    loop {
        wake.notified().await;
        ring.borrow_mut().turn();
        if limits.get().poll_max_ns > 0 {
            poller.notify_one();
        }
    }
}

/// Looks for completions for a while before the thread sleeps, if its object says so.
async fn poll_ring(ring: Rc<RefCell<Ring>>, submitted: Rc<Notify>) {
    let mut poll = Poll::new();
    loop {
        submitted.notified().await;
        let begun = Instant::now();
        let before = ring.borrow().reaped();
        let look = || {
            let mut ring = ring.borrow_mut();
            ring.turn();
            ring.reaped() != before
        };
        if !poll.is_on() || ring.borrow().is_idle() {
            continue;
        }
        if !poll.until(look).await {
            // The reaper is woken for it; how long did that take?
            let seen = ring.borrow().signal();
            if ring.borrow().reaped() == before {
                seen.notified().await;
            }
        }
        poll.waited(begun.elapsed());
    }
}

async fn reaper(ring: Rc<RefCell<Ring>>, fd: AsyncFd<RingFd>) {
    loop {
        let Ok(mut ready) = fd.readable().await else {
            return;
        };
        ready.clear_ready();
        ring.borrow_mut().turn();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::super::buffer::Buf;
    use super::super::op::OpKind;
    use super::*;

    #[tokio::test]
    async fn ring_reads_what_the_file_holds() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8192], 0).unwrap();
        let fd = Arc::new(OwnedFd::from(file));
        let polling = IoLimits {
            poll_max_ns: 1_000_000_000,
            poll_grow: 2,
            poll_shrink: 0,
            batch_max: 3,
        };
        for (aio, limits) in [
            (Aio::IoUring, IoLimits::default()),
            (Aio::IoUring, polling),
            (Aio::Threads, polling),
        ] {
            let fd = fd.clone();
            let thread = IoThread::start("t").unwrap();
            thread.set_limits(limits);
            let sum = thread
                .run(move || async move {
                    let bufs: Vec<_> = (0..700).map(|_| Buf::zeroed(4096)).collect();
                    let ops: Vec<_> = bufs
                        .iter()
                        .map(|b| {
                            let kind = OpKind::Read(b.io());
                            submit(
                                Op {
                                    fd: fd.clone(),
                                    offset: 4096,
                                    kind,
                                },
                                aio,
                            )
                        })
                        .collect();
                    for op in ops {
                        assert_eq!(op.await, 4096);
                    }
                    bufs.iter()
                        .map(|b| u64::from(b.as_slice()[4095]))
                        .sum::<u64>()
                })
                .await;
            assert_eq!(sum, Some(4900));
        }
    }

    #[tokio::test]
    async fn a_file_that_does_not_answer_keeps_out_no_other() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0).unwrap();
        let file = Arc::new(OwnedFd::from(file));
        let (silent, writer) = rustix::pipe::pipe().unwrap();
        let silent = Arc::new(silent);
        let thread = IoThread::start("h").unwrap();
        let read = |fd: &Arc<OwnedFd>| {
            let kind = OpKind::Read(Buf::zeroed(4096).io());
            let (fd, offset) = (fd.clone(), 0);
            submit(Op { fd, offset, kind }, Aio::IoUring)
        };
        let work = thread.run(move || async move {
            let hung: Vec<_> = (0..600).map(|_| read(&silent)).collect();
            let limit = std::time::Duration::from_secs(20);
            let answered = tokio::time::timeout(limit, read(&file)).await;
            // All of them are at the end of the pipe now.
            drop(writer);
            for op in hung {
                assert_eq!(op.await, 0);
            }
            answered
        });
        assert_eq!(work.await.unwrap(), Ok(4096));
    }

    #[tokio::test]
    async fn a_panic_ends_the_task_and_not_the_thread() {
        let thread = IoThread::start("p").unwrap();
        let never: Option<()> = thread.run(|| async { panic!("a bug in a task") }).await;
        assert_eq!(never, None);
        let early = thread.run::<_, std::future::Ready<()>, ()>(|| panic!("a bug before it"));
        assert_eq!(early.await, None);
        assert_eq!(thread.run(|| async { 7 }).await, Some(7));
    }

    fn threads_named(name: &str) -> usize {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok())
            .filter(|comm| comm.trim_end() == name)
            .count()
    }

    fn descriptors_of(path: &std::path::Path) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| target == path)
            .count()
    }

    #[tokio::test]
    async fn the_last_handle_ends_the_thread_and_drains_its_ring() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let path = std::fs::canonicalize(file.path()).unwrap();
        let fd = Arc::new(OwnedFd::from(std::fs::File::open(&path).unwrap()));
        let thread = IoThread::start("lasting").unwrap();
        thread
            .run(move || async move {
                // Nobody waits for these.
                for i in 0..1000 {
                    let kind = OpKind::Read(Buf::zeroed(4096).io());
                    let (fd, offset) = (fd.clone(), (i % 256) * 4096);
                    drop(submit(Op { fd, offset, kind }, Aio::IoUring));
                }
            })
            .await;
        assert_eq!(threads_named("io-lasting"), 1);
        drop(thread);
        let mut patience = 10_000;
        while threads_named("io-lasting") > 0 || descriptors_of(&path) > 1 {
            patience -= 1;
            assert!(patience > 0, "the thread did not end");
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}
