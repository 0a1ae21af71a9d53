//! The NBD wire: constants, flags and headers, and nothing that decides.
//!
//! Pure data, used by every thread. Everything on the wire is big-endian. Invariant: reading a
//! header never allocates and never panics; a header is only ever read from exactly its length.
//! Numbers are those of the protocol document's sections "Newstyle negotiation" and "Transmission".

use bitflags::bitflags;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First word of the greeting: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of a chunk with an extended header.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string that the protocol allows: names, descriptions, error texts, context names.
pub const STRING_MAX: usize = 4096;
/// Bytes of a compact request.
pub const REQUEST_LEN: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// The zeroes behind the answer to `NBD_OPT_EXPORT_NAME`, unless both sides waived them.
pub const EXPORT_NAME_PADDING: usize = 124;

bitflags! {
    /// What the server says of itself in the greeting.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options may fail without ending the session.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The server can leave out the padding after `NBD_OPT_EXPORT_NAME`.
        const NO_ZEROES = 1 << 1;
    }

    /// What the client answers to the greeting.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// The client understands replies to options.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The client does not want the padding.
        const NO_ZEROES = 1 << 1;
    }

    /// What an export offers in the transmission phase.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// `NBD_CMD_FLUSH` is understood.
        const SEND_FLUSH = 1 << 2;
        /// `NBD_CMD_FLAG_FUA` is understood.
        const SEND_FUA = 1 << 3;
        /// Prefer sequential access.
        const ROTATIONAL = 1 << 4;
        /// `NBD_CMD_TRIM` is understood.
        const SEND_TRIM = 1 << 5;
        /// `NBD_CMD_WRITE_ZEROES` is understood.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// `NBD_CMD_FLAG_DF` is understood.
        const SEND_DF = 1 << 7;
        /// FLUSH and FUA on one connection cover completed writes of all.
        const CAN_MULTI_CONN = 1 << 8;
        /// `NBD_CMD_RESIZE` is understood (experimental; never offered here).
        const SEND_RESIZE = 1 << 9;
        /// `NBD_CMD_CACHE` is understood.
        const SEND_CACHE = 1 << 10;
        /// `NBD_CMD_FLAG_FAST_ZERO` is understood.
        const SEND_FAST_ZERO = 1 << 11;
        /// `NBD_CMD_BLOCK_STATUS` may carry a payload that picks contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Flags of one request. Unknown bits are kept: the session answers them with `EINVAL`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Reply only when the data is durable.
        const FUA = 1 << 0;
        /// Zero, but keep the blocks allocated.
        const NO_HOLE = 1 << 1;
        /// Answer a read with one content chunk.
        const DF = 1 << 2;
        /// One extent per context is enough.
        const REQ_ONE = 1 << 3;
        /// Zero only if that is faster than writing.
        const FAST_ZERO = 1 << 4;
        /// The header's length counts payload bytes (extended headers only).
        const PAYLOAD_LEN = 1 << 5;
        const _ = !0;
    }

    /// Flags of one chunk of a reply.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ReplyFlags: u16 {
        /// This is the last chunk of the reply.
        const DONE = 1 << 0;
    }
}

/// A request's command. A newtype, not an enum: the number comes from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command(pub u16);

impl Command {
    /// `NBD_CMD_READ`
    pub const READ: Command = Command(0);
    /// `NBD_CMD_WRITE`
    pub const WRITE: Command = Command(1);
    /// `NBD_CMD_DISC`
    pub const DISC: Command = Command(2);
    /// `NBD_CMD_FLUSH`
    pub const FLUSH: Command = Command(3);
    /// `NBD_CMD_TRIM`
    pub const TRIM: Command = Command(4);
    /// `NBD_CMD_CACHE`
    pub const CACHE: Command = Command(5);
    /// `NBD_CMD_WRITE_ZEROES`
    pub const WRITE_ZEROES: Command = Command(6);
    /// `NBD_CMD_BLOCK_STATUS`
    pub const BLOCK_STATUS: Command = Command(7);
    /// `NBD_CMD_RESIZE` (experimental; never offered here)
    pub const RESIZE: Command = Command(8);
}

/// The kind of one chunk ("Structured reply types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum ChunkType {
    /// Nothing but the end of a reply.
    None = 0,
    /// Offset and bytes.
    OffsetData = 1,
    /// Offset and a count of zeroes.
    OffsetHole = 2,
    /// Context id and 32-bit extents.
    BlockStatus = 5,
    /// Context id, count and 64-bit extents.
    BlockStatusExt = 6,
    /// Error, text.
    Error = 0x8001,
    /// Error, text, offset.
    ErrorOffset = 0x8002,
}

/// One request, whichever header it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Flags, unknown bits included.
    pub flags: CommandFlags,
    /// The command.
    pub command: Command,
    /// The client's name for this request, echoed in the reply.
    pub cookie: u64,
    /// Where the effect begins.
    pub offset: u64,
    /// Bytes of effect, or of payload.
    pub length: u64,
}

/// The first word of a request is not the one that was negotiated: the stream is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Bad request magic 0x{0:08x}")]
pub struct BadMagic(pub u32);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CompactRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtendedRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

impl Request {
    /// Reads a compact request.
    ///
    /// # Errors
    /// The magic is wrong, and with it the position in the stream.
    #[inline]
    pub fn parse_compact(bytes: &[u8; REQUEST_LEN]) -> Result<Request, BadMagic> {
        let header: &CompactRequest = zerocopy::transmute_ref!(bytes);
        if header.magic.get() != REQUEST_MAGIC {
            return Err(BadMagic(header.magic.get()));
        }
        Ok(Request {
            flags: CommandFlags::from_bits_retain(header.flags.get()),
            command: Command(header.command.get()),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            length: u64::from(header.length.get()),
        })
    }

    /// Reads a request with an extended header.
    ///
    /// # Errors
    /// The magic is wrong, and with it the position in the stream.
    #[inline]
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Request, BadMagic> {
        let header: &ExtendedRequest = zerocopy::transmute_ref!(bytes);
        if header.magic.get() != EXTENDED_REQUEST_MAGIC {
            return Err(BadMagic(header.magic.get()));
        }
        Ok(Request {
            flags: CommandFlags::from_bits_retain(header.flags.get()),
            command: Command(header.command.get()),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            length: header.length.get(),
        })
    }

    /// The request as a compact header: what a client sends. A length beyond 32 bit is cut.
    #[must_use]
    pub fn to_compact(&self) -> [u8; REQUEST_LEN] {
        zerocopy::transmute!(CompactRequest {
            magic: REQUEST_MAGIC.into(),
            flags: self.flags.bits().into(),
            command: self.command.0.into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: u32::try_from(self.length).unwrap_or(u32::MAX).into(),
        })
    }

    /// The request as an extended header: what a client sends.
    #[must_use]
    pub fn to_extended(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        zerocopy::transmute!(ExtendedRequest {
            magic: EXTENDED_REQUEST_MAGIC.into(),
            flags: self.flags.bits().into(),
            command: self.command.0.into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: self.length.into(),
        })
    }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SimpleReply {
    magic: U32,
    error: U32,
    cookie: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StructuredChunk {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    length: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ExtendedChunk {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// A simple reply; `error` is 0 for success.
#[inline]
#[must_use]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; 16] {
    zerocopy::transmute!(SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.into(),
    })
}

/// The header of a structured chunk; `length` counts the payload behind it.
#[inline]
#[must_use]
pub fn structured_chunk(flags: ReplyFlags, kind: ChunkType, cookie: u64, length: u32) -> [u8; 20] {
    zerocopy::transmute!(StructuredChunk {
        magic: STRUCTURED_REPLY_MAGIC.into(),
        flags: flags.bits().into(),
        kind: (kind as u16).into(),
        cookie: cookie.into(),
        length: length.into(),
    })
}

/// The header of an extended chunk; it echoes the *request's* offset.
#[inline]
#[must_use]
pub fn extended_chunk(
    flags: ReplyFlags,
    kind: ChunkType,
    cookie: u64,
    offset: u64,
    length: u64,
) -> [u8; 32] {
    zerocopy::transmute!(ExtendedChunk {
        magic: EXTENDED_REPLY_MAGIC.into(),
        flags: flags.bits().into(),
        kind: (kind as u16).into(),
        cookie: cookie.into(),
        offset: offset.into(),
        length: length.into(),
    })
}

/// The longest beginning of `text` that may travel as a protocol string: at most
/// [`STRING_MAX`] bytes, whole characters, no NUL.
#[must_use]
pub fn wire_str(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(STRING_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_request_is_read_byte_for_byte() {
        let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
                       \x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x10\x00";
        let request = Request::parse_compact(&bytes).unwrap();
        assert_eq!(request.flags, CommandFlags::FUA);
        assert_eq!(request.command, Command::WRITE);
        assert_eq!(request.cookie, 0x0102_0304_0506_0708);
        assert_eq!((request.offset, request.length), (0x10000, 0x1000));
        assert_eq!(request.to_compact(), bytes);
    }

    #[test]
    fn an_extended_request_is_read_byte_for_byte() {
        let bytes = *b"\x21\xe4\x1c\x71\x00\x02\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
                       \x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00";
        let request = Request::parse_extended(&bytes).unwrap();
        assert_eq!(request.flags, CommandFlags::NO_HOLE);
        assert_eq!(request.command, Command::WRITE_ZEROES);
        assert_eq!((request.offset, request.length), (0x10000, 5 << 32));
        assert_eq!(request.to_extended(), bytes);
    }

    #[test]
    fn a_header_of_the_other_kind_is_bad_magic() {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        assert_eq!(
            Request::parse_compact(&bytes),
            Err(BadMagic(EXTENDED_REQUEST_MAGIC))
        );
        let mut bytes = [0; EXTENDED_REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        assert_eq!(
            Request::parse_extended(&bytes),
            Err(BadMagic(REQUEST_MAGIC))
        );
    }

    #[test]
    fn unknown_flag_bits_survive_parsing() {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&0x8000u16.to_be_bytes());
        assert_eq!(Request::parse_compact(&bytes).unwrap().flags.bits(), 0x8000);
    }

    #[test]
    fn reply_headers_are_written_byte_for_byte() {
        assert_eq!(
            simple_reply(5, 0x0102_0304_0506_0708),
            *b"\x67\x44\x66\x98\x00\x00\x00\x05\x01\x02\x03\x04\x05\x06\x07\x08"
        );
        assert_eq!(
            structured_chunk(ReplyFlags::DONE, ChunkType::OffsetHole, 7, 12),
            *b"\x66\x8e\x33\xef\x00\x01\x00\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c"
        );
        assert_eq!(
            extended_chunk(ReplyFlags::empty(), ChunkType::BlockStatusExt, 7, 512, 24),
            *b"\x6e\x8a\x27\x8c\x00\x00\x00\x06\0\0\0\0\0\0\0\x07\
               \0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x18"
        );
    }

    #[test]
    fn wire_strings_end_at_nul_and_at_whole_characters() {
        assert_eq!(wire_str("a\0b"), "a");
        let long = "\u{e4}".repeat(3000);
        assert_eq!(wire_str(&long).len(), STRING_MAX);
        let odd = format!("x{long}");
        assert_eq!(wire_str(&odd).len(), STRING_MAX - 1);
    }
}
