//! The handshake, one option at a time, under the test's full control.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::encrypted::Encrypted;
use super::wire::{self, flag, info, opt, rep};
use super::{Address, Client, Socket};

/// No answer of a healthy server takes this long, even on a loaded machine.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(20);

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// ACK, INFO, an error...
    pub kind: u32,
    /// Everything after the header.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// The human text of an error reply.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).into_owned()
    }
}

/// What INFO or GO told about an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Minimum, preferred, maximum payload.
    pub block_sizes: Option<(u32, u32, u32)>,
    /// Canonical name, when told.
    pub name: Option<String>,
    /// Description, when told.
    pub description: Option<String>,
}

/// A connection in option haggling.
#[derive(Debug)]
pub struct Haggle {
    pub(super) socket: Socket,
    /// Handshake flags of the server's greeting.
    pub server_flags: u16,
    pub(super) structured: bool,
    pub(super) extended: bool,
}

impl Haggle {
    /// Connects and exchanges greetings as a fixed-newstyle, no-zeroes client.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let mut haggle = Self::greeted(address)?;
        haggle.raw(&(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes())?;
        Ok(haggle)
    }

    /// Connects and reads the server's greeting, but sends nothing.
    pub fn greeted(address: &Address) -> io::Result<Self> {
        let socket = address.connect()?;
        socket.set_timeout(Some(ANSWER_TIME_MAX))?;
        let mut haggle = Self {
            socket,
            server_flags: 0,
            structured: false,
            extended: false,
        };
        let magics = (haggle.u64()?, haggle.u64()?);
        if magics != (wire::MAGIC, wire::IHAVEOPT) {
            return Err(bad(format!("greeting {magics:x?}")));
        }
        haggle.server_flags = haggle.u16()?;
        Ok(haggle)
    }

    /// STARTTLS, and a handshake with a server called localhost of this authority (PEM).
    pub fn start_tls(mut self, authority: &[u8]) -> io::Result<Self> {
        match self.verdict(opt::STARTTLS, &[])? {
            rep::ACK => {}
            other => return Err(bad(format!("TLS refused: {other:x}"))),
        }
        let encrypted = Encrypted::connect(self.socket, authority)?;
        self.socket = Socket::Tls(Box::new(encrypted));
        Ok(self)
    }

    /// Sends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends an option, well formed around any data.
    pub fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = wire::IHAVEOPT.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.raw(&message)
    }

    /// Receives one reply.
    pub fn reply(&mut self) -> io::Result<OptionReply> {
        let magic = self.u64()?;
        if magic != wire::REP_MAGIC {
            return Err(bad(format!("option reply magic {magic:x}")));
        }
        let (option, kind, len) = (self.u32()?, self.u32()?, self.u32()?);
        let mut data = vec![0; len as usize];
        self.socket.read_exact(&mut data)?;
        Ok(OptionReply { option, kind, data })
    }

    /// Sends an option and collects replies up to the ACK or error that ends them.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<OptionReply>> {
        self.send(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.reply()?;
            if reply.option != option {
                return Err(bad(format!(
                    "asked option {option}, answered {}",
                    reply.option
                )));
            }
            let last = reply.kind == rep::ACK || reply.kind & rep::ERR != 0;
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }

    /// Asks, and returns only the type of the final reply.
    pub fn verdict(&mut self, option: u32, data: &[u8]) -> io::Result<u32> {
        Ok(self.ask(option, data)?.last().map_or(0, |reply| reply.kind))
    }

    /// Turns structured replies on.
    pub fn structured_replies(&mut self) -> io::Result<()> {
        match self.verdict(opt::STRUCTURED_REPLY, &[])? {
            rep::ACK => self.structured = true,
            other => return Err(bad(format!("structured replies refused: {other:x}"))),
        }
        Ok(())
    }

    /// Turns extended headers on; false when the server has none.
    pub fn extended_headers(&mut self) -> io::Result<bool> {
        self.extended = self.verdict(opt::EXTENDED_HEADERS, &[])? == rep::ACK;
        Ok(self.extended)
    }

    /// Lists or sets metadata contexts; id and name of each that was answered.
    pub fn meta_contexts(
        &mut self,
        option: u32,
        export: &str,
        queries: &[&str],
    ) -> io::Result<Vec<(u32, String)>> {
        let mut contexts = Vec::new();
        for reply in self.ask(option, &meta_query(export, queries))? {
            match reply.kind {
                rep::META_CONTEXT => contexts.push((
                    be32(&reply.data, 0),
                    String::from_utf8_lossy(&reply.data[4..]).into_owned(),
                )),
                rep::ACK => {}
                other => return Err(bad(format!("meta contexts: {other:x} {}", reply.text()))),
            }
        }
        Ok(contexts)
    }

    /// INFO or GO: what the server tells, or the error reply that it gave.
    pub fn query(
        &mut self,
        option: u32,
        export: &str,
        wanted: &[u16],
    ) -> io::Result<Result<ExportInfo, OptionReply>> {
        let mut told = ExportInfo::default();
        for reply in self.ask(option, &info_query(export, wanted))? {
            match reply.kind {
                rep::INFO => told.absorb(&reply.data),
                rep::ACK => {}
                _ => return Ok(Err(reply)),
            }
        }
        Ok(Ok(told))
    }

    /// GO, asking for block sizes; ends the handshake.
    pub fn go(mut self, export: &str) -> io::Result<Client> {
        match self.query(opt::GO, export, &[info::BLOCK_SIZE])? {
            Ok(told) => Ok(Client::new(self, told)),
            Err(reply) => Err(bad(format!(
                "GO refused: {:x} {}",
                reply.kind,
                reply.text()
            ))),
        }
    }

    /// EXPORT_NAME, the old way in.
    pub fn export_name(mut self, export: &str) -> io::Result<Client> {
        self.send(opt::EXPORT_NAME, export.as_bytes())?;
        let told = ExportInfo {
            size: self.u64()?,
            flags: self.u16()?,
            ..ExportInfo::default()
        };
        Ok(Client::new(self, told))
    }

    /// True when the server has closed the connection (any unread bytes are skipped).
    pub fn closed(&mut self) -> bool {
        super::drained_to_end(&mut self.socket)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.socket.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.socket.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.socket.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl ExportInfo {
    /// True when a transmission flag is set.
    pub fn has(&self, bits: u16) -> bool {
        self.flags & (bits | flag::HAS_FLAGS) == bits | flag::HAS_FLAGS
    }

    fn absorb(&mut self, data: &[u8]) {
        let body = &data[2..];
        let text = || Some(String::from_utf8_lossy(body).into_owned());
        match u16::from_be_bytes([data[0], data[1]]) {
            info::EXPORT => {
                self.size = super::be64(body, 0);
                self.flags = super::be16(body, 8);
            }
            info::BLOCK_SIZE => {
                self.block_sizes = Some((be32(body, 0), be32(body, 4), be32(body, 8)));
            }
            info::NAME => self.name = text(),
            info::DESCRIPTION => self.description = text(),
            _ => {}
        }
    }
}

/// The data of INFO and GO.
pub fn info_query(export: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = counted(export);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|id| id.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(export);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query)));
    data
}

fn counted(text: &str) -> Vec<u8> {
    let mut data = (text.len() as u32).to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    data
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    super::be32(bytes, at)
}

pub(super) fn bad(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
