//! The handshake: from the greeting to a [`Session`], without doing any I/O.
//!
//! Owned by one connection on the control plane. The caller feeds bytes and does what the
//! [`Step`]s say; it may take its time over a lookup (authorization can ask a plugin).
//!
//! ```text
//! bytes -> input() -> Send | LookUp -> found() | List -> list() | StartTls -> tls_established()
//!                   | NeedInput | Enter(Session) | Disconnect
//! ```
//!
//! Invariants: output is handed out before any step that follows it, so a client that does not
//! read cannot make it grow; at most [`OPTION_DATA_MAX`] bytes of input are held; one option is
//! answered at a time, in order. NBD proto: "Fixed newstyle negotiation", "Option haggling".

mod actions;
mod answers;

use super::exports::{ExportInfo, Exports, Lookup, Purpose};
use super::limits::{OPTION_DATA_MAX, OPTIONS_MAX, SKIPPED_BYTES_MAX};
use super::options::{InfoWants, OptionId, RepErr};
use super::reply::ReplyMode;
use super::session::Session;
use super::wire::{ClientFlags, GREETING_MAGIC, HandshakeFlags, OPTION_MAGIC, STRING_MAX};
use answers::SelectedContexts;

/// When a connection is encrypted; constant for the life of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// NOTLS: never.
    #[default]
    None,
    /// FORCEDTLS: before anything else.
    Forced,
    /// SELECTIVETLS: if the client likes, or the export demands.
    Selective,
}

/// What the server is willing to negotiate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// Encryption.
    pub tls: TlsMode,
    /// Offer extended headers.
    pub extended_headers: bool,
}

/// What the caller is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read more from the client.
    NeedInput,
    /// Send [`Haggle::take_output`], then call [`Haggle::input`] with what was not consumed.
    Send,
    /// Find the export, decide whether this client may use it, and call [`Haggle::found`].
    LookUp {
        /// The name as the client says it; empty for the default export.
        name: String,
        /// What the client is after.
        purpose: Purpose,
    },
    /// Call [`Haggle::list`].
    List,
    /// Do the server's side of a TLS handshake, then call [`Haggle::tls_established`]. Bytes
    /// that were read but not consumed were sent in the clear and must not be used.
    StartTls,
    /// The transmission phase begins with the first byte that was not consumed.
    Enter(Box<Session>),
    /// Close the connection.
    Disconnect(Disconnect),
}

/// Why a handshake ended without a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Disconnect {
    /// `NBD_OPT_ABORT`. Its acknowledgement may find the client gone.
    #[error("the client aborted the negotiation")]
    Aborted,
    /// The client's flags have bits that were not offered.
    #[error("the client set unknown handshake flags 0x{0:x}")]
    ClientFlags(u32),
    /// An option began with something else than `IHAVEOPT`.
    #[error("bad option magic")]
    OptionMagic,
    /// Without fixed newstyle only `NBD_OPT_EXPORT_NAME` exists.
    #[error("option {0} without fixed newstyle negotiation")]
    NotFixedNewstyle(u32),
    /// More than [`OPTIONS_MAX`].
    #[error("too many options")]
    TooManyOptions,
    /// More option data than [`SKIPPED_BYTES_MAX`].
    #[error("too much option data")]
    TooMuchData,
    /// `NBD_OPT_EXPORT_NAME` has no other way to be refused.
    #[error("export refused: {0}")]
    ExportName(&'static str),
    /// Bytes in the clear behind `NBD_OPT_STARTTLS`.
    #[error("plaintext behind STARTTLS")]
    PlaintextBehindStartTls,
    /// [`Haggle::input`] was called after the handshake was over.
    #[error("the handshake is over")]
    Over,
}

/// One handshake.
#[derive(Debug)]
pub struct Haggle {
    config: Config,
    tls_up: bool,
    client: ClientFlags,
    mode: ReplyMode,
    contexts: Option<SelectedContexts>,
    options: u32,
    skipped: u64,
    phase: Phase,
    /// The header or data that is being received.
    buffer: Vec<u8>,
    out: Vec<u8>,
}

#[derive(Debug)]
enum Phase {
    ClientFlags,
    Header,
    Data {
        option: OptionId,
        len: usize,
    },
    Skip {
        option: OptionId,
        left: u32,
        then: Then,
    },
    Asking(Question),
    Listing,
    StartTls,
    Enter(Box<Session>),
    Over(Disconnect),
}

/// What an option whose data is thrown away comes to.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// It is carried out.
    Act,
    /// It is refused, with QEMU's words where QEMU has some.
    Refuse(RepErr, Text),
}

#[derive(Debug, Clone, Copy)]
enum Text {
    NotBeforeTls,
    NoData,
    TooBig,
    Unsupported,
}

/// An option that waits for the caller's answer.
#[derive(Debug)]
struct Question {
    option: OptionId,
    name: String,
    kind: Asked,
}

#[derive(Debug)]
enum Asked {
    Info(InfoWants),
    ExportName,
    Contexts(Vec<String>),
}

impl Haggle {
    /// A handshake whose first output is the greeting.
    #[must_use]
    pub fn new(config: Config) -> Haggle {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&flags.bits().to_be_bytes());
        Haggle {
            config,
            tls_up: false,
            client: ClientFlags::empty(),
            mode: ReplyMode::Simple,
            contexts: None,
            options: 0,
            skipped: 0,
            phase: Phase::ClientFlags,
            buffer: Vec::new(),
            out,
        }
    }

    /// What is to be sent, once.
    #[must_use]
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// Bytes of the client's that are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.buffer.capacity()
    }

    /// Takes bytes from the client: how many were consumed, and what to do next. Offer the rest
    /// again with the next call.
    pub fn input(&mut self, bytes: &[u8]) -> (usize, Step) {
        let mut rest = bytes;
        let step = self.advance(&mut rest);
        (bytes.len() - rest.len(), step)
    }

    /// [`Haggle::input`] for a caller whose exports answer at once: never asks.
    pub fn drive(&mut self, bytes: &[u8], exports: &dyn Exports) -> (usize, Step) {
        let mut used = 0;
        loop {
            let (consumed, step) = self.input(&bytes[used..]);
            used += consumed;
            match step {
                Step::LookUp { name, .. } => self.found(match exports.find(&name) {
                    Some(export) => Lookup::Found(Box::new(export)),
                    None => Lookup::Unknown,
                }),
                Step::List => self.list(exports),
                step => return (used, step),
            }
        }
    }

    /// The connection is encrypted now; haggling starts anew.
    pub fn tls_established(&mut self) {
        if matches!(self.phase, Phase::StartTls) {
            self.tls_up = true;
            self.phase = Phase::Header;
        }
    }

    fn advance(&mut self, rest: &mut &[u8]) -> Step {
        loop {
            if !self.out.is_empty() {
                return Step::Send;
            }
            match &mut self.phase {
                Phase::ClientFlags => {
                    let Some(flags) = self.gather(rest) else {
                        return Step::NeedInput;
                    };
                    self.client_flags(u32::from_be_bytes(flags));
                }
                Phase::Header => {
                    let Some(header) = self.gather(rest) else {
                        return Step::NeedInput;
                    };
                    self.header(header);
                }
                Phase::Data { option, len } => {
                    let (option, len) = (*option, *len);
                    if !self.fill(rest, len) {
                        return Step::NeedInput;
                    }
                    let data = std::mem::take(&mut self.buffer);
                    self.phase = Phase::Header;
                    self.act_on_data(option, &data);
                }
                Phase::Skip { option, left, then } => {
                    let now = rest.len().min(*left as usize);
                    *rest = &rest[now..];
                    // `now` is at most `left`.
                    *left -= u32::try_from(now).unwrap_or(*left);
                    if *left > 0 {
                        return Step::NeedInput;
                    }
                    let (option, then) = (*option, *then);
                    self.phase = Phase::Header;
                    match then {
                        Then::Act => self.act(option),
                        Then::Refuse(error, text) => self.refuse(option, error, text),
                    }
                }
                Phase::Asking(question) => return question.step(),
                Phase::Listing => return Step::List,
                // CVE-2021-3716: whoever could write into the clear connection may have sent
                // this, hoping that it is taken for the client's words once TLS is up.
                Phase::StartTls if !rest.is_empty() => {
                    self.phase = Phase::Over(Disconnect::PlaintextBehindStartTls);
                }
                Phase::StartTls => return Step::StartTls,
                Phase::Enter(_) => {
                    let over = Phase::Over(Disconnect::Over);
                    if let Phase::Enter(session) = std::mem::replace(&mut self.phase, over) {
                        return Step::Enter(session);
                    }
                }
                Phase::Over(reason) => return Step::Disconnect(*reason),
            }
        }
    }

    // === Receiving ===

    /// Moves bytes into the buffer until it holds `want`.
    fn fill(&mut self, rest: &mut &[u8], want: usize) -> bool {
        let missing = want.saturating_sub(self.buffer.len());
        let (head, tail) = rest.split_at(missing.min(rest.len()));
        self.buffer.extend_from_slice(head);
        *rest = tail;
        self.buffer.len() >= want
    }

    /// The next `N` bytes, once they are all there.
    fn gather<const N: usize>(&mut self, rest: &mut &[u8]) -> Option<[u8; N]> {
        if !self.fill(rest, N) {
            return None;
        }
        let bytes = self.buffer.first_chunk().copied();
        self.buffer.clear();
        bytes
    }

    fn client_flags(&mut self, bits: u32) {
        // "the server MUST close the TCP connection" on flags that it does not know.
        self.phase = match ClientFlags::from_bits(bits) {
            Some(flags) => {
                self.client = flags;
                Phase::Header
            }
            None => Phase::Over(Disconnect::ClientFlags(bits)),
        };
    }

    fn header(&mut self, header: [u8; 16]) {
        let [
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            m6,
            m7,
            o0,
            o1,
            o2,
            o3,
            l0,
            l1,
            l2,
            l3,
        ] = header;
        let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        let option = OptionId(u32::from_be_bytes([o0, o1, o2, o3]));
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        self.phase = self.admit(magic, option, len).unwrap_or_else(Phase::Over);
    }

    /// Decides from the header alone whether the data will be looked at.
    fn admit(&mut self, magic: u64, option: OptionId, len: u32) -> Result<Phase, Disconnect> {
        if magic != OPTION_MAGIC {
            return Err(Disconnect::OptionMagic);
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(Disconnect::TooManyOptions);
        }
        if option == OptionId::EXPORT_NAME {
            return self.admit_export_name(len);
        }
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(Disconnect::NotFixedNewstyle(option.0));
        }
        if option == OptionId::SET_META_CONTEXT {
            // "replaces": even if what follows is refused.
            self.contexts = None;
        }
        let then = match option {
            OptionId::ABORT => Then::Act,
            _ if self.tls_required() && option != OptionId::STARTTLS => {
                Then::Refuse(RepErr::TlsReqd, Text::NotBeforeTls)
            }
            OptionId::EXTENDED_HEADERS if !self.config.extended_headers => {
                Then::Refuse(RepErr::Unsup, Text::Unsupported)
            }
            OptionId::LIST
            | OptionId::STARTTLS
            | OptionId::STRUCTURED_REPLY
            | OptionId::EXTENDED_HEADERS => {
                if len == 0 {
                    Then::Act
                } else {
                    Then::Refuse(RepErr::Invalid, Text::NoData)
                }
            }
            OptionId::INFO
            | OptionId::GO
            | OptionId::LIST_META_CONTEXT
            | OptionId::SET_META_CONTEXT => {
                if len <= OPTION_DATA_MAX {
                    return Ok(Phase::Data {
                        option,
                        len: len as usize,
                    });
                }
                Then::Refuse(RepErr::TooBig, Text::TooBig)
            }
            _ => Then::Refuse(RepErr::Unsup, Text::Unsupported),
        };
        self.skipped += u64::from(len);
        if self.skipped > SKIPPED_BYTES_MAX {
            return Err(Disconnect::TooMuchData);
        }
        Ok(Phase::Skip {
            option,
            left: len,
            then,
        })
    }

    fn admit_export_name(&self, len: u32) -> Result<Phase, Disconnect> {
        let refuse = |why| Err(Disconnect::ExportName(why));
        if self.tls_required() {
            return refuse("TLS is required");
        }
        if self.mode == ReplyMode::Extended {
            return refuse("extended headers need NBD_OPT_GO");
        }
        // CVE-2017-15118: the name's length is looked at before the name is.
        if len as usize > STRING_MAX {
            return refuse("the name is too long");
        }
        Ok(Phase::Data {
            option: OptionId::EXPORT_NAME,
            len: len as usize,
        })
    }

    fn tls_required(&self) -> bool {
        self.config.tls == TlsMode::Forced && !self.tls_up
    }

    /// Whether this export is out of reach until the client starts TLS.
    fn hidden(&self, export: &ExportInfo) -> bool {
        export.tls_only && self.config.tls == TlsMode::Selective && !self.tls_up
    }
}

impl Question {
    fn step(&self) -> Step {
        let purpose = match self.option {
            OptionId::EXPORT_NAME => Purpose::ExportName,
            OptionId::INFO => Purpose::Info,
            OptionId::GO => Purpose::Go,
            OptionId::LIST_META_CONTEXT => Purpose::ListContexts,
            _ => Purpose::SetContexts,
        };
        Step::LookUp {
            name: self.name.clone(),
            purpose,
        }
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
