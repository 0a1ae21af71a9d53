//! One kernel operation: what it does.
//!
//! The same [`Op`] runs on the ring or on the pool; the result is delivered
//! through a `completion`, which both sides share, so that the waiting future may
//! be dropped at any time.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::buffer::IoMem;

/// What to do.
#[derive(Clone, Debug)]
pub(crate) enum OpKind {
    /// Read into the memory.
    Read(IoMem),
    /// Write the memory; `dsync`: durable when done.
    Write(IoMem, bool),
    /// fdatasync(2).
    Datasync,
    /// fallocate(2) of `len` bytes.
    Fallocate { mode: i32, len: u64 },
}

/// One operation on one file.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) offset: u64,
    pub(crate) kind: OpKind,
}

impl Op {
    /// Do it now, on this thread. Bytes transferred or `-errno`.
    pub(crate) fn run_blocking(&self) -> i32 {
        let fd = self.fd.as_raw_fd();
        // Offsets come from `ByteRange`, whose end fits `off_t`.
        let offset = self.offset as libc::off_t;
        loop {
            let done = match &self.kind {
                OpKind::Read(mem) => {
                    let iov = mem.iovecs();
                    // SAFETY: the iovecs point into memory kept alive by `mem`,
                    // which the operation owns until its result is delivered.
                    unsafe { libc::preadv(fd, iov.as_ptr(), iov.len() as i32, offset) }
                }
                OpKind::Write(mem, dsync) => {
                    let iov = mem.iovecs();
                    let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                    // SAFETY: as above.
                    unsafe { libc::pwritev2(fd, iov.as_ptr(), iov.len() as i32, offset, flags) }
                }
                // SAFETY: no memory is involved.
                OpKind::Datasync => unsafe { libc::fdatasync(fd) as isize },
                OpKind::Fallocate { mode, len } => {
                    // SAFETY: no memory is involved.
                    unsafe { libc::fallocate(fd, *mode, offset, *len as libc::off_t) as isize }
                }
            };
            if done >= 0 {
                return i32::try_from(done).unwrap_or(i32::MAX);
            }
            let errno = std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO);
            if errno != libc::EINTR {
                return -errno;
            }
        }
    }
}
