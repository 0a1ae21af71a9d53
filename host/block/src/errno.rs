//! The data path's error: what every front-end can say to a client.

use std::fmt;

/// A failed request. `Copy`, one byte, no context: the context belongs to the
/// log line of whoever knows it. NBD, virtio-blk and FUSE map it in one table
/// each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are POSIX's")]
pub enum Errno {
    Perm,
    NoEnt,
    Io,
    NoMem,
    Access,
    Busy,
    Exist,
    Inval,
    FBig,
    NoSpc,
    RoFs,
    NotSup,
    Overflow,
    BadMsg,
    Shutdown,
    Canceled,
}

impl Errno {
    /// All of them, for totality tests of the front-ends' tables.
    pub const ALL: [Self; 16] = [
        Self::Perm,
        Self::NoEnt,
        Self::Io,
        Self::NoMem,
        Self::Access,
        Self::Busy,
        Self::Exist,
        Self::Inval,
        Self::FBig,
        Self::NoSpc,
        Self::RoFs,
        Self::NotSup,
        Self::Overflow,
        Self::BadMsg,
        Self::Shutdown,
        Self::Canceled,
    ];

    /// From a system call's errno; what has no name here is an I/O error.
    #[must_use]
    pub const fn from_raw(raw: i32) -> Self {
        match raw {
            libc::EPERM => Self::Perm,
            libc::ENOENT => Self::NoEnt,
            libc::ENOMEM => Self::NoMem,
            libc::EACCES => Self::Access,
            libc::EBUSY => Self::Busy,
            libc::EEXIST => Self::Exist,
            libc::EINVAL => Self::Inval,
            libc::EFBIG => Self::FBig,
            libc::ENOSPC | libc::EDQUOT => Self::NoSpc,
            libc::EROFS => Self::RoFs,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => Self::NotSup,
            libc::EOVERFLOW => Self::Overflow,
            libc::EBADMSG => Self::BadMsg,
            libc::ESHUTDOWN => Self::Shutdown,
            libc::ECANCELED => Self::Canceled,
            _ => Self::Io,
        }
    }

    /// The C library's number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        match self {
            Self::Perm => libc::EPERM,
            Self::NoEnt => libc::ENOENT,
            Self::Io => libc::EIO,
            Self::NoMem => libc::ENOMEM,
            Self::Access => libc::EACCES,
            Self::Busy => libc::EBUSY,
            Self::Exist => libc::EEXIST,
            Self::Inval => libc::EINVAL,
            Self::FBig => libc::EFBIG,
            Self::NoSpc => libc::ENOSPC,
            Self::RoFs => libc::EROFS,
            Self::NotSup => libc::EOPNOTSUPP,
            Self::Overflow => libc::EOVERFLOW,
            Self::BadMsg => libc::EBADMSG,
            Self::Shutdown => libc::ESHUTDOWN,
            Self::Canceled => libc::ECANCELED,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // QEMU prints strerror(3): the texts are part of its error sentences.
        f.write_str(&strerror(self.raw()))
    }
}

impl std::error::Error for Errno {}

impl From<rustix::io::Errno> for Errno {
    fn from(e: rustix::io::Errno) -> Self {
        Self::from_raw(e.raw_os_error())
    }
}

impl From<std::io::Error> for Errno {
    fn from(e: std::io::Error) -> Self {
        e.raw_os_error().map_or(Self::Io, Self::from_raw)
    }
}

/// The C library's words for an errno, without Rust's "(os error N)" tail.
#[must_use]
pub fn strerror(raw: i32) -> String {
    let text = std::io::Error::from_raw_os_error(raw).to_string();
    match text.rfind(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_numbers_round_trip() {
        for e in Errno::ALL {
            assert_eq!(Errno::from_raw(e.raw()), e);
        }
    }

    #[test]
    fn display_is_strerror() {
        assert_eq!(Errno::NoEnt.to_string(), "No such file or directory");
    }
}
