//! Replies, as a client reads them: bytes in, events out.
//!
//! Pure; driven by [`super::link`] on the node's iothread, by tests and by a fuzzer. It knows which
//! requests are open and believes nothing that does not fit them. Invariants: it holds no payload;
//! a read ends well only if each of its bytes came exactly once; a server that breaks a rule is
//! [`Broken`], in words, and nothing it says afterwards is looked at.
//! NBD proto: "Simple reply message", "Structured reply chunk message".

use super::super::reply::ReplyMode;
use super::super::wire::{
    ChunkType, Command, EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};

/// Requests that are open at a time.
pub const OPEN_MAX: usize = 128;

/// Pieces of one read that do not touch each other: a server cuts at holes, not at every byte.
const PIECES_MAX: usize = 1024;

/// Bytes of one block status chunk: the protocol's advice of 2^20 extents.
const STATUS_MAX: u64 = 16 << 20;

/// Bytes of one error chunk: a text has at most 4096.
const ERROR_MAX: u64 = 8 << 10;

/// The server broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

/// A request that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The command.
    pub command: Command,
    /// Where its effect begins.
    pub offset: u64,
    /// Bytes of effect.
    pub length: u64,
}

/// The first extent of a block status reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; at least one.
    pub length: u64,
    /// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`.
    pub flags: u64,
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes of a read, at this place in its buffer.
    Data {
        /// The request.
        slot: usize,
        /// Where in its buffer.
        at: usize,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Zeroes of a read.
    Zero {
        /// The request.
        slot: usize,
        /// Where in its buffer.
        at: usize,
        /// How many.
        len: usize,
    },
    /// The request is over and its slot free.
    Done {
        /// The request.
        slot: usize,
        /// The server's error number; for a block status the extent.
        outcome: Result<Option<Extent>, u32>,
    },
}

#[derive(Debug)]
struct Slot {
    cookie: u64,
    open: Open,
    /// What came of a read: pieces in order that do not touch.
    covered: Vec<(u64, u64)>,
    extent: Option<Extent>,
    error: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Between replies and chunks.
    Header,
    /// A chunk whose payload has this many bytes.
    Chunk {
        slot: usize,
        kind: u16,
        len: u64,
        last: bool,
    },
    /// Bytes of a read; `ends`: then the reply is over.
    Data {
        slot: usize,
        at: u64,
        left: u64,
        ends: bool,
    },
    /// Bytes that nobody needs.
    Skip { slot: usize, left: u64, ends: bool },
}

/// The reading side of one connection.
#[derive(Debug)]
pub struct Receiver {
    mode: ReplyMode,
    allocation: Option<u32>,
    slots: Vec<Option<Slot>>,
    open: usize,
    made: u64,
    state: State,
}

type Outcome<T> = Result<T, Broken>;

fn broken<T>(sentence: impl Into<String>) -> Outcome<T> {
    Err(Broken(sentence.into()))
}

impl Receiver {
    /// For a connection in this mode; `allocation` is the id of the context that was agreed on.
    #[must_use]
    pub fn new(mode: ReplyMode, allocation: Option<u32>) -> Self {
        Self {
            mode,
            allocation,
            slots: Vec::new(),
            open: 0,
            made: 0,
            state: State::Header,
        }
    }

    /// Requests that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }

    /// A request goes out; answers its slot, below [`OPEN_MAX`], and its cookie. `None`: too many.
    pub fn begin(&mut self, open: Open) -> Option<(usize, u64)> {
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.slots.len() < OPEN_MAX => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return None,
        };
        self.made += 1;
        // A late reply to an old request must not be taken for the slot's new one.
        let cookie = self.made * OPEN_MAX as u64 + slot as u64;
        self.slots[slot] = Some(Slot {
            cookie,
            open,
            covered: Vec::new(),
            extent: None,
            error: None,
        });
        self.open += 1;
        Some((slot, cookie))
    }

    /// Uses bytes from the front of `input`; says how many, and what happened. No event: more
    /// bytes are needed.
    ///
    /// # Errors
    /// The server broke the protocol: the connection is of no more use.
    pub fn drive<'a>(&mut self, input: &'a [u8]) -> Outcome<(usize, Option<Event<'a>>)> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            let (n, event, more) = match self.state {
                State::Header => self.header(rest)?,
                State::Chunk {
                    slot,
                    kind,
                    len,
                    last,
                } => self.chunk(slot, kind, len, last, rest)?,
                State::Data {
                    slot,
                    at,
                    left,
                    ends,
                } => self.data(slot, at, left, ends, rest),
                State::Skip { slot, left, ends } => {
                    let n = left.min(rest.len() as u64);
                    let left = left - n;
                    self.state = State::Skip { slot, left, ends };
                    let over = left == 0;
                    let event = match over {
                        true => self.chunk_over(slot, ends)?,
                        false => None,
                    };
                    (n as usize, event, over)
                }
            };
            used += n;
            if event.is_some() || !more {
                return Ok((used, event));
            }
        }
    }

    fn slot(&mut self, slot: usize) -> Outcome<&mut Slot> {
        match self.slots.get_mut(slot) {
            Some(Some(open)) => Ok(open),
            _ => broken("reply to a request that is over"),
        }
    }

    /// The request of this cookie.
    fn find(&mut self, cookie: u64) -> Outcome<usize> {
        let slot = (cookie % OPEN_MAX as u64) as usize;
        match self.slots.get(slot) {
            Some(Some(open)) if open.cookie == cookie => Ok(slot),
            _ => broken(format!("reply with an unknown cookie 0x{cookie:x}")),
        }
    }

    fn header<'a>(&mut self, input: &'a [u8]) -> Outcome<(usize, Option<Event<'a>>, bool)> {
        let Some(magic) = input.first_chunk::<4>() else {
            return Ok((0, None, false));
        };
        let magic = u32::from_be_bytes(*magic);
        let len = match (magic, self.mode) {
            (SIMPLE_REPLY_MAGIC, ReplyMode::Simple | ReplyMode::Structured) => 16,
            (STRUCTURED_REPLY_MAGIC, ReplyMode::Structured) => 20,
            (EXTENDED_REPLY_MAGIC, ReplyMode::Extended) => 32,
            _ => return broken(format!("Unexpected magic 0x{magic:08x} in a reply")),
        };
        let Some(bytes) = input.get(..len) else {
            return Ok((0, None, false));
        };
        if magic == SIMPLE_REPLY_MAGIC {
            let event = self.simple(number(&bytes[4..8]) as u32, number(&bytes[8..16]))?;
            return Ok((len, event, true));
        }
        let (flags, kind) = (number(&bytes[4..6]), number(&bytes[6..8]) as u16);
        let slot = self.find(number(&bytes[8..16]))?;
        let length = match len {
            20 => number(&bytes[16..20]),
            _ => number(&bytes[24..32]),
        };
        if len == 32 && number(&bytes[16..24]) != self.slot(slot)?.open.offset {
            return broken("a reply names the offset of another request");
        }
        let last = flags & 1 == 1;
        self.state = State::Chunk {
            slot,
            kind,
            len: length,
            last,
        };
        Ok((len, None, true))
    }

    fn simple(&mut self, error: u32, cookie: u64) -> Outcome<Option<Event<'static>>> {
        let slot = self.find(cookie)?;
        let mode = self.mode;
        let open = self.slot(slot)?;
        let command = open.open.command;
        let needs_chunks = matches!(command, Command::READ | Command::BLOCK_STATUS);
        if mode == ReplyMode::Structured && needs_chunks {
            return broken("Protocol error: simple reply when structured reply chunk was expected");
        }
        if error != 0 {
            open.error = Some(error);
        } else if command == Command::READ {
            let left = open.open.length;
            open.covered = vec![(0, left)];
            self.state = State::Data {
                slot,
                at: 0,
                left,
                ends: true,
            };
            return Ok(None);
        }
        self.finish(slot)
    }

    fn data<'a>(
        &mut self,
        slot: usize,
        at: u64,
        left: u64,
        ends: bool,
        input: &'a [u8],
    ) -> (usize, Option<Event<'a>>, bool) {
        if left == 0 {
            self.state = State::Skip {
                slot,
                left: 0,
                ends,
            };
            return (0, None, true);
        }
        let n = left.min(input.len() as u64);
        if n == 0 {
            return (0, None, false);
        }
        self.state = State::Data {
            slot,
            at: at + n,
            left: left - n,
            ends,
        };
        let event = Event::Data {
            slot,
            at: at as usize,
            bytes: &input[..n as usize],
        };
        (n as usize, Some(event), true)
    }

    /// The payload of a chunk begins.
    fn chunk<'a>(
        &mut self,
        slot: usize,
        kind: u16,
        len: u64,
        last: bool,
        input: &'a [u8],
    ) -> Outcome<(usize, Option<Event<'a>>, bool)> {
        const NONE: u16 = ChunkType::None as u16;
        const DATA: u16 = ChunkType::OffsetData as u16;
        const HOLE: u16 = ChunkType::OffsetHole as u16;
        const STATUS: u16 = ChunkType::BlockStatus as u16;
        const STATUS_EXT: u16 = ChunkType::BlockStatusExt as u16;
        let open = self.slot(slot)?.open;
        let head = match kind {
            NONE if len == 0 && last => 0,
            NONE => {
                return broken("Protocol error: NBD_REPLY_TYPE_NONE with payload or more to come");
            }
            DATA if open.command == Command::READ && len > 8 => 8,
            HOLE if open.command == Command::READ && len == 12 => 12,
            STATUS if open.command == Command::BLOCK_STATUS && len >= 12 => 12,
            STATUS_EXT if open.command == Command::BLOCK_STATUS && len >= 24 => 24,
            _ if kind >> 15 == 1 && (6..=ERROR_MAX).contains(&len) => 6,
            DATA | HOLE | STATUS | STATUS_EXT => {
                return broken(format!(
                    "invalid payload of {len} bytes for chunk type {kind}"
                ));
            }
            _ => return broken(format!("unexpected chunk type {kind} of {len} bytes")),
        };
        let Some(bytes) = input.get(..head) else {
            return Ok((0, None, false));
        };
        let mut left = len - head as u64;
        let mut event = None;
        match kind {
            NONE => {}
            DATA => {
                let at = self.cover(slot, number(bytes), left)?;
                self.state = State::Data {
                    slot,
                    at,
                    left,
                    ends: last,
                };
                return Ok((head, None, true));
            }
            HOLE => {
                let zeroes = number(&bytes[8..12]);
                let at = self.cover(slot, number(&bytes[..8]), zeroes)?;
                event = Some(Event::Zero {
                    slot,
                    at: at as usize,
                    len: zeroes as usize,
                });
            }
            STATUS | STATUS_EXT => left = self.status(slot, kind == STATUS_EXT, len, bytes)?,
            _ => {
                let error = number(&bytes[..4]) as u32;
                if error == 0 {
                    return broken(
                        "Protocol error: server sent structured error chunk with error = 0",
                    );
                }
                if number(&bytes[4..6]) > left {
                    return broken(
                        "Protocol error: server sent structured error chunk with incorrect message size",
                    );
                }
                self.slot(slot)?.error.get_or_insert(error);
            }
        }
        self.state = State::Skip {
            slot,
            left,
            ends: last,
        };
        Ok((head, event, true))
    }

    /// The first extent; answers how many bytes of the chunk are left.
    fn status(&mut self, slot: usize, wide: bool, len: u64, bytes: &[u8]) -> Outcome<u64> {
        let (head, each) = if wide { (8, 16) } else { (4, 8) };
        if wide != (self.mode == ReplyMode::Extended) {
            return broken("block status in the form that was not agreed on");
        }
        if !(len - head).is_multiple_of(each) || len > STATUS_MAX {
            return broken(format!("invalid payload of {len} bytes for a block status"));
        }
        if wide && number(&bytes[4..8]) != (len - head) / each {
            return broken("block status whose count does not fit its length");
        }
        if self.allocation != Some(number(&bytes[..4]) as u32) {
            return broken("block status for a context that was not agreed on");
        }
        let (length, flags) = match wide {
            true => (number(&bytes[8..16]), number(&bytes[16..24])),
            false => (number(&bytes[4..8]), number(&bytes[8..12])),
        };
        if length == 0 {
            return broken("Protocol error: server sent status chunk with zero length");
        }
        let open = self.slot(slot)?;
        let length = length.min(open.open.length);
        if open.extent.replace(Extent { length, flags }).is_some() {
            return broken("Protocol error: unexpected second block status for a context");
        }
        Ok(len - bytes.len() as u64)
    }

    /// A piece of a read came; answers where it lies in the buffer.
    fn cover(&mut self, slot: usize, offset: u64, len: u64) -> Outcome<u64> {
        let open = self.slot(slot)?;
        let at = offset.wrapping_sub(open.open.offset);
        let inside = offset >= open.open.offset && at < open.open.length;
        if !inside || len == 0 || len > open.open.length - at {
            return broken("Protocol error: server sent chunk exceeding requested region");
        }
        let next = open.covered.partition_point(|(start, _)| *start < at);
        let overlaps = open
            .covered
            .get(next)
            .is_some_and(|(start, _)| *start < at + len)
            || next > 0 && open.covered[next - 1].1 > at;
        if overlaps {
            return broken("Protocol error: server sent a part of a read twice");
        }
        let joins_last = next > 0 && open.covered[next - 1].1 == at;
        let joins_next = open
            .covered
            .get(next)
            .is_some_and(|(start, _)| *start == at + len);
        match (joins_last, joins_next) {
            (true, true) => {
                open.covered[next - 1].1 = open.covered[next].1;
                open.covered.remove(next);
            }
            (true, false) => open.covered[next - 1].1 = at + len,
            (false, true) => open.covered[next].0 = at,
            (false, false) if open.covered.len() < PIECES_MAX => {
                open.covered.insert(next, (at, at + len));
            }
            (false, false) => return broken("server answers a read in too many pieces"),
        }
        Ok(at)
    }

    fn chunk_over(&mut self, slot: usize, ends: bool) -> Outcome<Option<Event<'static>>> {
        self.state = State::Header;
        if ends { self.finish(slot) } else { Ok(None) }
    }

    fn finish(&mut self, slot: usize) -> Outcome<Option<Event<'static>>> {
        self.state = State::Header;
        let Some(done) = self.slots.get_mut(slot).and_then(Option::take) else {
            return broken("reply to a request that is over");
        };
        self.open -= 1;
        let outcome = match done.error {
            Some(error) => Err(error),
            None => {
                let whole = [(0, done.open.length)];
                if done.open.command == Command::READ && done.covered != whole {
                    return broken("server left out a part of a read");
                }
                if done.open.command == Command::BLOCK_STATUS && done.extent.is_none() {
                    return broken("Server did not reply with any status extents");
                }
                Ok(done.extent)
            }
        };
        Ok(Some(Event::Done { slot, outcome }))
    }
}

/// A big-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .take(8)
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
