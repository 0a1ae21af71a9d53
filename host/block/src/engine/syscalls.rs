//! System calls that no safe wrapper offers: OFD byte locks, page-cache residency, and transfers
//! to and from memory that is not ours alone. Stateless; any thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::buffer::Iov;

/// Which lock to take on one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Shared (read) lock.
    Shared,
    /// Give it up.
    Unlock,
}

fn flock(kind: libc::c_int, at: u64) -> libc::flock {
    // SAFETY: `flock` is plain data for which all zeroes is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at as libc::off_t;
    lock.l_len = 1;
    lock
}

/// Lock or unlock the byte `at` for this open file description, without
/// waiting.
pub(crate) fn lock_byte(fd: BorrowedFd<'_>, at: u64, kind: LockKind) -> io::Result<()> {
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let lock = flock(kind, at);
    // SAFETY: `lock` is a valid `struct flock` for the time of the call.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Does another open file description hold a lock on the byte `at`?
pub(crate) fn is_locked_by_other(fd: BorrowedFd<'_>, at: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, at);
    // SAFETY: `lock` is a valid `struct flock` that the kernel may fill.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if r == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Puts what `new` is open on behind the number of `fd`, at once: operations that began go on with
/// what was there before.
pub(crate) fn replace(fd: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open for the time of the call. The number of `fd` stays open and
    // its owner's; it only means another open file.
    let r = unsafe { libc::dup3(new.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) };
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Vectors of one call: what a guest's request usually has, and more is another call.
const VECTORS: usize = 32;

/// Read what there is without waiting.
pub(crate) fn read_nowait(fd: BorrowedFd<'_>, offset: u64, iov: Iov<'_>) -> Result<usize, Errno> {
    iov.expect_fillable();
    transfer(iov, |vectors, count| {
        // SAFETY: the vectors describe memory that may be filled (`Piece::new`).
        unsafe {
            libc::preadv2(
                fd.as_raw_fd(),
                vectors,
                count,
                offset as libc::off_t,
                libc::RWF_NOWAIT,
            )
        }
    })
}

/// Write; the page cache takes it.
pub(crate) fn write(fd: BorrowedFd<'_>, offset: u64, iov: Iov<'_>) -> Result<usize, Errno> {
    transfer(iov, |vectors, count| {
        // SAFETY: the vectors describe memory that can be read.
        unsafe { libc::pwritev(fd.as_raw_fd(), vectors, count, offset as libc::off_t) }
    })
}

fn transfer(
    iov: Iov<'_>,
    call: impl FnOnce(*const libc::iovec, libc::c_int) -> libc::ssize_t,
) -> Result<usize, Errno> {
    let none = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let mut vectors = [none; VECTORS];
    let count = iov.vectors(&mut vectors);
    match call(vectors.as_ptr(), count as libc::c_int) {
        n if n >= 0 => Ok(n as usize),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// `_IO(0x12, 94)`, the same on every architecture that we run on.
const BLKROGET: libc::Ioctl = 0x125e;

/// Whether a block device refuses writes, though it may be open for them. `false`: it is none.
pub(crate) fn is_read_only_device(fd: BorrowedFd<'_>) -> bool {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the kernel writes one int, and only if the descriptor is a block device's.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), BLKROGET, &raw mut read_only) };
    r == 0 && read_only != 0
}

#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// Linux 6.5; the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// Is every page of the range in the page cache? `None`: the kernel cannot say.
pub(crate) fn is_resident(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Option<bool> {
    const PAGE: u64 = 4096;
    let first = offset / PAGE;
    let last = (offset + len).div_ceil(PAGE);
    let range = CachestatRange {
        off: first * PAGE,
        len: (last - first) * PAGE,
    };
    let mut stat = Cachestat::default();
    // SAFETY: both structures have the kernel's layout and live through the
    // call; an unknown system call fails with ENOSYS.
    let r = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    (r == 0).then(|| stat.nr_cache >= last - first)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn locks_conflict_between_descriptions_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let a = std::fs::File::open(file.path()).unwrap();
        let b = std::fs::File::open(file.path()).unwrap();
        lock_byte(a.as_fd(), 101, LockKind::Shared).unwrap();
        assert!(is_locked_by_other(b.as_fd(), 101).unwrap());
        assert!(!is_locked_by_other(a.as_fd(), 101).unwrap());
        lock_byte(a.as_fd(), 101, LockKind::Unlock).unwrap();
        assert!(!is_locked_by_other(b.as_fd(), 101).unwrap());
    }

    #[test]
    fn freshly_written_pages_are_resident() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        if let Some(resident) = is_resident(file.as_fd(), 1, 9_000) {
            assert!(resident);
        }
    }
}
