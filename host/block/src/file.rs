//! A host file or device: the bottom of every graph.
//!
//! Used from any iothread. Ranges that are in the page cache are read inline
//! without waiting, small buffered writes too; everything else goes through the
//! engine. Invariant: with `direct`, every operation that reaches the kernel is
//! aligned; what is not, bounces here.

use std::fs::OpenOptions;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::ReadWriteFlags;
use tokio::sync::Mutex as AsyncMutex;

use crate::engine::buffer::{Buf, IoMem};
use crate::engine::{Aio, Op, OpKind, submit, syscalls};
use crate::error::{Error, ErrorKind, Result};
use crate::{ByteRange, Errno, strerror};

/// Larger buffered writes go to the ring: copying them inline would hold up the
/// loop, and the kernel's workers copy on another CPU.
const INLINE_WRITE_MAX: usize = 64 * 1024;

/// An inline write that took longer than this was throttled by the kernel.
const STALL: Duration = Duration::from_millis(5);

/// After a stall, writes of this file go to the ring for so long.
const STALL_PENALTY_MS: u64 = 1000;

/// What `blockdev-add driver=file` says.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Path as given.
    pub path: PathBuf,
    /// Open for reading only.
    pub read_only: bool,
    /// Fall back to reading only when writing is not permitted.
    pub auto_read_only: bool,
    /// `cache.direct`.
    pub direct: bool,
    /// `cache.no-flush`.
    pub no_flush: bool,
    /// Engine.
    pub aio: Aio,
    /// `discard=unmap`: discards punch holes.
    pub unmap: bool,
    /// Take image locks.
    pub locking: bool,
    /// A block or character device is expected.
    pub host_device: bool,
}

impl FileOptions {
    /// The defaults of QEMU's file driver for this path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            auto_read_only: false,
            direct: false,
            no_flush: false,
            aio: Aio::default(),
            unmap: false,
            locking: true,
            host_device: false,
        }
    }
}

/// An open host file.
#[derive(Debug)]
pub struct HostFile {
    fd: Arc<OwnedFd>,
    options: FileOptions,
    read_only: bool,
    device: bool,
    /// Direct I/O alignment; 1 when buffered.
    align: u32,
    len: AtomicU64,
    /// The file system knows `RWF_NOWAIT`.
    nowait: AtomicBool,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
    /// Milliseconds since `started` until which writes avoid the inline path.
    stalled_until: AtomicU64,
    started: Instant,
    /// Serialises read-modify-write of unaligned direct writes.
    rmw: AsyncMutex<()>,
    #[cfg(any(test, feature = "testing"))]
    trace: Option<Arc<crate::trace::Trace>>,
}

impl HostFile {
    /// Open as the options say.
    ///
    /// # Errors
    /// QEMU's sentences: `Could not open 'PATH': REASON`.
    pub fn open(options: FileOptions) -> Result<Self> {
        if options.aio == Aio::Native && !options.direct {
            return Err(Error::new(
                ErrorKind::Invalid,
                "aio=native was specified, but it requires cache.direct=on, which was not \
                 specified.",
            ));
        }
        let (file, read_only) = open_file(&options)?;
        let could_not = |e: std::io::Error| could_not_open(&options.path, &e);
        let meta = file.metadata().map_err(could_not)?;
        let kind = meta.file_type();
        let device = kind.is_block_device() || kind.is_char_device();
        if options.host_device && !device {
            return Err(Error::new(
                ErrorKind::Invalid,
                "'host_device' driver requires a device node",
            ));
        }
        if !options.host_device && !kind.is_file() && !device {
            return Err(Error::new(
                ErrorKind::Invalid,
                "'file' driver requires a regular file",
            ));
        }
        if !options.host_device && device {
            return Err(Error::new(
                ErrorKind::Invalid,
                "'file' driver requires '".to_owned()
                    + &options.path.display().to_string()
                    + "' to be a regular file",
            ));
        }
        let len = if device {
            device_len(&file).map_err(could_not)?
        } else {
            meta.len()
        };
        let align = if options.direct {
            direct_align(file.as_fd())
        } else {
            1
        };
        Ok(Self {
            fd: Arc::new(OwnedFd::from(file)),
            read_only,
            device,
            align,
            len: AtomicU64::new(len),
            nowait: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
            can_zero: AtomicBool::new(true),
            stalled_until: AtomicU64::new(0),
            started: Instant::now(),
            rmw: AsyncMutex::new(()),
            #[cfg(any(test, feature = "testing"))]
            trace: None,
            options,
        })
    }

    /// Record every write and flush.
    #[cfg(any(test, feature = "testing"))]
    #[must_use]
    pub fn with_trace(mut self, trace: Arc<crate::trace::Trace>) -> Self {
        self.trace = Some(trace);
        self
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.options.path
    }

    /// What it was opened with.
    #[must_use]
    pub const fn options(&self) -> &FileOptions {
        &self.options
    }

    /// Opened for reading only?
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Current length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// No bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignment that requests should have; 1 when any will do.
    #[must_use]
    pub const fn align(&self) -> u32 {
        self.align
    }

    /// The descriptor, for zero-copy sends.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Can the range be sent from the page cache without waiting?
    #[must_use]
    pub fn is_resident(&self, range: ByteRange) -> bool {
        !self.options.direct
            && range.end() <= self.len()
            && syscalls::is_resident(self.fd.as_fd(), range.offset(), range.len()) == Some(true)
    }

    /// Read without waiting; `None`: it would wait.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<std::result::Result<(), Errno>> {
        if self.options.direct || !self.nowait.load(Ordering::Relaxed) {
            return None;
        }
        let mut done = 0;
        while done < buf.len() {
            let iov = &mut [IoSliceMut::new(&mut buf[done..])];
            let at = offset + done as u64;
            match rustix::io::preadv2(&self.fd, iov, at, ReadWriteFlags::NOWAIT) {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Some(Ok(()));
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return None,
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {
                    self.nowait.store(false, Ordering::Relaxed);
                    return None;
                }
                Err(e) => return Some(Err(e.into())),
            }
        }
        Some(Ok(()))
    }

    /// Write to the page cache; `None`: larger than that, or it would wait.
    pub fn try_write(&self, offset: u64, buf: &[u8]) -> Option<std::result::Result<(), Errno>> {
        if self.options.direct || buf.len() > INLINE_WRITE_MAX || self.is_stalled() {
            return None;
        }
        #[cfg(any(test, feature = "testing"))]
        if self.trace.is_some() {
            return None;
        }
        let before = Instant::now();
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pwrite(&self.fd, &buf[done..], offset + done as u64) {
                Ok(0) => return Some(Err(Errno::Io)),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Some(Err(e.into())),
            }
        }
        if before.elapsed() > STALL {
            let until = self.now_ms() + STALL_PENALTY_MS;
            self.stalled_until.store(until, Ordering::Relaxed);
        }
        self.len
            .fetch_max(offset + buf.len() as u64, Ordering::AcqRel);
        Some(Ok(()))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn is_stalled(&self) -> bool {
        let until = self.stalled_until.load(Ordering::Relaxed);
        until != 0 && self.now_ms() < until
    }

    /// Read; bytes past the end are zero.
    pub(crate) async fn read(&self, offset: u64, mem: IoMem) -> std::result::Result<(), Errno> {
        if self.align > 1 && !self.is_aligned(offset, &mem) {
            return self.read_bounced(offset, &mem).await;
        }
        let mut done = 0;
        let len = mem.len();
        while done < len {
            let part = if done == 0 {
                mem.clone()
            } else {
                mem.part(done, len - done)
            };
            let n = self.op(offset + done as u64, OpKind::Read(part)).await?;
            if n == 0 {
                mem.part(done, len - done).fill_zero();
                break;
            }
            done += n;
            if self.align > 1 && done < len && done % self.align as usize != 0 {
                // A direct read ends unaligned only at the end of the file.
                mem.part(done, len - done).fill_zero();
                break;
            }
        }
        Ok(())
    }

    fn is_aligned(&self, offset: u64, mem: &IoMem) -> bool {
        let align = u64::from(self.align);
        offset.is_multiple_of(align) && mem.is_aligned(self.align as usize)
    }

    async fn read_bounced(&self, offset: u64, mem: &IoMem) -> std::result::Result<(), Errno> {
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let outer = range.align_out(u64::from(self.align));
        let buf = Buf::zeroed(usize::try_from(outer.len()).map_err(|_| Errno::NoMem)?);
        Box::pin(self.read(outer.offset(), buf.io())).await?;
        let skip = (offset - outer.offset()) as usize;
        mem.copy_from(&buf.as_slice()[skip..skip + mem.len()]);
        Ok(())
    }

    /// Write; `fua`: durable when done.
    pub(crate) async fn write(
        &self,
        offset: u64,
        mem: IoMem,
        fua: bool,
    ) -> std::result::Result<(), Errno> {
        if self.align > 1 && !self.is_aligned(offset, &mem) {
            return self.write_bounced(offset, &mem, fua).await;
        }
        let fua = fua && !self.options.no_flush;
        let mut done = 0;
        let len = mem.len();
        #[cfg(any(test, feature = "testing"))]
        let traced = self.trace.as_ref().map(|t| (t, t.write(offset, &mem)));
        while done < len {
            let part = if done == 0 {
                mem.clone()
            } else {
                mem.part(done, len - done)
            };
            match self
                .op(offset + done as u64, OpKind::Write(part, fua))
                .await?
            {
                0 => return Err(Errno::Io),
                n => done += n,
            }
        }
        #[cfg(any(test, feature = "testing"))]
        if let Some((trace, id)) = traced {
            trace.written(id);
        }
        self.len.fetch_max(offset + len as u64, Ordering::AcqRel);
        Ok(())
    }

    async fn write_bounced(
        &self,
        offset: u64,
        mem: &IoMem,
        fua: bool,
    ) -> std::result::Result<(), Errno> {
        let align = u64::from(self.align);
        let range = ByteRange::between(offset, offset + mem.len() as u64);
        let outer = range.align_out(align);
        let old_len = self.len();
        let mut buf = Buf::zeroed(usize::try_from(outer.len()).map_err(|_| Errno::NoMem)?);
        let _one_at_a_time = self.rmw.lock().await;
        if outer != range {
            Box::pin(self.read(outer.offset(), buf.io())).await?;
        }
        let skip = (offset - outer.offset()) as usize;
        mem.copy_to(&mut buf.as_mut_slice()[skip..skip + mem.len()]);
        Box::pin(self.write(outer.offset(), buf.io(), fua)).await?;
        if !self.device && outer.end() > old_len.max(range.end()) {
            // Direct I/O wrote whole blocks: do not leave the file longer than
            // the caller made it.
            self.set_len(old_len.max(range.end()))?;
        }
        Ok(())
    }

    /// Everything written so far becomes durable.
    pub(crate) async fn flush(&self) -> std::result::Result<(), Errno> {
        if self.options.no_flush || self.read_only {
            return Ok(());
        }
        #[cfg(any(test, feature = "testing"))]
        let traced = self.trace.as_ref().map(|t| (t, t.flush()));
        self.op(0, OpKind::Datasync).await?;
        #[cfg(any(test, feature = "testing"))]
        if let Some((trace, id)) = traced {
            trace.flushed(id);
        }
        Ok(())
    }

    /// Give the range back to the file system if discards are wanted.
    pub(crate) async fn discard(&self, range: ByteRange) -> std::result::Result<(), Errno> {
        if !self.options.unmap || !self.can_punch.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(mode, range).await {
            Err(Errno::NotSup) => {
                self.can_punch.store(false, Ordering::Relaxed);
                Ok(())
            }
            other => other,
        }
    }

    /// Zeroes by the file system, without writing them. `NotSup`: it cannot.
    pub(crate) async fn zero(
        &self,
        range: ByteRange,
        may_unmap: bool,
    ) -> std::result::Result<(), Errno> {
        if may_unmap && self.options.unmap && self.can_punch.load(Ordering::Relaxed) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            match self.fallocate(mode, range).await {
                Err(Errno::NotSup) => self.can_punch.store(false, Ordering::Relaxed),
                Ok(()) if !self.device && range.end() > self.len() => {
                    return self.set_len(range.end());
                }
                other => return other,
            }
        }
        if !self.can_zero.load(Ordering::Relaxed) {
            return Err(Errno::NotSup);
        }
        let result = self.fallocate(libc::FALLOC_FL_ZERO_RANGE, range).await;
        match result {
            Err(Errno::NotSup) => self.can_zero.store(false, Ordering::Relaxed),
            Ok(()) => {
                self.len.fetch_max(range.end(), Ordering::AcqRel);
            }
            Err(_) => {}
        }
        result
    }

    /// Drop the range's content, whatever `discard` says: the caller owns it.
    pub(crate) async fn punch(&self, range: ByteRange) -> std::result::Result<(), Errno> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, range).await
    }

    async fn fallocate(&self, mode: i32, range: ByteRange) -> std::result::Result<(), Errno> {
        #[cfg(any(test, feature = "testing"))]
        let traced = self.trace.as_ref().map(|t| (t, t.zero(range)));
        self.op(
            range.offset(),
            OpKind::Fallocate {
                mode,
                len: range.len(),
            },
        )
        .await?;
        #[cfg(any(test, feature = "testing"))]
        if let Some((trace, id)) = traced {
            trace.written(id);
        }
        Ok(())
    }

    /// Change the length.
    pub fn set_len(&self, len: u64) -> std::result::Result<(), Errno> {
        if self.device {
            return if len <= self.len() {
                Ok(())
            } else {
                Err(Errno::NotSup)
            };
        }
        #[cfg(any(test, feature = "testing"))]
        if let Some(trace) = &self.trace {
            trace.truncate(len);
        }
        rustix::fs::ftruncate(&self.fd, len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// The next data at or after `offset`; `None`: only a hole to the end.
    pub fn next_data(&self, offset: u64) -> std::result::Result<Option<ByteRange>, Errno> {
        use rustix::fs::{SeekFrom, seek};
        let len = self.len();
        if offset >= len {
            return Ok(None);
        }
        if self.device {
            return Ok(Some(ByteRange::between(offset, len)));
        }
        let start = match seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(_) => return Ok(Some(ByteRange::between(offset, len))),
        };
        let end = seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(len);
        Ok(Some(ByteRange::between(start, end.max(start + 1))))
    }

    async fn op(&self, offset: u64, kind: OpKind) -> std::result::Result<usize, Errno> {
        loop {
            let op = Op {
                fd: self.fd.clone(),
                offset,
                kind: kind.clone(),
            };
            let n = submit(op, self.options.aio).await;
            if n >= 0 {
                return Ok(n as usize);
            }
            if n != -libc::EINTR && n != -libc::EAGAIN {
                return Err(Errno::from_raw(-n));
            }
        }
    }
}

fn could_not_open(path: &Path, e: &std::io::Error) -> Error {
    let reason = strerror(e.raw_os_error().unwrap_or(libc::EIO));
    let kind = match e.kind() {
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::new(
        kind,
        format!("Could not open '{}': {reason}", path.display()),
    )
}

/// `read_only` of the result tells what was granted.
fn open_file(options: &FileOptions) -> Result<(std::fs::File, bool)> {
    let flags =
        libc::O_CLOEXEC | libc::O_NONBLOCK | if options.direct { libc::O_DIRECT } else { 0 };
    let open = |write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(&options.path)
    };
    match open(!options.read_only) {
        Ok(file) => Ok((file, options.read_only)),
        Err(e)
            if !options.read_only
                && options.auto_read_only
                && matches!(
                    e.raw_os_error(),
                    Some(libc::EACCES | libc::EROFS | libc::EPERM)
                ) =>
        {
            let file = open(false).map_err(|e| could_not_open(&options.path, &e))?;
            Ok((file, true))
        }
        Err(e) => Err(could_not_open(&options.path, &e)),
    }
}

fn device_len(file: &std::fs::File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

/// What the kernel says it needs; otherwise what reading tells.
fn direct_align(fd: BorrowedFd<'_>) -> u32 {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let asked = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(stat) = asked
        && stat.stx_dio_offset_align > 0
    {
        return stat
            .stx_dio_offset_align
            .max(stat.stx_dio_mem_align)
            .clamp(512, 4096);
    }
    let Ok(dup) = fd.try_clone_to_owned() else {
        return 4096;
    };
    let file = std::fs::File::from(dup);
    let mut buf = Buf::zeroed(4096);
    match file.read_at(&mut buf.as_mut_slice()[..512], 0) {
        Ok(_) => 512,
        Err(_) => 4096,
    }
}
