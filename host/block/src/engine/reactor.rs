//! Descriptors in a reactor. Whoever owns the value owns the descriptor.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Make the descriptor known to this thread's reactor.
///
/// # Errors
/// The system's: too many watches, or a descriptor that cannot be polled.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor while the
    // `AsyncFd` owns it; nothing replaces or closes it behind its back.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}
