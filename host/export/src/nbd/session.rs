//! What one connection negotiated, and whether a request is allowed under it.
//!
//! Made by the haggling, then owned by the connection on its iothread; never changes. Invariant:
//! a [`Checked`] operation is within the export, uses only what this connection was offered, and
//! needs no further look at flags. [`Session::check`] neither allocates nor locks.
//! NBD proto: "Transmission phase", "Request types", "Error values".

use super::exports::{ContextInfo, ExportInfo};
use super::limits::{CONTEXTS_MAX, PAYLOAD_DEFAULT, SWALLOW_MAX};
use super::reply::{ReplyMode, ReplyTo};
use super::wire::{
    BadMagic, Command, CommandFlags, EXTENDED_REQUEST_LEN, REQUEST_LEN, Request, TransmissionFlags,
};
use crate::errno::{Errno, NbdErrno};

/// The negotiated state of a connection in its transmission phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    mode: ReplyMode,
    requested_name: String,
    export: ExportInfo,
    flags: TransmissionFlags,
    contexts: Vec<ContextInfo>,
    /// The flags each command may carry here, by command number.
    allowed: [CommandFlags; 8],
    /// Largest payload that is accepted; never below the protocol's default.
    payload_max: u64,
    /// Minimum block size less one, if this export insists on it; else 0.
    unaligned: u64,
}

/// A set of the session's contexts: bit `n` stands for the `n`-th of [`Session::contexts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextMask(u64);

/// What a valid request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Answer with the bytes; with `df` in one content chunk. The length may be 0.
    Read {
        /// Do not fragment.
        df: bool,
    },
    /// Store the payload. The length may be 0.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// Finish what is in flight, then close; there is no reply.
    Disconnect,
    /// Make durable what was replied to.
    Flush,
    /// The range is no longer needed.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// Prefetch the range.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Keep the blocks allocated.
        no_hole: bool,
        /// Fail with `ENOTSUP`, having done nothing, if this is not faster than writing.
        fast: bool,
    },
    /// Report these contexts over the range, one chunk each.
    BlockStatus {
        /// One extent per context, not longer than asked for.
        one: bool,
        /// Which contexts; never none.
        contexts: ContextMask,
    },
    /// Read the payload first, then let [`Session::check_status_payload`] say which contexts and
    /// which range. Until then the length is 0.
    FilteredStatus {
        /// One extent per context, not longer than asked for.
        one: bool,
    },
}

/// A request that may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// What to do.
    pub operation: Operation,
    /// Where.
    pub offset: u64,
    /// For how many bytes.
    pub length: u64,
    /// Bytes that follow the header and belong to this operation.
    pub payload: u64,
}

/// A request that may not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// Throw away `swallow` bytes that follow the header, and answer with the error: the
    /// stream stays in sync.
    Answer {
        /// The error.
        errno: NbdErrno,
        /// For the client's human.
        text: &'static str,
        /// Bytes of payload to read and drop.
        swallow: u64,
    },
    /// The header declares this much payload: hang up.
    Disconnect(u64),
}

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
const BAD_STATUS_PAYLOAD: Refusal = (NbdErrno::Inval, "Malformed block status payload");

impl ContextMask {
    /// Whether the `n`-th context is in the set.
    #[must_use]
    pub fn contains(self, n: usize) -> bool {
        n < CONTEXTS_MAX && self.0 >> n & 1 == 1
    }

    /// How many contexts are in the set.
    #[must_use]
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    fn first(n: usize) -> ContextMask {
        let shift = CONTEXTS_MAX.saturating_sub(n).min(63);
        ContextMask(if n == 0 { 0 } else { u64::MAX >> shift })
    }
}

impl Session {
    /// The session for a client that entered `export` under `requested_name`, having selected
    /// `contexts`.
    #[must_use]
    pub fn new(
        mode: ReplyMode,
        requested_name: String,
        export: ExportInfo,
        mut contexts: Vec<ContextInfo>,
    ) -> Session {
        contexts.truncate(CONTEXTS_MAX);
        if mode == ReplyMode::Simple {
            contexts.clear();
        }
        let flags = Session::offered_flags(mode, &export, !contexts.is_empty());
        let sizes = export.block_sizes.in_order();
        Session {
            mode,
            requested_name,
            flags,
            allowed: allowed_flags(mode, flags),
            payload_max: u64::from(sizes.payload_max.max(PAYLOAD_DEFAULT)),
            unaligned: if export.block_size_required {
                u64::from(sizes.minimum) - 1
            } else {
                0
            },
            contexts,
            export,
        }
    }

    /// The transmission flags that a client is told: what the export can, and what the
    /// negotiated mode adds.
    #[must_use]
    pub fn offered_flags(
        mode: ReplyMode,
        export: &ExportInfo,
        has_contexts: bool,
    ) -> TransmissionFlags {
        let mut flags = export.transmission_flags();
        flags.set(TransmissionFlags::SEND_DF, mode != ReplyMode::Simple);
        flags.set(
            TransmissionFlags::BLOCK_STATUS_PAYLOAD,
            mode == ReplyMode::Extended && has_contexts,
        );
        flags
    }

    /// How replies are framed.
    #[must_use]
    pub fn mode(&self) -> ReplyMode {
        self.mode
    }

    /// The export's name as this client said it.
    #[must_use]
    pub fn requested_name(&self) -> &str {
        &self.requested_name
    }

    /// The export, as it was when the client entered.
    #[must_use]
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// What the client was offered.
    #[must_use]
    pub fn flags(&self) -> TransmissionFlags {
        self.flags
    }

    /// The contexts that the client selected.
    #[must_use]
    pub fn contexts(&self) -> &[ContextInfo] {
        &self.contexts
    }

    /// The contexts of a set, in the order of selection.
    pub fn contexts_in(&self, mask: ContextMask) -> impl Iterator<Item = &ContextInfo> {
        self.contexts
            .iter()
            .enumerate()
            .filter(move |(n, _)| mask.contains(*n))
            .map(|(_, c)| c)
    }

    /// Largest payload that a read or write may have.
    #[must_use]
    pub fn payload_max(&self) -> u64 {
        self.payload_max
    }

    /// Bytes of a request header.
    #[must_use]
    pub fn header_len(&self) -> usize {
        match self.mode {
            ReplyMode::Simple | ReplyMode::Structured => REQUEST_LEN,
            ReplyMode::Extended => EXTENDED_REQUEST_LEN,
        }
    }

    /// Reads the request at the front of `bytes`; `None` if they end before its header does.
    ///
    /// # Errors
    /// The stream is lost: disconnect.
    #[inline]
    pub fn parse(&self, bytes: &[u8]) -> Result<Option<Request>, BadMagic> {
        match self.mode {
            ReplyMode::Simple | ReplyMode::Structured => {
                bytes.first_chunk().map(Request::parse_compact).transpose()
            }
            ReplyMode::Extended => bytes.first_chunk().map(Request::parse_extended).transpose(),
        }
    }

    /// How to answer this request.
    #[inline]
    #[must_use]
    pub fn reply_to(&self, request: &Request) -> ReplyTo {
        ReplyTo::new(self.mode, request)
    }

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
        match (errno.nbd(), self) {
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

/// Which flags each command may carry, given what was offered ("Command flags").
fn allowed_flags(mode: ReplyMode, offered: TransmissionFlags) -> [CommandFlags; 8] {
    let given = |condition, flag| {
        if condition {
            flag
        } else {
            CommandFlags::empty()
        }
    };
    // FUA must be tolerated on every command once it is offered.
    let fua = given(
        offered.contains(TransmissionFlags::SEND_FUA),
        CommandFlags::FUA,
    );
    let df = given(
        offered.contains(TransmissionFlags::SEND_DF),
        CommandFlags::DF,
    );
    let fast = given(
        offered.contains(TransmissionFlags::SEND_FAST_ZERO),
        CommandFlags::FAST_ZERO,
    );
    let payload = given(mode == ReplyMode::Extended, CommandFlags::PAYLOAD_LEN);
    let status_payload = given(
        offered.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
        CommandFlags::PAYLOAD_LEN,
    );
    let mut allowed = [fua; 8];
    for (command, flags) in [
        (Command::READ, df),
        (Command::WRITE, payload),
        (Command::WRITE_ZEROES, CommandFlags::NO_HOLE | fast),
        (
            Command::BLOCK_STATUS,
            CommandFlags::REQ_ONE | status_payload,
        ),
    ] {
        allowed[usize::from(command.0)] |= flags;
    }
    allowed
}

#[cfg(test)]
mod tests;
