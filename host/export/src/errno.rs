//! The one table that says how an error is told to a client.
//!
//! Pure data, used by every thread. Invariant: every [`Errno`] has an answer in every protocol,
//! and NBD clients only ever see the eight values that the protocol names.

/// Why a request failed, as the data path says it: a small `Copy` value, no text, no source.
///
/// The discriminants are Linux's numbers, so that a system call's error converts without loss
/// of meaning and FUSE can answer with the number itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Errno {
    /// Operation not permitted.
    Perm = 1,
    /// No such file: an image's own file vanished.
    NoEnt = 2,
    /// Input/output error; also whatever has no better name.
    Io = 5,
    /// Try again: a resource is exhausted for the moment.
    Again = 11,
    /// Out of memory.
    NoMem = 12,
    /// Permission denied.
    Access = 13,
    /// Device or resource busy.
    Busy = 16,
    /// Invalid argument.
    Inval = 22,
    /// File too large.
    FBig = 27,
    /// No space left on device.
    NoSpc = 28,
    /// Read-only file system.
    RoFs = 30,
    /// Value too large.
    Overflow = 75,
    /// Operation not supported.
    NotSup = 95,
    /// The export is being shut down.
    Shutdown = 108,
    /// Timed out.
    TimedOut = 110,
    /// Quota exceeded.
    DQuot = 122,
    /// Cancelled.
    Cancelled = 125,
}

/// The eight errors that exist on an NBD wire ("Error values" of the protocol document).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum NbdErrno {
    /// Operation not permitted.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device.
    NoSpc = 28,
    /// Value too large.
    Overflow = 75,
    /// Operation not supported.
    NotSup = 95,
    /// Server is in the process of being shut down.
    Shutdown = 108,
}

impl NbdErrno {
    /// The number as it travels.
    #[must_use]
    pub const fn wire(self) -> u32 {
        self as u32
    }
}

impl Errno {
    /// Every value, for tests and for tables.
    pub const ALL: [Errno; 17] = [
        Errno::Perm,
        Errno::NoEnt,
        Errno::Io,
        Errno::Again,
        Errno::NoMem,
        Errno::Access,
        Errno::Busy,
        Errno::Inval,
        Errno::FBig,
        Errno::NoSpc,
        Errno::RoFs,
        Errno::Overflow,
        Errno::NotSup,
        Errno::Shutdown,
        Errno::TimedOut,
        Errno::DQuot,
        Errno::Cancelled,
    ];

    /// Linux's number.
    #[must_use]
    pub const fn raw(self) -> u16 {
        self as u16
    }

    /// The value for a Linux number. What we have no name for is an I/O error: a client cannot
    /// do anything better about it.
    #[must_use]
    pub fn from_raw(number: u16) -> Errno {
        Errno::ALL
            .into_iter()
            .find(|errno| errno.raw() == number)
            .unwrap_or(Errno::Io)
    }

    /// What an NBD client is told, before the rules that depend on the command
    /// ([`crate::nbd::session::Operation::wire_errno`] applies those).
    ///
    /// The protocol asks for `EDQUOT` and `EFBIG` to become `ENOSPC`.
    #[must_use]
    pub const fn nbd(self) -> NbdErrno {
        match self {
            Errno::Perm | Errno::Access | Errno::RoFs => NbdErrno::Perm,
            Errno::NoMem => NbdErrno::NoMem,
            Errno::Inval => NbdErrno::Inval,
            Errno::NoSpc | Errno::DQuot | Errno::FBig => NbdErrno::NoSpc,
            Errno::Overflow => NbdErrno::Overflow,
            Errno::NotSup => NbdErrno::NotSup,
            Errno::Shutdown => NbdErrno::Shutdown,
            Errno::Io
            | Errno::NoEnt
            | Errno::Again
            | Errno::Busy
            | Errno::TimedOut
            | Errno::Cancelled => NbdErrno::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The match in `nbd` is total by construction; this holds the *image* to the eight values.
    #[test]
    fn every_errno_is_one_of_the_eight_on_the_wire() {
        for errno in Errno::ALL {
            assert!(
                [1, 5, 12, 22, 28, 75, 95, 108].contains(&errno.nbd().wire()),
                "{errno:?}"
            );
        }
    }

    #[test]
    fn every_linux_number_has_an_answer() {
        for number in 0..=u16::MAX {
            let errno = Errno::from_raw(number);
            assert!(errno.raw() == number || errno == Errno::Io);
        }
        for errno in Errno::ALL {
            assert_eq!(Errno::from_raw(errno.raw()), errno);
        }
    }

    #[test]
    fn full_disks_of_every_kind_are_enospc() {
        for number in [27, 28, 122] {
            assert_eq!(Errno::from_raw(number).nbd(), NbdErrno::NoSpc);
        }
        assert_eq!(Errno::from_raw(30).nbd(), NbdErrno::Perm);
    }
}
