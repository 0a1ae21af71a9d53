//! TLS around a blocking socket: for load, not for trust, though it does verify the server.

use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::Socket;

/// Ciphertext that is received at once: what a server sends in one go.
const ROOM: usize = 256 << 10;

/// A connection's encryption.
#[derive(Debug)]
pub struct Encrypted {
    socket: Socket,
    connection: ClientConnection,
    incoming: Vec<u8>,
    start: usize,
    end: usize,
}

impl Encrypted {
    /// Shakes hands with a server called localhost, whose authority is in this PEM file.
    pub fn connect(socket: Socket, authority: &[u8]) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        for found in CertificateDer::pem_slice_iter(authority) {
            let der = found.map_err(io::Error::other)?;
            roots.add(der).map_err(io::Error::other)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(config), name);
        let mut this = Self {
            socket,
            connection: connection.map_err(io::Error::other)?,
            incoming: vec![0; ROOM],
            start: 0,
            end: 0,
        };
        while this.connection.is_handshaking() {
            this.send()?;
            if this.connection.is_handshaking() {
                this.digest()?;
            }
        }
        this.send()?;
        Ok(this)
    }

    /// The socket below.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    fn send(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    /// Takes in a piece of what was received, or receives.
    fn digest(&mut self) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.end = self.socket.read(&mut self.incoming)?;
            if self.end == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut rest = &self.incoming[self.start..self.end];
        self.start += self.connection.read_tls(&mut rest)?;
        let done = self.connection.process_new_packets();
        done.map(drop).map_err(io::Error::other)
    }
}

impl Read for Encrypted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.digest()?,
                done => return done,
            }
        }
    }
}

impl Write for Encrypted {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let len = self.connection.writer().write(buffer)?;
        self.send()?;
        Ok(len)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let len = self.connection.writer().write_vectored(parts)?;
        self.send()?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
