//! One TLS connection without its socket: bytes of the network on one side, the client's on the
//! other.
//!
//! ```text
//!   room/received -> read       plaintext
//!            send <- write      plaintext, cut into full records
//! ```
//!
//! Owned by one connection: on the control plane during its handshake, on an iothread afterwards.
//! Invariant: holds at most one receive buffer and what the owner wrote and has not sent.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};

use outport_block::authz::TlsPeer;
use rustls::{CertificateError, Connection};
use sha2::{Digest, Sha256};

use super::certificate::Certificate;
use super::name::{self, NameError};
use super::openssl;

/// Receive buffer during the handshake: ten thousand clients may stop in theirs.
const ROOM_HANDSHAKE: usize = 4 << 10;

/// Receive buffer afterwards: four full records.
const ROOM: usize = 68 << 10;

/// The session cannot go on, for the log. What tells the other side is ready to be sent.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    distrust: Option<Distrust>,
}

/// Why a certificate was not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distrust {
    /// It is for another host.
    Name,
    /// No known authority issued it.
    Issuer,
    /// Its authority took it back.
    Revoked,
    /// It has expired, was not signed by whom it says, or is for something else.
    Other,
}

impl Failure {
    pub(crate) fn new(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            distrust: None,
        }
    }

    /// Whether and why the other side's certificate was the reason.
    pub(crate) fn distrust(&self) -> Option<Distrust> {
        self.distrust
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<rustls::Error> for Failure {
    fn from(error: rustls::Error) -> Self {
        let distrust = match &error {
            rustls::Error::InvalidCertificate(why) => Some(match why {
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Distrust::Name,
                CertificateError::UnknownIssuer => Distrust::Issuer,
                CertificateError::Revoked => Distrust::Revoked,
                _ => Distrust::Other,
            }),
            _ => None,
        };
        Self {
            text: error.to_string(),
            distrust,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(&error.to_string())
    }
}

/// What there is to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    /// So many bytes.
    Bytes(usize),
    /// Nothing before more is received.
    Nothing,
    /// The other side has said goodbye.
    End,
}

/// One side of a connection.
#[derive(Debug)]
pub(crate) struct Session {
    engine: Engine,
    incoming: Vec<u8>,
    start: usize,
    end: usize,
}

#[derive(Debug)]
enum Engine {
    /// Certificates.
    Rustls(Box<Connection>),
    /// Pre-shared keys.
    OpenSsl(Box<openssl::Connection>),
}

impl Session {
    pub(super) fn rustls(mut connection: Connection) -> Self {
        // The owner bounds what it writes.
        connection.set_buffer_limit(None);
        Self::of(Engine::Rustls(Box::new(connection)))
    }

    pub(super) fn openssl(connection: openssl::Connection) -> Self {
        Self::of(Engine::OpenSsl(Box::new(connection)))
    }

    fn of(engine: Engine) -> Self {
        Self {
            engine,
            incoming: Vec::new(),
            start: 0,
            end: 0,
        }
    }

    /// Room for bytes from the network; empty while what was received is not read.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            let wanted = match self.is_handshaking() {
                true => ROOM_HANDSHAKE,
                false => ROOM,
            };
            self.incoming.resize(wanted, 0);
        }
        &mut self.incoming[self.end..]
    }

    /// So many bytes came into the room.
    pub(crate) fn received(&mut self, len: usize) {
        self.end = (self.end + len).min(self.incoming.len());
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        match &self.engine {
            Engine::Rustls(connection) => connection.is_handshaking(),
            Engine::OpenSsl(connection) => connection.is_handshaking(),
        }
    }

    /// Goes on with the handshake with what was received.
    pub(crate) fn shake(&mut self) -> Result<(), Failure> {
        if let Engine::OpenSsl(connection) = &mut self.engine {
            connection.received(&self.incoming[self.start..self.end])?;
            self.start = self.end;
            return connection.shake();
        }
        while self.start < self.end && self.is_handshaking() {
            self.digest()?;
        }
        Ok(())
    }

    /// Gives the engine a piece of what was received.
    fn digest(&mut self) -> Result<(), Failure> {
        match &mut self.engine {
            Engine::Rustls(connection) => {
                let mut rest = &self.incoming[self.start..self.end];
                self.start += connection.read_tls(&mut rest)?;
                connection.process_new_packets()?;
            }
            Engine::OpenSsl(connection) => {
                connection.received(&self.incoming[self.start..self.end])?;
                self.start = self.end;
            }
        }
        Ok(())
    }

    /// Plaintext that came.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Result<Plain, Failure> {
        loop {
            let read = match &mut self.engine {
                Engine::Rustls(connection) => match connection.reader().read(into) {
                    Ok(0) => Plain::End,
                    Ok(n) => Plain::Bytes(n),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => Plain::Nothing,
                    Err(e) => return Err(e.into()),
                },
                Engine::OpenSsl(connection) => connection.read(into)?,
            };
            if read != Plain::Nothing {
                return Ok(read);
            }
            if self.start == self.end {
                return Ok(Plain::Nothing);
            }
            self.digest()?;
        }
    }

    /// Takes plaintext, all pieces as one; how much of it.
    pub(crate) fn write(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, Failure> {
        match &mut self.engine {
            Engine::Rustls(connection) => Ok(connection.writer().write_vectored(pieces)?),
            Engine::OpenSsl(connection) => connection.write(pieces),
        }
    }

    /// Whether there is something for the network.
    pub(crate) fn wants_send(&self) -> bool {
        match &self.engine {
            Engine::Rustls(connection) => connection.wants_write(),
            Engine::OpenSsl(connection) => connection.wants_send(),
        }
    }

    /// Gives the network one piece.
    pub(crate) fn send(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        match &mut self.engine {
            Engine::Rustls(connection) => connection.write_tls(to),
            Engine::OpenSsl(connection) => connection.send(to),
        }
    }

    /// Nothing will be written any more.
    pub(crate) fn say_goodbye(&mut self) {
        match &mut self.engine {
            Engine::Rustls(connection) => connection.send_close_notify(),
            Engine::OpenSsl(connection) => connection.say_goodbye(),
        }
    }

    /// What the handshake proved of the other side.
    ///
    /// # Errors
    /// Its certificate has no name that rules could be about.
    pub(crate) fn proven(&self) -> Result<Proven, String> {
        let connection = match &self.engine {
            Engine::Rustls(connection) => connection,
            Engine::OpenSsl(connection) => {
                return Ok(Proven {
                    tls: TlsPeer {
                        psk_user: connection.user(),
                        ..TlsPeer::default()
                    },
                    ..Proven::default()
                });
            }
        };
        let Some(own) = connection.peer_certificates().and_then(<[_]>::first) else {
            return Ok(Proven::default());
        };
        let unnamed = |e: NameError| format!("Cannot get client distinguished name: {e}");
        let parsed = Certificate::parse(own).map_err(|_| unnamed(NameError::Malformed))?;
        let names = parsed.alt_names.unwrap_or_default();
        Ok(Proven {
            dn: Some(name::spell(parsed.subject).map_err(unnamed)?),
            has_certificate: true,
            tls: TlsPeer {
                issuer: name::spell(parsed.issuer).ok(),
                fingerprint: Some(name::hex(&Sha256::digest(own))),
                subject_alt_names: names.iter().map(ToString::to_string).collect(),
                psk_user: None,
            },
        })
    }
}

/// What a handshake proved of the other side.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    /// The distinguished name, as QEMU spells it.
    pub(crate) dn: Option<String>,
    pub(crate) has_certificate: bool,
    pub(crate) tls: TlsPeer,
}
