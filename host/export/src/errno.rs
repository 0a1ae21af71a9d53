//! The one table that says how an error is told to a client.
//!
//! Pure data, used by every thread. Invariant: every [`Errno`] of the block
//! layer has an answer in every protocol, and NBD clients only ever see the
//! eight values that the protocol names.

use outport_block::Errno;

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

/// What an NBD client is told, before the rules that depend on the command
/// ([`crate::nbd::session::Operation::wire_errno`] applies those).
///
/// The protocol asks for `EDQUOT` and `EFBIG` to become `ENOSPC`.
impl From<Errno> for NbdErrno {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::Perm | Errno::Access | Errno::RoFs => Self::Perm,
            Errno::NoMem => Self::NoMem,
            Errno::Inval => Self::Inval,
            Errno::NoSpc | Errno::FBig => Self::NoSpc,
            Errno::Overflow => Self::Overflow,
            Errno::NotSup => Self::NotSup,
            Errno::Shutdown => Self::Shutdown,
            Errno::NoEnt
            | Errno::Io
            | Errno::Busy
            | Errno::Exist
            | Errno::BadMsg
            | Errno::Canceled => Self::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_one_of_the_eight_wire_values() {
        const WIRE: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];
        for errno in Errno::ALL {
            assert!(WIRE.contains(&NbdErrno::from(errno).wire()), "{errno:?}");
        }
        assert_eq!(NbdErrno::from(Errno::FBig), NbdErrno::NoSpc);
        assert_eq!(NbdErrno::from(Errno::RoFs), NbdErrno::Perm);
    }
}
