//! The client's side of the handshake: bytes in, bytes out.
//!
//! Pure; driven by [`super::link`], by tests and by a fuzzer. It asks for the most that a server
//! may have and takes what it gets: extended headers, else structured replies, else simple ones;
//! `base:allocation`; GO, else EXPORT_NAME. Invariants: it holds no more than one reply of
//! [`REPLY_MAX`] bytes, believes no number that it did not check, and ends after a bounded number
//! of replies. The sentences are QEMU's. NBD proto: "Newstyle negotiation".

use super::super::options::{
    INFO_BLOCK_SIZE, INFO_EXPORT, OptionId, Rep, push_client_option, push_counted,
};
use super::super::reply::ReplyMode;
use super::super::wire::{
    ClientFlags, EXPORT_NAME_PADDING, GREETING_MAGIC, HandshakeFlags, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, TransmissionFlags,
};

/// Bytes of one reply: names and texts have at most 4096, and a little more is no attack.
pub const REPLY_MAX: u32 = 64 << 10;

/// Pieces of information in answer to one GO: the protocol names four.
const INFOS_MAX: u32 = 64;

/// The first server that there was wrote this where options are announced today.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

/// Size, flags and padding of an oldstyle server.
const OLDSTYLE_LEN: usize = 8 + 4 + 124;

/// The metadata context that every client wants.
const ALLOCATION: &str = "base:allocation";

const NO_STARTTLS: &str = "Server does not support STARTTLS";

/// Payload that a server takes without saying more.
const PAYLOAD_DEFAULT: u32 = 32 << 20;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// How replies are framed.
    pub mode: ReplyMode,
    /// Bytes of the export.
    pub size: u64,
    /// What the export offers.
    pub flags: TransmissionFlags,
    /// Requests are multiples of this.
    pub block_min: u32,
    /// Requests run best in this size.
    pub preferred: u32,
    /// Bytes of one payload.
    pub payload_max: u32,
    /// The id of `base:allocation`, if the server has it.
    pub allocation: Option<u32>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    NeedInput,
    /// Send [`Handshake::take_output`].
    Send,
    /// Do the client's side of a TLS handshake, then call [`Handshake::tls_established`].
    StartTls,
    /// The transmission phase begins.
    Done(Agreed),
    /// The handshake failed; the sentence says how.
    Fail(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    ServerMagic,
    Oldstyle,
    ServerFlags,
    /// Waits for the reply to this option.
    Option(OptionId),
    /// The server awaits a TLS handshake.
    StartTls,
    /// Waits for size and flags after EXPORT_NAME.
    ExportName,
    Over,
}

/// One handshake.
#[derive(Debug)]
pub struct Handshake {
    export: String,
    /// Nothing but STARTTLS is said in the clear.
    needs_tls: bool,
    state: State,
    output: Vec<u8>,
    no_zeroes: bool,
    agreed: Agreed,
    has_export_info: bool,
    replies: u32,
}

type Outcome = Result<Option<Agreed>, String>;

impl Handshake {
    /// A handshake for the export of this name.
    #[must_use]
    pub fn new(export: &str) -> Self {
        Self {
            export: export.to_owned(),
            needs_tls: false,
            state: State::Magic,
            output: Vec::new(),
            no_zeroes: false,
            agreed: Agreed {
                mode: ReplyMode::Simple,
                size: 0,
                flags: TransmissionFlags::empty(),
                block_min: 1,
                preferred: 4096,
                payload_max: PAYLOAD_DEFAULT,
                allocation: None,
            },
            has_export_info: false,
            replies: 0,
        }
    }

    /// The same for a server that has to encrypt.
    #[must_use]
    pub fn encrypted(export: &str) -> Self {
        Self {
            needs_tls: true,
            ..Self::new(export)
        }
    }

    /// The connection is encrypted now.
    pub fn tls_established(&mut self) {
        if self.state == State::StartTls {
            self.needs_tls = false;
            self.ask(OptionId::EXTENDED_HEADERS);
        }
    }

    /// What is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The sentence for a stream that ended here, or failed for this reason.
    #[must_use]
    pub fn ended(&self, reason: &str) -> String {
        let what = match self.state {
            State::Magic => "initial magic",
            State::ServerMagic => "server magic",
            State::ServerFlags => "server flags",
            State::Oldstyle => "export length",
            State::Option(_) | State::StartTls => "option reply",
            State::ExportName | State::Over => "export length",
        };
        format!("Failed to read {what}: {reason}")
    }

    /// Uses bytes from the front of `input`; says how many, and what to do next.
    pub fn drive(&mut self, input: &[u8]) -> (usize, Step) {
        let mut used = 0;
        loop {
            if !self.output.is_empty() {
                return (used, Step::Send);
            }
            let rest = &input[used..];
            if self.state == State::StartTls {
                // Whoever can write into the clear stream must not be taken for the server.
                return match rest.is_empty() {
                    true => (used, Step::StartTls),
                    false => (used, self.over("Server sent plaintext behind STARTTLS")),
                };
            }
            let len = match self.wants(rest) {
                Ok(len) => len,
                Err(sentence) => return (used, self.over(&sentence)),
            };
            let Some(bytes) = rest.get(..len) else {
                return (used, Step::NeedInput);
            };
            used += len;
            match self.take(bytes) {
                Ok(None) => {}
                Ok(Some(agreed)) => {
                    self.state = State::Over;
                    return (used, Step::Done(agreed));
                }
                Err(sentence) => return (used, self.over(&sentence)),
            }
        }
    }

    fn over(&mut self, sentence: &str) -> Step {
        self.state = State::Over;
        Step::Fail(sentence.to_owned())
    }

    /// Bytes that the next step needs: a whole reply once its length is known.
    fn wants(&self, input: &[u8]) -> Result<usize, String> {
        Ok(match self.state {
            State::Magic | State::ServerMagic => 8,
            State::ServerFlags => 2,
            State::Oldstyle => OLDSTYLE_LEN,
            State::ExportName if self.no_zeroes => 10,
            State::ExportName => 10 + EXPORT_NAME_PADDING,
            State::StartTls | State::Over => return Err("the handshake is over".to_owned()),
            State::Option(option) => match input.first_chunk::<20>() {
                None => 20,
                Some(header) => check_header(option, header)?,
            },
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Outcome {
        match self.state {
            State::Magic => match number(bytes) {
                GREETING_MAGIC => self.state = State::ServerMagic,
                other => return Err(format!("Bad initial magic received: 0x{other:016x}")),
            },
            State::ServerMagic => match number(bytes) {
                OPTION_MAGIC => self.state = State::ServerFlags,
                OLDSTYLE_MAGIC if self.export.is_empty() => self.state = State::Oldstyle,
                OLDSTYLE_MAGIC => {
                    return Err("Server does not support non-empty export names".to_owned());
                }
                other => return Err(format!("Bad server magic received: 0x{other:x}")),
            },
            State::ServerFlags => self.greet(number(bytes) as u16)?,
            State::Oldstyle if self.needs_tls => return Err(NO_STARTTLS.to_owned()),
            State::Oldstyle => {
                let flags = number(&bytes[8..12]);
                if flags & !0xffff != 0 {
                    return Err(format!("Unexpected export flags 0x{flags:x}"));
                }
                self.describe(number(&bytes[..8]), flags as u16);
                return self.finish();
            }
            State::ExportName => {
                self.describe(number(&bytes[..8]), number(&bytes[8..10]) as u16);
                return self.finish();
            }
            State::Option(option) => {
                let kind = number(&bytes[12..16]) as u32;
                return self.reply(option, kind, &bytes[20..]);
            }
            State::StartTls | State::Over => {}
        }
        Ok(None)
    }

    fn greet(&mut self, bits: u16) -> Result<(), String> {
        let server = HandshakeFlags::from_bits_truncate(bits);
        let mut flags = ClientFlags::empty();
        let fixed = server.contains(HandshakeFlags::FIXED_NEWSTYLE);
        flags.set(ClientFlags::FIXED_NEWSTYLE, fixed);
        self.no_zeroes = server.contains(HandshakeFlags::NO_ZEROES);
        flags.set(ClientFlags::NO_ZEROES, self.no_zeroes);
        self.output.extend_from_slice(&flags.bits().to_be_bytes());
        // A server that is not fixed may hang up over any option but EXPORT_NAME.
        self.ask(match (fixed, self.needs_tls) {
            (true, true) => OptionId::STARTTLS,
            (true, false) => OptionId::EXTENDED_HEADERS,
            (false, true) => return Err(NO_STARTTLS.to_owned()),
            (false, false) => OptionId::EXPORT_NAME,
        });
        Ok(())
    }

    fn ask(&mut self, option: OptionId) {
        let mut data = Vec::new();
        match option {
            OptionId::EXPORT_NAME => data.extend_from_slice(self.export.as_bytes()),
            OptionId::SET_META_CONTEXT => {
                push_counted(&mut data, &self.export);
                data.extend_from_slice(&1_u32.to_be_bytes());
                push_counted(&mut data, ALLOCATION);
            }
            OptionId::GO => {
                push_counted(&mut data, &self.export);
                data.extend_from_slice(&1_u16.to_be_bytes());
                data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
            }
            _ => {}
        }
        push_client_option(&mut self.output, option, &data);
        self.replies = 0;
        self.state = match option {
            OptionId::EXPORT_NAME => State::ExportName,
            option => State::Option(option),
        };
    }

    /// One reply to `option`.
    fn reply(&mut self, option: OptionId, kind: u32, data: &[u8]) -> Outcome {
        self.replies += 1;
        let refused = kind >> 31 == 1;
        if kind == Rep::Ack as u32 && !data.is_empty() {
            return Err(format!(
                "Option {} ('{}') response length is {} (it should be zero)",
                option.0,
                option_name(option),
                data.len()
            ));
        }
        match option {
            OptionId::GO => return self.reply_to_go(kind, data),
            OptionId::STARTTLS if kind == Rep::Ack as u32 => self.state = State::StartTls,
            OptionId::STARTTLS if refused => return Err(refusal(kind, option)),
            OptionId::SET_META_CONTEXT => return self.reply_to_context(kind, data),
            _ if kind == Rep::Ack as u32 => {
                self.agreed.mode = match option {
                    OptionId::EXTENDED_HEADERS => ReplyMode::Extended,
                    _ => ReplyMode::Structured,
                };
                self.ask(OptionId::SET_META_CONTEXT);
            }
            OptionId::EXTENDED_HEADERS if refused => self.ask(OptionId::STRUCTURED_REPLY),
            _ if refused => self.ask(OptionId::GO),
            _ => return Err(unexpected(option, kind)),
        }
        Ok(None)
    }

    fn reply_to_context(&mut self, kind: u32, data: &[u8]) -> Outcome {
        if kind == Rep::MetaContext as u32 {
            let Some((id, name)) = data.split_first_chunk::<4>().filter(|(_, n)| !n.is_empty())
            else {
                return Err(format!(
                    "Failed to negotiate meta context, server answered with unexpected length {}",
                    data.len()
                ));
            };
            if name != ALLOCATION.as_bytes() {
                return Err(format!(
                    "Failed to negotiate meta context '{ALLOCATION}', server answered with \
                     different context '{}'",
                    shown(name)
                ));
            }
            if self.agreed.allocation.is_some() {
                return Err("Server answered with more than one context".to_owned());
            }
            self.agreed.allocation = Some(u32::from_be_bytes(*id));
            return Ok(None);
        }
        let refused = kind >> 31 == 1;
        if refused {
            self.agreed.allocation = None;
        } else if kind != Rep::Ack as u32 {
            return Err(format!(
                "Unexpected reply type {kind} ({}), expected {} (meta context)",
                reply_name(kind),
                Rep::MetaContext as u32
            ));
        }
        self.ask(OptionId::GO);
        Ok(None)
    }

    fn reply_to_go(&mut self, kind: u32, data: &[u8]) -> Outcome {
        if kind == Rep::Ack as u32 {
            if !self.has_export_info {
                return Err("broken server omitted NBD_INFO_EXPORT".to_owned());
            }
            return self.finish();
        }
        if kind == super::super::options::RepErr::Unsup as u32 {
            self.ask(OptionId::EXPORT_NAME);
            return Ok(None);
        }
        if kind >> 31 == 1 {
            tracing::debug!(
                export = self.export,
                said = shown(data),
                "refused by the server"
            );
            return Err(refusal(kind, OptionId::GO));
        }
        if kind != Rep::Info as u32 {
            return Err(format!(
                "unexpected reply type {kind} ({}), expected 3 (info)",
                reply_name(kind)
            ));
        }
        if self.replies > INFOS_MAX {
            return Err("server sends information without end".to_owned());
        }
        let Some((id, data)) = data.split_first_chunk::<2>() else {
            return Err(format!("NBD_REP_INFO length {} is too short", data.len()));
        };
        self.learn(u16::from_be_bytes(*id), data)
    }

    /// One piece of information.
    fn learn(&mut self, id: u16, data: &[u8]) -> Outcome {
        let sized = |len| match data.len() == len {
            true => Ok(()),
            false => Err(format!(
                "remaining export info len {} is unexpected size",
                data.len()
            )),
        };
        match id {
            INFO_EXPORT => {
                sized(10)?;
                self.describe(number(&data[..8]), number(&data[8..10]) as u16);
            }
            INFO_BLOCK_SIZE => {
                sized(12)?;
                let [min, preferred, max] = [0, 4, 8].map(|at| number(&data[at..at + 4]) as u32);
                self.block_sizes(min, preferred, max)?;
            }
            _ => {}
        }
        Ok(None)
    }

    fn block_sizes(&mut self, min: u32, preferred: u32, max: u32) -> Result<(), String> {
        if !min.is_power_of_two() {
            return Err(format!(
                "server minimum block size {min} is not a power of two"
            ));
        }
        if min > 0x1_0000 {
            return Err(format!("server minimum block size {min} is too large"));
        }
        if !preferred.is_power_of_two() || preferred < min {
            return Err(format!(
                "server preferred block size {preferred} is not valid"
            ));
        }
        if max < min {
            return Err(format!("server maximum block size {max} is not valid"));
        }
        self.agreed.block_min = min;
        self.agreed.preferred = preferred;
        // Not more than every server takes: larger requests gain nothing.
        self.agreed.payload_max = max.min(PAYLOAD_DEFAULT) / min * min;
        Ok(())
    }

    fn describe(&mut self, size: u64, flags: u16) {
        self.agreed.size = size;
        self.agreed.flags = TransmissionFlags::from_bits_truncate(flags);
        self.has_export_info = self.agreed.flags.contains(TransmissionFlags::HAS_FLAGS);
    }

    fn finish(&mut self) -> Outcome {
        let agreed = self.agreed;
        if !agreed.size.is_multiple_of(u64::from(agreed.block_min)) {
            return Err(format!(
                "export size {} is not multiple of minimum block size {}",
                agreed.size, agreed.block_min
            ));
        }
        if agreed.size > outport_block::ByteRange::END_MAX - 512 {
            return Err(format!("export size {} is too large", agreed.size));
        }
        Ok(Some(agreed))
    }
}

/// Checks the header of a reply; answers the length of all of it.
fn check_header(option: OptionId, header: &[u8; 20]) -> Result<usize, String> {
    if number(&header[..8]) != OPTION_REPLY_MAGIC {
        return Err("Unexpected option reply magic".to_owned());
    }
    let answered = OptionId(number(&header[8..12]) as u32);
    if answered != option {
        return Err(format!(
            "Unexpected option type {} ({}), expected {} ({})",
            answered.0,
            option_name(answered),
            option.0,
            option_name(option)
        ));
    }
    let (kind, len) = (number(&header[12..16]) as u32, number(&header[16..]) as u32);
    if len > REPLY_MAX {
        let name = reply_name(kind);
        return Err(match kind >> 31 {
            1 => format!("server error {kind} ({name}) message is too long"),
            _ => format!("server reply {kind} ({name}) is too long"),
        });
    }
    Ok(20 + len as usize)
}

/// A big-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .take(8)
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A server's text, fit for a sentence.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]);
    text.chars().filter(|c| !c.is_control()).collect()
}

fn unexpected(option: OptionId, kind: u32) -> String {
    format!(
        "Server answered option {} ({}) with unexpected reply {kind} ({})",
        option.0,
        option_name(option),
        reply_name(kind)
    )
}

/// Why there is no export, in QEMU's words.
fn refusal(kind: u32, option: OptionId) -> String {
    let go = format!("option {} ({})", option.0, option_name(option));
    match kind & 0x7fff_ffff {
        2 => format!("Denied by server for {go}"),
        3 => format!("Invalid parameters for {go}"),
        4 => format!("Server lacks support for {go}"),
        5 => format!("TLS negotiation required before {go}"),
        6 => "Requested export not available".to_owned(),
        7 => format!("Server shutting down before {go}"),
        8 => format!("Server requires INFO_BLOCK_SIZE for {go}"),
        _ => format!("Unknown error code when asking for {go}"),
    }
}

fn option_name(option: OptionId) -> &'static str {
    match option {
        OptionId::EXPORT_NAME => "export name",
        OptionId::ABORT => "abort",
        OptionId::LIST => "list",
        OptionId::STARTTLS => "starttls",
        OptionId::INFO => "info",
        OptionId::GO => "go",
        OptionId::STRUCTURED_REPLY => "structured reply",
        OptionId::LIST_META_CONTEXT => "list meta context",
        OptionId::SET_META_CONTEXT => "set meta context",
        OptionId::EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}

fn reply_name(kind: u32) -> &'static str {
    match kind {
        1 => "ack",
        2 => "server",
        3 => "info",
        4 => "meta context",
        0x8000_0001 => "unsupported",
        0x8000_0002 => "denied by policy",
        0x8000_0003 => "invalid",
        0x8000_0004 => "platform lacks support",
        0x8000_0005 => "TLS required",
        0x8000_0006 => "export unknown",
        0x8000_0007 => "server shutting down",
        0x8000_0008 => "block size required",
        0x8000_0009 => "option payload too big",
        0x8000_000a => "extended headers required",
        _ => "<unknown>",
    }
}

#[cfg(test)]
mod tests;
