//! A host file or device: the bottom of every graph.
//!
//! Used from any iothread. Ranges that are in the page cache are read inline
//! without waiting, small buffered writes too; everything else goes through the
//! engine (`io`). Image locks are in `lock`. Invariant: with `direct`, every
//! operation that reaches the kernel is aligned; a change that was begun is
//! finished even if nobody waits for it.

mod flush;
mod holes;
mod io;
mod lock;
mod open;
mod reopen;
pub mod served;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as AsyncMutex, RwLock as AsyncRwLock};

use crate::engine::background::Finish;
use crate::engine::buffer::{IoMem, Iov};
use crate::engine::syscalls;
use crate::error::{Error, Result};
use crate::gate::{Gate, Pass};
use crate::trace::Trace;
use crate::{ByteRange, Errno};

pub use lock::{Locking, Permissions};
pub use open::FileOptions;
pub use reopen::FileMode;

/// Larger buffered writes go to the ring: copying them inline would hold up the
/// loop, and the kernel's workers copy on another CPU.
const INLINE_WRITE_MAX: usize = 64 * 1024;

/// An inline write that took longer than this was throttled by the kernel.
const STALL: Duration = Duration::from_millis(5);

/// After a stall, writes of this file go to the ring for so long.
const STALL_PENALTY_MS: u64 = 1000;

/// Discards since the file was opened.
#[derive(Debug, Default)]
struct DiscardCounts {
    done: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

/// Discards that a file was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discards {
    /// Those that were carried out.
    pub done: u64,
    /// Those that failed, or that the file system cannot do.
    pub failed: u64,
    /// Bytes of those that were carried out.
    pub bytes: u64,
}

/// An open host file. Clones share it.
#[derive(Clone, Debug)]
pub struct HostFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: Arc<OwnedFd>,
    /// As it was opened first; what can change since is below.
    options: FileOptions,
    read_only: AtomicBool,
    /// Why it is, though it was to be written.
    refused: Option<Error>,
    direct: AtomicBool,
    no_flush: AtomicBool,
    unmap: AtomicBool,
    /// Nothing is changed any more, whoever asks.
    frozen: AtomicBool,
    /// Whoever changes something is inside.
    changing: Gate,
    device: bool,
    /// Direct I/O alignment; 1 when buffered.
    align: AtomicU32,
    len: AtomicU64,
    /// The file system knows `RWF_NOWAIT`.
    nowait: AtomicBool,
    can_punch: AtomicBool,
    discards: DiscardCounts,
    data: holes::Data,
    can_zero: AtomicBool,
    can_reserve: AtomicBool,
    flusher: flush::Flusher,
    /// A flush failed: what the page cache held may be gone.
    lost: AtomicBool,
    /// Milliseconds since `started` until which writes avoid the inline path.
    stalled_until: AtomicU64,
    started: Instant,
    /// Serialises what changes parts of blocks: direct writes that read and write whole ones,
    /// zeroes and holes that end inside of one.
    rmw: AsyncMutex<()>,
    /// Shared by direct writes that make the file longer, exclusive for whoever
    /// makes it shorter.
    tail: AsyncRwLock<()>,
    locks: lock::Locks,
    /// Of a crash test; a daemon has none.
    trace: Option<Arc<Trace>>,
    /// Answers operations in the kernel's place.
    #[cfg(test)]
    kernel: Option<tests::Kernel>,
}

impl Inner {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn align(&self) -> u32 {
        self.align.load(Ordering::Acquire)
    }

    fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    /// Enter to change something.
    async fn change(&self) -> std::result::Result<Pass<'_>, Errno> {
        let pass = self.changing.enter().await;
        match self.is_frozen() {
            true => Err(Errno::Perm),
            false => Ok(pass),
        }
    }

    /// Does a write of this length go to the page cache at once, on this thread?
    fn is_inline(&self, len: usize) -> bool {
        if self.trace.is_some() {
            return false;
        }
        !self.is_direct() && len <= INLINE_WRITE_MAX && !self.is_stalled()
    }

    /// An inline write took so long.
    fn took(&self, time: Duration) {
        if time > STALL {
            let until = self.now_ms() + STALL_PENALTY_MS;
            self.stalled_until.store(until, Ordering::Relaxed);
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn is_stalled(&self) -> bool {
        let until = self.stalled_until.load(Ordering::Relaxed);
        until != 0 && self.now_ms() < until
    }
}

impl HostFile {
    /// Open as the options say.
    ///
    /// # Errors
    /// QEMU's sentences: `Could not open 'PATH': REASON`.
    pub fn open(options: FileOptions) -> Result<Self> {
        let opened = open::open(&options)?;
        let fd = Arc::new(OwnedFd::from(opened.file));
        Ok(Self(Arc::new(Inner {
            locks: lock::Locks::new(options.locking, fd.as_fd()),
            fd,
            read_only: AtomicBool::new(opened.read_only),
            refused: opened.refused,
            direct: AtomicBool::new(options.direct),
            no_flush: AtomicBool::new(options.no_flush),
            unmap: AtomicBool::new(options.unmap),
            frozen: AtomicBool::new(false),
            changing: Gate::default(),
            device: opened.device,
            align: AtomicU32::new(opened.align),
            len: AtomicU64::new(opened.len),
            nowait: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
            discards: DiscardCounts::default(),
            data: holes::Data::default(),
            can_zero: AtomicBool::new(true),
            can_reserve: AtomicBool::new(true),
            flusher: flush::Flusher::default(),
            lost: AtomicBool::new(false),
            stalled_until: AtomicU64::new(0),
            started: Instant::now(),
            rmw: AsyncMutex::new(()),
            tail: AsyncRwLock::new(()),
            trace: None,
            #[cfg(test)]
            kernel: None,
            options,
        })))
    }

    /// Record every write and flush: for crash tests.
    #[doc(hidden)]
    #[must_use]
    pub fn with_trace(mut self, trace: Arc<Trace>) -> Self {
        // Nobody else has a freshly opened file.
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.trace = Some(trace);
        }
        self
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.options.path
    }

    /// What it was opened with.
    #[must_use]
    pub fn options(&self) -> &FileOptions {
        &self.0.options
    }

    /// A device, whose length is given?
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.0.device
    }

    /// Opened for reading only?
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.0.read_only.load(Ordering::Acquire)
    }

    /// Why it is, though it was to be written (`auto-read-only`).
    #[must_use]
    pub fn why_read_only(&self) -> Option<&Error> {
        self.0.refused.as_ref().filter(|_| self.is_read_only())
    }

    /// The discards that it was given.
    #[must_use]
    pub fn discards(&self) -> Discards {
        let counts = &self.0.discards;
        Discards {
            done: counts.done.load(Ordering::Relaxed),
            failed: counts.failed.load(Ordering::Relaxed),
            bytes: counts.bytes.load(Ordering::Relaxed),
        }
    }

    /// Current length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len.load(Ordering::Acquire)
    }

    /// No bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignment that requests should have; 1 when any will do.
    #[must_use]
    pub fn align(&self) -> u32 {
        self.0.align()
    }

    /// The descriptor, for zero-copy sends.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// Can the range be sent from the page cache without waiting?
    #[must_use]
    pub fn is_resident(&self, range: ByteRange) -> bool {
        !self.0.is_direct()
            && range.end() <= self.len()
            && syscalls::is_resident(self.0.fd.as_fd(), range.offset(), range.len()) == Some(true)
    }

    /// Read without waiting; `None`: it would wait.
    pub(crate) fn try_read(&self, offset: u64, iov: Iov<'_>) -> Tried {
        if self.0.is_direct() || !self.0.nowait.load(Ordering::Relaxed) {
            return None;
        }
        let mut done = 0;
        while done < iov.len() {
            let rest = iov.part(done, iov.len() - done);
            match syscalls::read_nowait(self.0.fd.as_fd(), offset + done as u64, rest) {
                Ok(0) => {
                    rest.fill_zero();
                    return Some(Ok(()));
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return None,
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {
                    self.0.nowait.store(false, Ordering::Relaxed);
                    return None;
                }
                Err(e) => return Some(Err(e.into())),
            }
        }
        Some(Ok(()))
    }

    /// Write to the page cache; `None`: larger than that, or it would wait.
    pub(crate) fn try_write(&self, offset: u64, iov: Iov<'_>) -> Tried {
        if !self.0.is_inline(iov.len()) {
            return None;
        }
        let _pass = self.0.changing.try_enter()?;
        if self.0.is_frozen() {
            return Some(Err(Errno::Perm));
        }
        let before = Instant::now();
        let mut done = 0;
        while done < iov.len() {
            let rest = iov.part(done, iov.len() - done);
            match syscalls::write(self.0.fd.as_fd(), offset + done as u64, rest) {
                Ok(0) => return Some(Err(Errno::Io)),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Some(Err(e.into())),
            }
        }
        self.0.took(before.elapsed());
        self.0
            .len
            .fetch_max(offset + iov.len() as u64, Ordering::AcqRel);
        Some(Ok(()))
    }

    /// Read; bytes past the end are zero.
    pub(crate) async fn read(&self, offset: u64, mem: IoMem) -> std::result::Result<(), Errno> {
        self.0.read(offset, mem).await
    }

    /// Write; `fua`: durable when done.
    pub(crate) fn write(&self, offset: u64, mem: IoMem, fua: bool) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.write(offset, mem, fua).await
        })
    }

    /// Everything written so far becomes durable.
    pub(crate) fn flush(&self) -> Change {
        let inner = self.0.clone();
        // To its end: another flush must not ask the kernel while this one does.
        Finish::new(async move { inner.flush().await })
    }

    /// Give the range back to the file system if discards are wanted.
    pub(crate) fn discard(&self, range: ByteRange) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.discard(range).await
        })
    }

    /// Zeroes by the file system, without writing them. `NotSup`: it cannot.
    pub(crate) fn zero(&self, range: ByteRange, may_unmap: bool) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.zero(range, may_unmap).await
        })
    }

    /// Space for the range, so that writing there needs none; the content stays. `NotSup`: only
    /// writing tells.
    pub(crate) fn reserve(&self, range: ByteRange) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.reserve(range).await
        })
    }

    /// Make it at least `len` bytes long.
    pub(crate) fn grow(&self, len: u64) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.grow(len).await
        })
    }

    /// Change the length.
    pub(crate) fn set_len(&self, len: u64) -> Change {
        let inner = self.0.clone();
        Finish::new(async move {
            let _pass = inner.change().await?;
            inner.set_len(len).await
        })
    }
}

/// What was done without waiting, if anything.
type Tried = Option<std::result::Result<(), Errno>>;

/// A change of a file that was asked for.
type Change = Finish<std::result::Result<(), Errno>>;
