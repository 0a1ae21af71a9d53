//! Answers and notifications, as bytes.
//!
//! Pure.

use zerocopy::{Immutable, IntoBytes};

use super::wire::{InvalInode, OutHeader, ROOT, notify};

/// Bytes of the header.
pub(super) const HEADER: usize = size_of::<OutHeader>();

/// Bytes of the longest message that has no data.
const MESSAGE_MAX: usize = 128;

/// A message without data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    bytes: [u8; MESSAGE_MAX],
    len: usize,
}

impl Message {
    /// Success, and what it brings.
    pub(super) fn with<T: IntoBytes + Immutable>(unique: u64, body: &T) -> Self {
        Self::new(unique, 0, body.as_bytes())
    }

    /// Success, and nothing else.
    pub(super) fn done(unique: u64) -> Self {
        Self::new(unique, 0, &[])
    }

    /// Failure with this errno of the C library.
    pub(super) fn error(unique: u64, errno: i32) -> Self {
        Self::new(unique, -errno, &[])
    }

    /// The kernel asks for the attributes before it uses them again.
    pub(super) fn forget_attributes() -> Self {
        let body = InvalInode {
            ino: ROOT,
            offset: -1,
            len: 0,
        };
        Self::new(0, notify::INVAL_INODE, body.as_bytes())
    }

    fn new(unique: u64, error: i32, body: &[u8]) -> Self {
        let mut bytes = [0; MESSAGE_MAX];
        let len = HEADER + body.len();
        bytes[..HEADER].copy_from_slice(&header(unique, error, body.len()));
        bytes[HEADER..len].copy_from_slice(body);
        Self { bytes, len }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The header of an answer with so many bytes after it.
pub(super) fn header(unique: u64, error: i32, body: usize) -> [u8; HEADER] {
    let header = OutHeader {
        // A message is bounded far below: a megabyte of data.
        len: (HEADER + body) as u32,
        error,
        unique,
    };
    let mut bytes = [0; HEADER];
    bytes.copy_from_slice(header.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::wire::AttrOut;

    #[test]
    fn a_message_says_its_length() {
        let message = Message::with(9, &AttrOut::default());
        let bytes = message.as_bytes();
        assert_eq!(bytes.len(), 120);
        assert_eq!(bytes[..4], 120_u32.to_ne_bytes());
        let error = Message::error(9, 5);
        assert_eq!(error.as_bytes()[4..8], (-5_i32).to_ne_bytes());
    }
}
