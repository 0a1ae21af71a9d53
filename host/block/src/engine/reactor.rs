//! Descriptors in a reactor. Whoever owns the value owns the descriptor.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What wakes those who read: some devices say that they are gone by an error alone.
pub const READABLE: Interest = Interest::READABLE.add(Interest::ERROR);

/// Make the descriptor known to this thread's reactor.
///
/// # Errors
/// The system's: too many watches, or a descriptor that cannot be polled.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor while the
    // `AsyncFd` owns it; nothing replaces or closes it behind its back.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// The same for a descriptor that is only waited for to be readable, or to fail.
///
/// # Errors
/// The system's: too many watches, or a descriptor that cannot be polled.
pub fn register_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as above.
    unsafe { AsyncFd::register_with_interest(fd, READABLE) }.map_err(Into::into)
}
