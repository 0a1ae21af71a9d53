//! System calls around FUSE that have no safe wrapper here: mounting, and the ioctls of
//! `/dev/fuse`.
//!
//! Control plane, on threads that may wait.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, u32)`.
const IOC_CLONE: libc::c_ulong = 0x8004_e500;

/// `FUSE_DEV_IOC_BACKING_OPEN`: `_IOW(229, 1, struct fuse_backing_map)`.
const IOC_BACKING_OPEN: libc::c_ulong = 0x4010_e501;

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// Flags of every mount: nothing in it is a program or a device that counts.
const MOUNT_FLAGS: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV;

/// Opens the device; the descriptor means nothing until it is mounted or cloned.
pub(super) fn open_device() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::open(c"/dev/fuse", flags, Mode::empty())?)
}

/// Another descriptor of the connection: requests are spread over both, and answers go back
/// through the one that a request came from.
pub(super) fn clone_device(connected: impl AsFd) -> io::Result<OwnedFd> {
    let clone = open_device()?;
    let mut source = u32::try_from(connected.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
    // SAFETY: the ioctl reads one `u32` through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(clone.as_raw_fd(), IOC_CLONE, &raw mut source) };
    done(result).map(|()| clone)
}

/// Makes a file known as one that the kernel may read itself; its number in this connection, which
/// keeps it open from now on.
pub(super) fn open_backing(connected: impl AsFd, file: impl AsFd) -> io::Result<i32> {
    let map = BackingMap {
        fd: file.as_fd().as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    let device = connected.as_fd().as_raw_fd();
    // SAFETY: the ioctl reads one `fuse_backing_map` through the pointer, which outlives the call.
    let id = unsafe { libc::ioctl(device, IOC_BACKING_OPEN, &raw const map) };
    done(id).map(|()| id)
}

/// Mounts on `target`, which may be a regular file.
pub(super) fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    read_only: bool,
    data: &CStr,
) -> io::Result<()> {
    let flags = MOUNT_FLAGS | if read_only { libc::MS_RDONLY } else { 0 };
    // SAFETY: all pointers are to strings with an end that outlive the call, which keeps none.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    done(result)
}

/// Detaches a mount now; it ends when nobody uses it any more. `abort`: whoever waits for an
/// answer gets an error at once.
pub(super) fn unmount(target: &CStr, abort: bool) -> io::Result<()> {
    let flags = libc::MNT_DETACH | if abort { libc::MNT_FORCE } else { 0 };
    // SAFETY: the pointer is to a string with an end that outlives the call.
    done(unsafe { libc::umount2(target.as_ptr(), flags) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
