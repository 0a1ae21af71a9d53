//! Mounting without the right to mount: `fusermount3`, which has it.
//!
//! Control plane, on threads that may wait. The program mounts and sends the descriptor of
//! `/dev/fuse` over a socket whose number it finds in `_FUSE_COMMFD` (fusermount3(1)).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

const PROGRAM: &str = "fusermount3";

/// Mounts over `path` and returns the device.
pub(super) fn mount(path: &Path, writable: bool, allow_other: bool) -> io::Result<OwnedFd> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The child inherits this one alone; a child of another thread may see it for a moment, and
    // has nothing to do with it.
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let mut options = "fsname=outport,subtype=outport,default_permissions".to_owned();
    options.push_str(if writable { ",rw" } else { ",ro" });
    if allow_other {
        options.push_str(",allow_other");
    }
    let child = Command::new(PROGRAM)
        .args(["-o", &options, "--"])
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(theirs);
    let received = receive(&ours);
    let output = child.wait_with_output()?;
    match received? {
        Some(device) if output.status.success() => {
            rustix::io::ioctl_fionbio(&device, true)?;
            Ok(device)
        }
        _ => Err(said(&output.stderr)),
    }
}

/// Takes the mount away, now; it ends when nobody uses it any more.
pub(super) fn unmount(path: &Path) -> io::Result<()> {
    let output = Command::new(PROGRAM)
        .args(["-u", "-z", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(said(&output.stderr))
}

fn said(stderr: &[u8]) -> io::Error {
    io::Error::other(String::from_utf8_lossy(stderr).trim().to_owned())
}

/// The descriptor that comes over the socket; `None`: it ended without.
fn receive(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fds)
}
