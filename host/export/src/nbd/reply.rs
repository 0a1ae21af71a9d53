//! Replies, in the framing that the session negotiated.
//!
//! Written on the connection's iothread into its reply batch. Invariant: a READ or BLOCK_STATUS
//! of a client with structured replies is never answered by a simple reply, whatever went wrong
//! and however early. NBD proto: "Simple reply message", "Structured reply chunk message".

use super::wire::{
    ChunkType, Command, ReplyFlags, Request, extended_chunk, simple_reply, structured_chunk,
    wire_str,
};
use crate::errno::NbdErrno;

/// How replies are framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyMode {
    /// Simple replies only.
    Simple,
    /// Chunks where they are of use.
    Structured,
    /// Chunks with extended headers, always.
    Extended,
}

/// The most that stands before the bytes of a read: extended chunk and offset.
pub const DATA_HEADER_MAX: usize = 40;

/// What is left to do when a read fails after the header of its data went out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Midway {
    /// Success was announced and cannot be taken back: hang up without another byte.
    Disconnect,
    /// Complete the announced bytes with zeroes, then append the error chunk. (The data chunk
    /// must have been written without [`ReplyFlags::DONE`].)
    PadThenError,
}

/// Whom to answer, and how: what remains of a request while it is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    mode: ReplyMode,
    /// Success has to be said in chunks too.
    chunks: bool,
    cookie: u64,
    /// The request's offset, echoed by extended headers.
    offset: u64,
}

impl ReplyTo {
    /// The address of the reply to `request`.
    #[inline]
    #[must_use]
    pub fn new(mode: ReplyMode, request: &Request) -> ReplyTo {
        let chunks = match mode {
            ReplyMode::Simple => false,
            ReplyMode::Structured => {
                matches!(request.command, Command::READ | Command::BLOCK_STATUS)
            }
            ReplyMode::Extended => true,
        };
        ReplyTo {
            mode,
            chunks,
            cookie: request.cookie,
            offset: request.offset,
        }
    }

    /// The framing.
    #[must_use]
    pub fn mode(&self) -> ReplyMode {
        self.mode
    }

    /// Success with nothing to show, or the end of a reply whose chunks were all not `last`.
    /// Also the whole answer to a read of no bytes.
    #[inline]
    pub fn done(&self, out: &mut Vec<u8>) {
        if self.chunks {
            self.chunk(out, true, ChunkType::None, 0);
        } else {
            out.extend_from_slice(&simple_reply(0, self.cookie));
        }
    }

    /// Failure. The text reaches clients with structured replies.
    pub fn error(&self, errno: NbdErrno, text: &str, out: &mut Vec<u8>) {
        self.push_error(errno, text, None, true, out);
    }

    /// Failure at one offset, which must lie inside the request. Only for reads, writes, trims
    /// and block status; after it more chunks may follow unless it is the `last`. Without
    /// structured replies this is the whole answer.
    pub fn error_at(
        &self,
        errno: NbdErrno,
        text: &str,
        offset: u64,
        last: bool,
        out: &mut Vec<u8>,
    ) {
        self.push_error(errno, text, Some(offset), last, out);
    }

    /// What stands before `len` bytes of a read (at least one); the caller sends them next.
    ///
    /// Without structured replies this is the header of the whole reply: call it once, for the
    /// whole range. `last` only if nothing can fail any more.
    #[inline]
    pub fn data(&self, offset: u64, len: u32, last: bool, out: &mut Vec<u8>) {
        if self.chunks {
            self.chunk(out, last, ChunkType::OffsetData, u64::from(len) + 8);
            out.extend_from_slice(&offset.to_be_bytes());
        } else {
            out.extend_from_slice(&simple_reply(0, self.cookie));
        }
    }

    /// Says that `len` bytes (at least one) read as zeroes. `false`, having done nothing, if
    /// this client can only be sent the zeroes themselves.
    ///
    /// Not for a read with DF, unless the hole is the whole range.
    #[inline]
    pub fn hole(&self, offset: u64, len: u32, last: bool, out: &mut Vec<u8>) -> bool {
        if self.chunks {
            self.chunk(out, last, ChunkType::OffsetHole, 12);
            out.extend_from_slice(&offset.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
        }
        self.chunks
    }

    /// What to do when the bytes behind a [`ReplyTo::data`] header cannot be had after all.
    #[must_use]
    pub fn midway(&self) -> Midway {
        if self.chunks {
            Midway::PadThenError
        } else {
            Midway::Disconnect
        }
    }

    /// The header of a chunk in this session's framing.
    #[inline]
    pub(super) fn chunk(&self, out: &mut Vec<u8>, last: bool, kind: ChunkType, length: u64) {
        let flags = if last {
            ReplyFlags::DONE
        } else {
            ReplyFlags::empty()
        };
        match self.mode {
            ReplyMode::Simple | ReplyMode::Structured => {
                // Payloads are 32 bit plus 8 at the very most; requests are bounded far below.
                let length = u32::try_from(length).unwrap_or(u32::MAX);
                out.extend_from_slice(&structured_chunk(flags, kind, self.cookie, length));
            }
            ReplyMode::Extended => {
                let header = extended_chunk(flags, kind, self.cookie, self.offset, length);
                out.extend_from_slice(&header);
            }
        }
    }

    fn push_error(
        &self,
        errno: NbdErrno,
        text: &str,
        offset: Option<u64>,
        last: bool,
        out: &mut Vec<u8>,
    ) {
        if self.mode == ReplyMode::Simple {
            out.extend_from_slice(&simple_reply(errno.wire(), self.cookie));
            return;
        }
        // "Valid as a reply to any request": with structured replies negotiated, even commands
        // that succeed with a simple reply fail with a chunk, because it has room for words.
        let text = wire_str(text).as_bytes();
        let (kind, tail) = match offset {
            Some(_) => (ChunkType::ErrorOffset, 8),
            None => (ChunkType::Error, 0),
        };
        self.chunk(out, last, kind, 6 + text.len() as u64 + tail);
        out.extend_from_slice(&errno.wire().to_be_bytes());
        // wire_str gives at most 4096 bytes.
        out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(text);
        if let Some(offset) = offset {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::CommandFlags;

    fn to(mode: ReplyMode, command: Command) -> ReplyTo {
        let flags = CommandFlags::empty();
        ReplyTo::new(
            mode,
            &Request {
                flags,
                command,
                cookie: 7,
                offset: 512,
                length: 1024,
            },
        )
    }

    fn bytes(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    const SIMPLE_OK: &[u8] = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07";

    #[test]
    fn writes_succeed_with_simple_replies_until_headers_are_extended() {
        for mode in [ReplyMode::Simple, ReplyMode::Structured] {
            assert_eq!(bytes(|out| to(mode, Command::WRITE).done(out)), SIMPLE_OK);
        }
        assert_eq!(
            bytes(|out| to(ReplyMode::Extended, Command::WRITE).done(out)),
            b"\x6e\x8a\x27\x8c\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0"
        );
    }

    /// Detail 4, and nbd-server's flaw: a simple error reply to a structured READ.
    #[test]
    fn an_error_for_a_structured_read_is_a_chunk() {
        for command in [
            Command::READ,
            Command::BLOCK_STATUS,
            Command::WRITE,
            Command(99),
        ] {
            let reply = to(ReplyMode::Structured, command);
            assert_eq!(
                bytes(|out| reply.error(NbdErrno::Inval, "no", out)),
                b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x08\0\0\0\x16\0\x02no"
            );
        }
        assert_eq!(
            bytes(|out| to(ReplyMode::Simple, Command::READ).error(NbdErrno::Io, "no", out)),
            b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x07"
        );
    }

    #[test]
    fn an_error_offset_follows_the_text() {
        let reply = to(ReplyMode::Structured, Command::READ);
        assert_eq!(
            bytes(|out| reply.error_at(NbdErrno::Io, "bad", 1000, false, out)),
            b"\x66\x8e\x33\xef\0\0\x80\x02\0\0\0\0\0\0\0\x07\0\0\0\x11\
              \0\0\0\x05\0\x03bad\0\0\0\0\0\0\x03\xe8"
        );
    }

    #[test]
    fn data_and_holes_are_framed_by_mode() {
        let structured = to(ReplyMode::Structured, Command::READ);
        assert_eq!(
            bytes(|out| structured.data(512, 1024, true, out)),
            b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x07\0\0\x04\x08\0\0\0\0\0\0\x02\0"
        );
        assert_eq!(
            bytes(|out| assert!(structured.hole(512, 1024, false, out))),
            b"\x66\x8e\x33\xef\0\0\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c\0\0\0\0\0\0\x02\0\0\0\x04\0"
        );
        let simple = to(ReplyMode::Simple, Command::READ);
        assert_eq!(bytes(|out| simple.data(512, 1024, true, out)), SIMPLE_OK);
        assert_eq!(
            bytes(|out| assert!(!simple.hole(512, 1024, true, out))),
            b""
        );
        let extended = bytes(|out| to(ReplyMode::Extended, Command::READ).data(600, 9, true, out));
        assert_eq!(extended.len(), DATA_HEADER_MAX);
        // The header echoes the request's offset (512); the chunk has its own (600).
        assert_eq!(
            &extended[16..],
            b"\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x11\0\0\0\0\0\0\x02\x58"
        );
    }

    #[test]
    fn a_read_of_nothing_is_an_empty_reply_in_its_framing() {
        assert_eq!(
            bytes(|out| to(ReplyMode::Simple, Command::READ).done(out)),
            SIMPLE_OK
        );
        assert_eq!(
            bytes(|out| to(ReplyMode::Structured, Command::READ).done(out)),
            b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0"
        );
    }

    /// Detail 4: pad and say it in a chunk; a simple reply can only be cut off.
    #[test]
    fn a_read_that_fails_midway_pads_or_disconnects() {
        assert_eq!(
            to(ReplyMode::Simple, Command::READ).midway(),
            Midway::Disconnect
        );
        assert_eq!(
            to(ReplyMode::Structured, Command::READ).midway(),
            Midway::PadThenError
        );
        assert_eq!(
            to(ReplyMode::Extended, Command::READ).midway(),
            Midway::PadThenError
        );
    }

    #[test]
    fn error_texts_are_cut_to_a_protocol_string() {
        let text = "x".repeat(70_000);
        let out = bytes(|out| {
            to(ReplyMode::Structured, Command::READ).error(NbdErrno::Io, &text, out);
        });
        assert_eq!(out.len(), 20 + 6 + 4096);
    }
}
