//! The check of a request: which it may be, and what the others are told.
//!
//! Runs on the connection's iothread for every request; neither allocates nor locks. Invariant:
//! every header has an answer, and the answer accounts for every byte of payload behind it, so
//! that the stream stays in sync. NBD proto: "Request types", "Error values".

use outport_block::Errno;

use super::{Checked, ContextMask, Operation, Reject, Session};
use crate::errno::NbdErrno;
use crate::nbd::limits::SWALLOW_MAX;
use crate::nbd::reply::ReplyMode;
use crate::nbd::wire::{Command, CommandFlags, Request, TransmissionFlags};

/// An error and its text; the payload is accounted for by the caller.
type Refusal = (NbdErrno, &'static str);

const READ_ONLY: Refusal = (NbdErrno::Perm, "Export is read-only");
const UNKNOWN_COMMAND: Refusal = (NbdErrno::Inval, "Unknown command");
const NOT_OFFERED: Refusal = (NbdErrno::Inval, "Command was not offered by this export");
const BAD_FLAGS: Refusal = (
    NbdErrno::Inval,
    "Command flags were not offered or do not apply",
);
const TOO_LONG: Refusal = (NbdErrno::Inval, "Request exceeds the maximum payload size");
const TOO_LONG_UNFRAGMENTED: Refusal = (
    NbdErrno::Overflow,
    "Request is too long to answer in one chunk",
);
const UNALIGNED: Refusal = (
    NbdErrno::Inval,
    "Request is not aligned to the minimum block size",
);
const PAST_END: Refusal = (NbdErrno::Inval, "Request is past the end of the export");
const NO_SPACE: Refusal = (NbdErrno::NoSpc, "Write is past the end of the export");
const FLUSH_RANGE: Refusal = (NbdErrno::Inval, "Flush takes no offset and no length");
const NO_CONTEXTS: Refusal = (NbdErrno::Inval, "No metadata context was negotiated");
const EMPTY_STATUS: Refusal = (NbdErrno::Inval, "Block status of an empty range");
const INACTIVE: Refusal = (NbdErrno::Perm, "Export is inactive");
const BAD_STATUS_PAYLOAD: Refusal = (NbdErrno::Inval, "Malformed block status payload");

impl Session {
    /// Whether this request may be carried out on an export that now has `size` bytes.
    ///
    /// # Errors
    /// What to do instead.
    #[inline]
    pub fn check(&self, request: &Request, size: u64) -> Result<Checked, Reject> {
        let payload = self.payload_of(request)?;
        self.judge(request, size, payload)
            .map_err(|refusal| answer(refusal, payload))
    }

    /// The second half of the check for [`Operation::FilteredStatus`], once `payload` arrived:
    /// the length of the range, then the ids of the contexts to report.
    ///
    /// # Errors
    /// What to answer; there is nothing left to swallow.
    pub fn check_status_payload(
        &self,
        request: &Request,
        payload: &[u8],
        size: u64,
    ) -> Result<Checked, Reject> {
        self.judge_status_payload(request, payload, size)
            .map_err(|refusal| answer(refusal, 0))
    }

    /// The refusal of what was checked, on an export whose node is inactive: only reads are served,
    /// as by QEMU.
    ///
    /// # Errors
    /// What to answer, and what to swallow before.
    pub fn check_inactive(checked: Checked) -> Result<Checked, Reject> {
        match checked.operation {
            Operation::Read { .. } | Operation::Disconnect => Ok(checked),
            _ => Err(answer(INACTIVE, checked.payload)),
        }
    }

    /// How many bytes follow the header, whether or not the request is any good.
    #[inline]
    fn payload_of(&self, request: &Request) -> Result<u64, Reject> {
        // WRITE always has a payload. With extended headers the client must also say so with
        // PAYLOAD_LEN; one that forgets is taken to mean it, because the other reading would
        // interpret its data as requests.
        let extended = self.mode == ReplyMode::Extended;
        let declared = request.command == Command::WRITE
            || extended
                && request.flags.contains(CommandFlags::PAYLOAD_LEN)
                && request.command != Command::DISC;
        if !declared {
            return Ok(0);
        }
        // Compact clients may never have seen our maximum, and older ones exceed it by accident:
        // they get an answer. Extended clients know better ("SHOULD disconnect").
        let bound = if extended {
            self.payload_max
        } else {
            SWALLOW_MAX
        };
        if request.length > bound {
            return Err(Reject::Disconnect(request.length));
        }
        Ok(request.length)
    }

    #[inline]
    fn judge(&self, request: &Request, size: u64, payload: u64) -> Result<Checked, Refusal> {
        let flags = request.flags;
        let fua = flags.contains(CommandFlags::FUA);
        let operation = match request.command {
            Command::READ => {
                self.flags_ok(request)?;
                let df = flags.contains(CommandFlags::DF);
                if request.length > self.payload_max {
                    return Err(if df { TOO_LONG_UNFRAGMENTED } else { TOO_LONG });
                }
                self.range_ok(request.offset, request.length, size, PAST_END)?;
                Operation::Read { df }
            }
            Command::WRITE => {
                self.writable(TransmissionFlags::empty())?;
                self.flags_ok(request)?;
                if request.length > self.payload_max {
                    return Err(TOO_LONG);
                }
                self.range_ok(request.offset, request.length, size, NO_SPACE)?;
                Operation::Write { fua }
            }
            // A client that leaves is let go, whatever else its header says.
            Command::DISC => Operation::Disconnect,
            Command::FLUSH => {
                self.flags_ok(request)?;
                if request.offset != 0 || request.length != 0 {
                    return Err(FLUSH_RANGE);
                }
                Operation::Flush
            }
            Command::TRIM => {
                self.writable(TransmissionFlags::SEND_TRIM)?;
                self.flags_ok(request)?;
                self.range_ok(request.offset, request.length, size, PAST_END)?;
                Operation::Trim { fua }
            }
            Command::CACHE => {
                self.offered(TransmissionFlags::SEND_CACHE)?;
                self.flags_ok(request)?;
                self.range_ok(request.offset, request.length, size, PAST_END)?;
                Operation::Cache
            }
            Command::WRITE_ZEROES => {
                self.writable(TransmissionFlags::SEND_WRITE_ZEROES)?;
                self.flags_ok(request)?;
                self.range_ok(request.offset, request.length, size, NO_SPACE)?;
                Operation::WriteZeroes {
                    fua,
                    no_hole: flags.contains(CommandFlags::NO_HOLE),
                    fast: flags.contains(CommandFlags::FAST_ZERO),
                }
            }
            Command::BLOCK_STATUS => return self.judge_status(request, size, payload),
            _ => return Err(UNKNOWN_COMMAND),
        };
        Ok(Checked {
            operation,
            offset: request.offset,
            length: request.length,
            payload,
        })
    }

    fn judge_status(&self, request: &Request, size: u64, payload: u64) -> Result<Checked, Refusal> {
        if self.contexts.is_empty() {
            return Err(NO_CONTEXTS);
        }
        self.flags_ok(request)?;
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let offset = request.offset;
        if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
            let ids_max = self.contexts.len() as u64;
            if payload < 12 || payload > 8 + 4 * ids_max || !payload.is_multiple_of(4) {
                return Err(BAD_STATUS_PAYLOAD);
            }
            let operation = Operation::FilteredStatus { one };
            return Ok(Checked {
                operation,
                offset,
                length: 0,
                payload,
            });
        }
        self.status_range_ok(offset, request.length, size)?;
        let contexts = ContextMask::first(self.contexts.len());
        let operation = Operation::BlockStatus { one, contexts };
        Ok(Checked {
            operation,
            offset,
            length: request.length,
            payload,
        })
    }

    fn judge_status_payload(
        &self,
        request: &Request,
        payload: &[u8],
        size: u64,
    ) -> Result<Checked, Refusal> {
        let (length, ids) = payload.split_first_chunk().ok_or(BAD_STATUS_PAYLOAD)?;
        let length = u64::from_be_bytes(*length);
        let (ids, rest) = ids.as_chunks();
        let mut mask = 0;
        for id in ids {
            let id = u32::from_be_bytes(*id);
            // An id that was never given to this client is its error, not an empty answer.
            let n = self
                .contexts
                .iter()
                .position(|c| c.id == id)
                .ok_or(BAD_STATUS_PAYLOAD)?;
            // Nor may one be named twice.
            if mask >> n & 1 == 1 {
                return Err(BAD_STATUS_PAYLOAD);
            }
            mask |= 1u64 << n;
        }
        if mask == 0 || !rest.is_empty() {
            return Err(BAD_STATUS_PAYLOAD);
        }
        self.status_range_ok(request.offset, length, size)?;
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let operation = Operation::BlockStatus {
            one,
            contexts: ContextMask(mask),
        };
        Ok(Checked {
            operation,
            offset: request.offset,
            length,
            payload: 0,
        })
    }

    fn status_range_ok(&self, offset: u64, length: u64, size: u64) -> Result<(), Refusal> {
        // There is no valid answer: a chunk has at least one extent, and none may be empty.
        if length == 0 {
            return Err(EMPTY_STATUS);
        }
        self.range_ok(offset, length, size, PAST_END)
    }

    /// Refuses flags that this connection was not offered, or that mean nothing here.
    #[inline]
    fn flags_ok(&self, request: &Request) -> Result<(), Refusal> {
        let allowed = self.allowed.get(usize::from(request.command.0));
        match allowed {
            Some(allowed) if allowed.contains(request.flags) => Ok(()),
            _ => Err(BAD_FLAGS),
        }
    }

    #[inline]
    fn range_ok(
        &self,
        offset: u64,
        length: u64,
        size: u64,
        past_end: Refusal,
    ) -> Result<(), Refusal> {
        if (offset | length) & self.unaligned != 0 {
            return Err(UNALIGNED);
        }
        if offset > size || length > size - offset {
            return Err(past_end);
        }
        Ok(())
    }

    fn offered(&self, flag: TransmissionFlags) -> Result<(), Refusal> {
        if self.flags.contains(flag) {
            Ok(())
        } else {
            Err(NOT_OFFERED)
        }
    }

    #[inline]
    fn writable(&self, flag: TransmissionFlags) -> Result<(), Refusal> {
        if self.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(READ_ONLY);
        }
        self.offered(flag)
    }
}

impl Operation {
    /// The error of the block layer, as this command may say it: `ENOTSUP` exists only for
    /// FAST_ZERO, `EOVERFLOW` only for DF and for long commands without payload.
    #[must_use]
    pub fn wire_errno(self, errno: Errno) -> NbdErrno {
        let fast = matches!(self, Operation::WriteZeroes { fast: true, .. });
        match (NbdErrno::from(errno), self) {
            (NbdErrno::NotSup | NbdErrno::Overflow, _) if fast => NbdErrno::NotSup,
            (NbdErrno::NotSup, _)
            | (
                NbdErrno::Overflow,
                Operation::Read { df: false } | Operation::Write { .. } | Operation::Flush,
            ) => NbdErrno::Inval,
            (errno, _) => errno,
        }
    }
}

fn answer((errno, text): Refusal, swallow: u64) -> Reject {
    Reject::Answer {
        errno,
        text,
        swallow,
    }
}
