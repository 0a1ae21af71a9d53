//! Descriptors that the daemon inherits by number: the one file with unsafe code.
//!
//! Used while the command line is carried out, by the control thread. Invariant: a number is
//! taken once, so that no descriptor has two owners.
#![allow(
    unsafe_code,
    reason = "a number becomes an owned descriptor here, and only here"
)]

use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Numbers below this are the standard streams.
const FIRST: RawFd = 3;

/// The numbers that were taken.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    taken: BTreeSet<RawFd>,
}

impl Inherited {
    /// Takes the socket with this number.
    ///
    /// # Errors
    /// QEMU's sentences for something that is no number or no socket.
    pub(crate) fn take_socket(&mut self, text: &str) -> Result<OwnedFd, String> {
        let Ok(number) = text.parse::<RawFd>() else {
            return Err(format!("Unable to parse FD number {text}"));
        };
        let no_socket = format!("File descriptor '{number}' is not a socket");
        if number < FIRST || self.taken.contains(&number) {
            return Err(no_socket);
        }
        // SAFETY: borrowed for the questions of the next line only; a number that is not open makes
        // them fail.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let is_socket = rustix::net::sockopt::socket_type(fd).is_ok() && is_foreign(fd);
        if !is_socket {
            return Err(no_socket);
        }
        self.taken.insert(number);
        // SAFETY: it is open, it came from our parent (not close-on-exec), so no object of this
        // process owns it, and `taken` says that it becomes owned only once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

/// Whatever this process opens is close-on-exec; what it inherited cannot be.
fn is_foreign(fd: BorrowedFd<'_>) -> bool {
    let flags = rustix::io::fcntl_getfd(fd);
    flags.is_ok_and(|flags| !flags.contains(rustix::io::FdFlags::CLOEXEC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_open_sockets_of_the_parent_are_taken() {
        let mut inherited = Inherited::default();
        let error = |inherited: &mut Inherited, text| inherited.take_socket(text).unwrap_err();
        assert_eq!(error(&mut inherited, "x"), "Unable to parse FD number x");
        assert_eq!(
            error(&mut inherited, "999"),
            "File descriptor '999' is not a socket"
        );
        assert_eq!(
            error(&mut inherited, "1"),
            "File descriptor '1' is not a socket"
        );
    }
}
