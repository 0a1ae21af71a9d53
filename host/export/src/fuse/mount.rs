//! Mounting an export over a regular file, and taking it away again.
//!
//! Control plane, on threads that may wait: a path may lead anywhere. One mount is made at a time.
//! Invariants: a path that leads to an export of this process is recognised without a request to
//! it; only mounts that are provably ours are taken away.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use outport_block::file::served::{self, Served};
use outport_block::strerror;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};

use super::fusermount;
use super::mountinfo;
use super::sys;

/// Type of the file system: how our mounts are told from those of others.
const KIND: &CStr = c"fuse.outport";

/// Who sees the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowOther {
    /// Only the user that the daemon runs as.
    Off,
    /// Everybody, as the mode allows; a failure if that is not permitted.
    On,
    /// Everybody if that is permitted.
    Auto,
}

/// Why a file is not mounted over; QEMU's words.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum MountError {
    #[error("There already is a FUSE export on '{}'", .0.display())]
    Taken(PathBuf),
    #[error("Failed to stat '{}': {}", .0.display(), strerror(.1.raw_os_error().unwrap_or(0)))]
    Stat(PathBuf, io::Error),
    #[error("'{}' is not a regular file", .0.display())]
    NotRegular(PathBuf),
    #[error("Failed to mount FUSE session to export")]
    Mount(io::Error),
}

/// A mount that nobody serves yet.
#[derive(Debug)]
pub struct Mounted {
    pub(super) device: OwnedFd,
    pub(super) mount: Mount,
    /// Everybody may see the file.
    pub(super) allow_other: bool,
}

/// A mount of ours; taken away when dropped, if not before.
#[derive(Debug)]
pub(super) struct Mount {
    /// Paths that are mounted over, as they were given.
    _name: Name,
    served: Served,
    gone: bool,
}

impl Mount {
    /// Takes it away, wherever it was moved to meanwhile. `abort`: whoever waits for an answer
    /// gets an error. May wait for the server.
    pub(super) fn unmount(mut self, abort: bool) {
        self.take_away(abort);
    }

    fn take_away(&mut self, abort: bool) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        for entry in mountinfo::parse(&mounts).into_iter().rev() {
            if entry.device == self.served.device() {
                take_away(&entry.target, self.served.device(), abort);
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.take_away(true);
    }
}

fn take_away(target: &Path, device: (u32, u32), abort: bool) {
    let result = match open_path(target) {
        // Something else lies over it now, or it went by itself.
        Ok(fd) if device_of(&fd).ok() != Some(device) => return,
        Ok(fd) => sys::unmount(&proc_path(&fd), abort),
        Err(error) => Err(error),
    };
    let result = match result {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => fusermount::unmount(target),
        other => other,
    };
    if let Err(reason) = result {
        tracing::warn!(path = %target.display(), %reason, "cannot unmount");
    }
}

/// Mounts over `path`.
///
/// # Errors
/// In QEMU's words; what they leave out is in the log.
pub fn mount(path: &Path, writable: bool, allow_other: AllowOther) -> Result<Mounted, MountError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(name) = Name::take(path) else {
        return Err(MountError::Taken(path.to_owned()));
    };
    let over = look(path)?;
    let canonical = std::fs::read_link(OsStr::from_bytes(proc_path(&over).as_bytes()));
    let tries: &[bool] = match allow_other {
        AllowOther::Off => &[false],
        AllowOther::On => &[true],
        AllowOther::Auto => &[true, false],
    };
    let mut failed = io::Error::from_raw_os_error(libc::EINVAL);
    for allow_other in tries {
        match attach(&over, writable, *allow_other) {
            Ok(device) => {
                drop(over);
                let served = canonical
                    .and_then(|path| device_of(open_path(&path)?))
                    .map_err(MountError::Mount)?;
                return Ok(Mounted {
                    device,
                    mount: Mount {
                        _name: name,
                        served: served::serve(served),
                        gone: false,
                    },
                    allow_other: *allow_other,
                });
            }
            Err(error) => failed = error,
        }
    }
    tracing::warn!(path = %path.display(), reason = %failed, "cannot mount");
    Err(MountError::Mount(failed))
}

/// The file to mount over. A dead mount of an earlier daemon is taken away.
fn look(path: &Path) -> Result<OwnedFd, MountError> {
    let stat_failed = |error: io::Error| MountError::Stat(path.to_owned(), error);
    let mut stale_seen = false;
    loop {
        let fd = open_path(path).map_err(stat_failed)?;
        let device = device_of(&fd).map_err(stat_failed)?;
        if served::is_served(device) {
            return Err(MountError::Taken(path.to_owned()));
        }
        match rustix::fs::fstat(&fd) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                return Ok(fd);
            }
            Ok(_) => return Err(MountError::NotRegular(path.to_owned())),
            Err(rustix::io::Errno::NOTCONN) if !stale_seen && is_our_kind(device) => {
                stale_seen = true;
                tracing::info!(path = %path.display(), "unmounting what a dead daemon left");
                let target = proc_path(&fd);
                let gone = sys::unmount(&target, true);
                let gone = gone.or_else(|_| fusermount::unmount(path));
                gone.map_err(stat_failed)?;
            }
            Err(error) => return Err(stat_failed(error.into())),
        }
    }
}

/// Was it made by an outport daemon? Together with a connection that is dead this proves that
/// nobody needs it.
fn is_our_kind(device: (u32, u32)) -> bool {
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    mountinfo::parse(&mounts)
        .iter()
        .any(|entry| entry.device == device && entry.kind.as_bytes() == KIND.to_bytes())
}

fn attach(over: &OwnedFd, writable: bool, allow_other: bool) -> io::Result<OwnedFd> {
    let device = sys::open_device()?;
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    let mut data = format!(
        "fd={},rootmode=100600,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        uid.as_raw(),
        gid.as_raw(),
    );
    if allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data)?;
    match sys::mount(c"outport", &proc_path(over), KIND, !writable, &data) {
        Ok(()) => Ok(device),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let path = std::fs::read_link(OsStr::from_bytes(proc_path(over).as_bytes()))?;
            fusermount::mount(&path, writable, allow_other)
        }
        Err(error) => Err(error),
    }
}

/// Names the file without a request to whoever serves it.
fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The file system that it is in, from what the kernel has without asking.
fn device_of(fd: impl AsFd) -> io::Result<(u32, u32)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(fd, c"", flags, StatxFlags::TYPE)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

fn proc_path(fd: &OwnedFd) -> CString {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    CString::new(path).unwrap_or_default()
}

/// Paths that have exports, as they were given.
static NAMES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Name(PathBuf);

impl Name {
    fn take(path: &Path) -> Option<Self> {
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        if names.iter().any(|name| name == path) {
            return None;
        }
        names.push(path.to_owned());
        Some(Self(path.to_owned()))
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        names.retain(|name| *name != self.0);
    }
}
