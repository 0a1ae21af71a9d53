//! The data of options and of their replies: bytes to values, values to bytes.
//!
//! Pure, control plane only. The decisions are in [`super::haggle`]. Invariant: parsing looks at
//! every length before it uses it, and ends exactly at the end of the data.
//! NBD proto: "Option types", "Option reply types".

use super::exports::{BlockSizes, ExportInfo};
use super::limits::QUERIES_MAX;
use super::wire::{OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_MAX, TransmissionFlags, wire_str};

/// The number of an option. A newtype, not an enum: the number comes from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionId(pub u32);

impl OptionId {
    /// `NBD_OPT_EXPORT_NAME`
    pub const EXPORT_NAME: OptionId = OptionId(1);
    /// `NBD_OPT_ABORT`
    pub const ABORT: OptionId = OptionId(2);
    /// `NBD_OPT_LIST`
    pub const LIST: OptionId = OptionId(3);
    /// `NBD_OPT_STARTTLS`
    pub const STARTTLS: OptionId = OptionId(5);
    /// `NBD_OPT_INFO`
    pub const INFO: OptionId = OptionId(6);
    /// `NBD_OPT_GO`
    pub const GO: OptionId = OptionId(7);
    /// `NBD_OPT_STRUCTURED_REPLY`
    pub const STRUCTURED_REPLY: OptionId = OptionId(8);
    /// `NBD_OPT_LIST_META_CONTEXT`
    pub const LIST_META_CONTEXT: OptionId = OptionId(9);
    /// `NBD_OPT_SET_META_CONTEXT`
    pub const SET_META_CONTEXT: OptionId = OptionId(10);
    /// `NBD_OPT_EXTENDED_HEADERS`
    pub const EXTENDED_HEADERS: OptionId = OptionId(11);
}

/// A reply that is not an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Rep {
    /// Done.
    Ack = 1,
    /// One export of the list.
    Server = 2,
    /// One piece of information.
    Info = 3,
    /// One metadata context.
    MetaContext = 4,
}

/// A reply that is an error; all have bit 31 set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RepErr {
    /// Unknown option.
    Unsup = 0x8000_0001,
    /// Forbidden here.
    Policy = 0x8000_0002,
    /// Malformed, or out of turn.
    Invalid = 0x8000_0003,
    /// Only after TLS.
    TlsReqd = 0x8000_0005,
    /// No such export.
    Unknown = 0x8000_0006,
    /// The server is going away.
    Shutdown = 0x8000_0007,
    /// Only for clients that ask for block sizes.
    BlockSizeReqd = 0x8000_0008,
    /// More than the server handles.
    TooBig = 0x8000_0009,
    /// Only with extended headers, which this client already has.
    ExtHeaderReqd = 0x8000_000a,
}

/// `NBD_INFO_EXPORT`
pub const INFO_EXPORT: u16 = 0;
/// `NBD_INFO_NAME`
pub const INFO_NAME: u16 = 1;
/// `NBD_INFO_DESCRIPTION`
pub const INFO_DESCRIPTION: u16 = 2;
/// `NBD_INFO_BLOCK_SIZE`
pub const INFO_BLOCK_SIZE: u16 = 3;

// === Parsing ===

/// Why the data of an option is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadData {
    /// `Invalid` or `TooBig`.
    pub error: RepErr,
    /// For the client's human.
    pub text: &'static str,
}

impl BadData {
    const TRUNCATED: BadData = BadData::invalid("Option data is shorter than it claims");
    const TRAILING: BadData = BadData::invalid("Option data is longer than it claims");

    const fn invalid(text: &'static str) -> BadData {
        BadData {
            error: RepErr::Invalid,
            text,
        }
    }
}

/// Reads from the front of a slice, never past its end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], BadData> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(BadData::TRUNCATED)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadData> {
        let (head, tail) = self.0.split_first_chunk().ok_or(BadData::TRUNCATED)?;
        self.0 = tail;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, BadData> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, BadData> {
        self.array().map(u32::from_be_bytes)
    }

    /// A string behind its 32-bit length.
    fn string(&mut self) -> Result<String, BadData> {
        let len = self.u32()? as usize;
        parse_name(self.take(len)?)
    }

    fn end(self) -> Result<(), BadData> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(BadData::TRAILING)
        }
    }
}

/// A protocol string: UTF-8, no NUL, at most [`STRING_MAX`] bytes.
///
/// # Errors
/// It is not.
pub fn parse_name(bytes: &[u8]) -> Result<String, BadData> {
    if bytes.len() > STRING_MAX {
        return Err(BadData::invalid("A string is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(BadData::invalid("A string contains a NUL byte"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| BadData::invalid("A string is not UTF-8"))?;
    Ok(text.to_owned())
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoQuery {
    /// The export, as the client calls it.
    pub name: String,
    /// What the client asks to be told beyond `NBD_INFO_EXPORT`.
    pub wants: InfoWants,
}

/// The optional pieces of information; ids that we do not know are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InfoWants {
    /// The canonical name.
    pub name: bool,
    /// The description.
    pub description: bool,
    /// The block sizes: the client promises to obey them.
    pub block_size: bool,
}

impl InfoQuery {
    /// Reads it.
    ///
    /// # Errors
    /// The lengths do not add up, or the name is no protocol string.
    pub fn parse(data: &[u8]) -> Result<InfoQuery, BadData> {
        let mut data = Cursor(data);
        let name = data.string()?;
        let mut wants = InfoWants::default();
        for _ in 0..data.u16()? {
            match data.u16()? {
                INFO_NAME => wants.name = true,
                INFO_DESCRIPTION => wants.description = true,
                INFO_BLOCK_SIZE => wants.block_size = true,
                _ => {}
            }
        }
        data.end()?;
        Ok(InfoQuery { name, wants })
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextQuery {
    /// The export, as the client calls it.
    pub name: String,
    /// What it asks for.
    pub queries: Vec<String>,
}

impl ContextQuery {
    /// Reads it.
    ///
    /// # Errors
    /// The lengths do not add up, a string is no protocol string, or there are too many.
    pub fn parse(data: &[u8]) -> Result<ContextQuery, BadData> {
        let mut data = Cursor(data);
        let name = data.string()?;
        let count = data.u32()? as usize;
        // The count is the peer's word: it is bounded before anything is reserved for it.
        if count > QUERIES_MAX {
            return Err(BadData {
                error: RepErr::TooBig,
                text: "Too many context queries",
            });
        }
        let queries = (0..count)
            .map(|_| data.string())
            .collect::<Result<_, _>>()?;
        data.end()?;
        Ok(ContextQuery { name, queries })
    }
}

// === Writing ===

/// Appends an option as a client sends it.
pub fn push_client_option(out: &mut Vec<u8>, option: OptionId, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.0.to_be_bytes());
    // Built by us, from names of at most STRING_MAX bytes: it fits.
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends a string behind its length.
pub fn push_counted(out: &mut Vec<u8>, text: &str) {
    let text = wire_str(text).as_bytes();
    let len = u32::try_from(text.len()).unwrap_or(0);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text);
}

/// Appends one reply to an option; the parts of its data follow each other.
pub fn push_reply(out: &mut Vec<u8>, option: OptionId, kind: u32, data: &[&[u8]]) {
    let len: usize = data.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.0.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    // Replies are built here from strings of at most STRING_MAX bytes: they fit.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

/// Appends `NBD_REP_ACK`.
pub fn push_ack(out: &mut Vec<u8>, option: OptionId) {
    push_reply(out, option, Rep::Ack as u32, &[]);
}

/// Appends an error reply with its text.
pub fn push_error(out: &mut Vec<u8>, option: OptionId, error: RepErr, text: &str) {
    push_reply(out, option, error as u32, &[wire_str(text).as_bytes()]);
}

/// Appends one entry of the export list.
pub fn push_server(out: &mut Vec<u8>, export: &ExportInfo) {
    let name = wire_str(&export.name).as_bytes();
    let len = u32::try_from(name.len()).unwrap_or(0).to_be_bytes();
    let parts = [&len[..], name, wire_str(&export.description).as_bytes()];
    push_reply(out, OptionId::LIST, Rep::Server as u32, &parts);
}

/// Appends one metadata context.
pub fn push_context(out: &mut Vec<u8>, option: OptionId, id: u32, name: &str) {
    let parts = [&id.to_be_bytes()[..], wire_str(name).as_bytes()];
    push_reply(out, option, Rep::MetaContext as u32, &parts);
}

/// Appends a piece of information that is a string.
pub fn push_info_text(out: &mut Vec<u8>, option: OptionId, info: u16, text: &str) {
    let parts = [&info.to_be_bytes()[..], wire_str(text).as_bytes()];
    push_reply(out, option, Rep::Info as u32, &parts);
}

/// Appends `NBD_INFO_BLOCK_SIZE`.
pub fn push_info_block_size(out: &mut Vec<u8>, option: OptionId, sizes: BlockSizes) {
    let parts = [
        &INFO_BLOCK_SIZE.to_be_bytes()[..],
        &sizes.minimum.to_be_bytes(),
        &sizes.preferred.to_be_bytes(),
        &sizes.payload_max.to_be_bytes(),
    ];
    push_reply(out, option, Rep::Info as u32, &parts);
}

/// Appends `NBD_INFO_EXPORT`.
pub fn push_info_export(out: &mut Vec<u8>, option: OptionId, size: u64, flags: TransmissionFlags) {
    let parts = [
        &INFO_EXPORT.to_be_bytes()[..],
        &size.to_be_bytes(),
        &flags.bits().to_be_bytes(),
    ];
    push_reply(out, option, Rep::Info as u32, &parts);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_data_is_read_byte_for_byte() {
        let data = b"\0\0\0\x01a\0\x04\0\x03\0\x01\x12\x34\0\x02";
        let query = InfoQuery::parse(data).unwrap();
        assert_eq!(query.name, "a");
        assert_eq!(
            query.wants,
            InfoWants {
                name: true,
                description: true,
                block_size: true
            }
        );
        assert_eq!(
            InfoQuery::parse(b"\0\0\0\0\0\0").unwrap().wants,
            InfoWants::default()
        );
    }

    #[test]
    fn every_cut_and_every_tail_of_option_data_is_invalid() {
        let go = b"\0\0\0\x01a\0\x01\0\x03";
        let meta = b"\0\0\0\x01a\0\0\0\x01\0\0\0\x05base:";
        for len in 0..go.len() {
            assert_eq!(
                InfoQuery::parse(&go[..len]).unwrap_err().error,
                RepErr::Invalid
            );
        }
        for len in 0..meta.len() {
            assert_eq!(
                ContextQuery::parse(&meta[..len]).unwrap_err().error,
                RepErr::Invalid
            );
        }
        assert!(InfoQuery::parse(&[&go[..], b"x"].concat()).is_err());
        assert!(ContextQuery::parse(&[&meta[..], b"x"].concat()).is_err());
    }

    #[test]
    fn lengths_near_the_type_maximum_do_not_wrap() {
        assert!(InfoQuery::parse(b"\xff\xff\xff\xff\0\0").is_err());
        assert!(ContextQuery::parse(b"\0\0\0\0\0\0\0\x01\xff\xff\xff\xffx").is_err());
        let many = ContextQuery::parse(b"\0\0\0\0\xff\xff\xff\xff").unwrap_err();
        assert_eq!(many.error, RepErr::TooBig);
    }

    #[test]
    fn names_are_utf8_without_nul_and_at_most_4096_bytes() {
        assert!(parse_name(&[b'a'; 4096]).is_ok());
        assert!(parse_name(&[b'a'; 4097]).is_err());
        assert!(parse_name(b"a\0b").is_err());
        assert!(parse_name(b"\xff").is_err());
    }

    #[test]
    fn replies_are_written_byte_for_byte() {
        let mut out = Vec::new();
        push_info_export(&mut out, OptionId::GO, 0x1000, TransmissionFlags::HAS_FLAGS);
        assert_eq!(
            out,
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\
              \0\0\0\0\0\0\0\0\x10\0\0\x01"
        );
        out.clear();
        push_error(&mut out, OptionId(99), RepErr::Unsup, "no");
        assert_eq!(
            out,
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x63\x80\0\0\x01\0\0\0\x02no"
        );
        out.clear();
        push_info_block_size(&mut out, OptionId::INFO, BlockSizes::default());
        assert_eq!(
            &out[16..],
            b"\0\0\0\x0e\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"
        );
    }
}
