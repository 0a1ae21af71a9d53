//! Requests of the kernel: bytes in, meaning out.
//!
//! Pure. Invariant: nothing here panics or allocates, whatever the bytes are; a request that comes
//! out lies within what ranges and lengths can say.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::wire::{
    FallocateIn, HandleIn, InHeader, InitFlags, InitIn, LseekIn, OpenIn, SetattrIn, TransferIn,
    opcode,
};

/// Bytes of the largest request without its data: header and SETATTR.
pub(super) const PREFIX: usize = 128;

/// Bytes in front of the data of a WRITE.
pub(super) const WRITE_PREFIX: usize = size_of::<InHeader>() + size_of::<TransferIn>();

/// The largest end of anything in a file.
const END_MAX: u64 = i64::MAX as u64;

/// A request, and who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    /// Names it in the answer.
    pub(super) unique: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) pid: u32,
    pub(super) operation: Operation,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: InitFlags,
    },
    Destroy,
    /// Nobody waits for an answer.
    Unanswered,
    Getattr,
    Setattr(SetattrIn),
    Open {
        flags: u32,
    },
    Release {
        fh: u64,
    },
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        size: u32,
    },
    /// `fsync`, and the flush when a descriptor is closed.
    Flush,
    Fallocate {
        mode: u32,
        offset: u64,
        len: u64,
    },
    /// Data or hole.
    Lseek {
        offset: u64,
        whence: u32,
    },
    Statfs,
    /// Something that a single file does not have.
    Unknown,
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// No header, or another length than it says: the stream makes no sense.
    Header,
    /// A body that cannot be: that request is refused.
    Body {
        /// Names it in the answer.
        unique: u64,
    },
}

/// The request of `received` bytes of which `prefix` are the first, at most [`PREFIX`].
pub(super) fn parse(prefix: &[u8], received: usize) -> Result<Request, Malformed> {
    let (header, body) = InHeader::read_from_prefix(prefix).map_err(|_| Malformed::Header)?;
    if header.len as usize != received {
        return Err(Malformed::Header);
    }
    let refused = Malformed::Body {
        unique: header.unique,
    };
    let data = received - prefix.len().min(received);
    let operation = operation(header.opcode, body, data).ok_or(refused)?;
    Ok(Request {
        unique: header.unique,
        uid: header.uid,
        gid: header.gid,
        pid: header.pid,
        operation,
    })
}

/// `after`: bytes beyond the prefix.
fn operation(code: u32, body: &[u8], after: usize) -> Option<Operation> {
    Some(match code {
        opcode::INIT => init(body)?,
        opcode::DESTROY => Operation::Destroy,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Operation::Unanswered,
        opcode::GETATTR => Operation::Getattr,
        opcode::SETATTR => Operation::Setattr(front(body)?),
        opcode::OPEN => Operation::Open {
            flags: front::<OpenIn>(body)?.flags,
        },
        opcode::RELEASE => Operation::Release {
            fh: front::<HandleIn>(body)?.fh,
        },
        opcode::READ => {
            let read: TransferIn = front(body)?;
            in_file(read.offset, u64::from(read.size))?;
            Operation::Read {
                offset: read.offset,
                size: read.size,
            }
        }
        opcode::WRITE => {
            let write: TransferIn = front(body)?;
            in_file(write.offset, u64::from(write.size))?;
            let data = body.len() - size_of::<TransferIn>() + after;
            if data != write.size as usize {
                return None;
            }
            Operation::Write {
                offset: write.offset,
                size: write.size,
            }
        }
        opcode::FSYNC | opcode::FLUSH => Operation::Flush,
        opcode::FALLOCATE => {
            let it: FallocateIn = front(body)?;
            in_file(it.offset, it.length)?;
            Operation::Fallocate {
                mode: it.mode,
                offset: it.offset,
                len: it.length,
            }
        }
        opcode::LSEEK => {
            let it: LseekIn = front(body)?;
            Operation::Lseek {
                offset: it.offset,
                whence: it.whence,
            }
        }
        opcode::STATFS => Operation::Statfs,
        _ => Operation::Unknown,
    })
}

fn init(body: &[u8]) -> Option<Operation> {
    let init: InitIn = front(body)?;
    let mut flags = u64::from(init.flags);
    if InitFlags::from_bits_retain(flags).contains(InitFlags::INIT_EXT) {
        let (high, _) = u32::read_from_prefix(&body[size_of::<InitIn>()..]).ok()?;
        flags |= u64::from(high) << 32;
    }
    Some(Operation::Init {
        major: init.major,
        minor: init.minor,
        max_readahead: init.max_readahead,
        flags: InitFlags::from_bits_retain(flags),
    })
}

fn front<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Option<T> {
    T::read_from_prefix(body).ok().map(|(value, _)| value)
}

fn in_file(offset: u64, len: u64) -> Option<u64> {
    offset.checked_add(len).filter(|end| *end <= END_MAX)
}

/// Any bytes, as a fuzz target sees them: `true` if they are a request.
///
/// # Panics
/// If a request comes out whose range no file can have, or a WRITE without its data.
#[must_use]
pub fn fuzz(bytes: &[u8]) -> bool {
    let prefix = &bytes[..bytes.len().min(PREFIX)];
    let Ok(request) = parse(prefix, bytes.len()) else {
        return false;
    };
    match request.operation {
        Operation::Read { offset, size } => assert!(offset + u64::from(size) <= END_MAX),
        Operation::Write { offset, size } => {
            assert!(offset + u64::from(size) <= END_MAX);
            assert_eq!(bytes.len(), WRITE_PREFIX + size as usize);
        }
        Operation::Fallocate { offset, len, .. } => assert!(offset + len <= END_MAX),
        _ => {}
    }
    true
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn message(opcode: u32, body: &[u8], data: usize) -> Vec<u8> {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len() + data) as u32,
            opcode,
            unique: 7,
            nodeid: 1,
            uid: 1,
            gid: 2,
            pid: 3,
            total_extlen: 0,
            padding: 0,
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(body);
        bytes.resize(bytes.len() + data, 0xaa);
        bytes
    }

    fn transfer(offset: u64, size: u32) -> TransferIn {
        TransferIn {
            fh: 1,
            offset,
            size,
            transfer_flags: 0,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        }
    }

    fn parsed(bytes: &[u8]) -> Result<Operation, Malformed> {
        parse(&bytes[..bytes.len().min(PREFIX)], bytes.len()).map(|it| it.operation)
    }

    #[test]
    fn a_write_has_exactly_its_data() {
        for data in [0, 1, 48, 49, 4096] {
            let body = transfer(512, data as u32);
            let bytes = message(opcode::WRITE, body.as_bytes(), data);
            let write = parsed(&bytes).unwrap();
            assert!(matches!(write, Operation::Write { offset: 512, size } if size == data as u32));
            let short = message(opcode::WRITE, body.as_bytes(), data + 1);
            assert_eq!(parsed(&short).unwrap_err(), Malformed::Body { unique: 7 });
        }
    }

    #[test]
    fn what_no_file_can_hold_is_refused() {
        let body = transfer(i64::MAX as u64, 1);
        let bytes = message(opcode::READ, body.as_bytes(), 0);
        assert_eq!(parsed(&bytes).unwrap_err(), Malformed::Body { unique: 7 });
    }

    #[test]
    fn bytes_that_are_cut_are_no_request() {
        let bytes = message(opcode::READ, transfer(0, 1).as_bytes(), 0);
        for len in 0..bytes.len() {
            assert_eq!(parsed(&bytes[..len]).unwrap_err(), Malformed::Header);
        }
    }

    #[test]
    fn both_halves_of_the_flags_of_init_count() {
        let mut body = InitIn {
            major: 7,
            minor: 40,
            max_readahead: 1,
            flags: 1 << 30 | 1,
        }
        .as_bytes()
        .to_vec();
        body.extend((1_u32 << 5).to_ne_bytes());
        let bytes = message(opcode::INIT, &body, 44);
        let Ok(Operation::Init { flags, .. }) = parsed(&bytes) else {
            panic!("no INIT");
        };
        assert!(flags.contains(InitFlags::PASSTHROUGH | InitFlags::ASYNC_READ));
    }
}
