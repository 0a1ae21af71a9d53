//! What one connection negotiated, and whether a request is allowed under it.
//!
//! Made by the haggling, then owned by the connection on its iothread; never changes. Invariant:
//! a [`Checked`] operation is within the export, uses only what this connection was offered, and
//! needs no further look at flags.
//! NBD proto: "Transmission phase", "Command flags".

mod check;

use super::exports::{ContextInfo, ExportInfo};
use super::limits::{CONTEXTS_MAX, PAYLOAD_DEFAULT};
use super::reply::{ReplyMode, ReplyTo};
use super::wire::{
    BadMagic, Command, CommandFlags, EXTENDED_REQUEST_LEN, REQUEST_LEN, Request, TransmissionFlags,
};
use crate::errno::NbdErrno;

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
    /// negotiated mode adds. `with_contexts`: it has selected some, or still may.
    #[must_use]
    pub fn offered_flags(
        mode: ReplyMode,
        export: &ExportInfo,
        with_contexts: bool,
    ) -> TransmissionFlags {
        let mut flags = export.transmission_flags();
        flags.set(TransmissionFlags::SEND_DF, mode != ReplyMode::Simple);
        flags.set(
            TransmissionFlags::BLOCK_STATUS_PAYLOAD,
            mode == ReplyMode::Extended && with_contexts,
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

    /// Whether the client may change the export.
    #[must_use]
    pub fn may_write(&self) -> bool {
        !self.flags.contains(TransmissionFlags::READ_ONLY)
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
