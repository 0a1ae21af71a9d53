//! A connection's bytes, in the clear or through TLS.
//!
//! The two callers differ in what they do while nothing moves: handshakes wait (`receive`, `send`),
//! the transmission phase goes on with something else (`try_receive`, [`super::out`]). Owned by one
//! connection. Invariant: once TLS began, no byte of the network reaches the caller around it.

use std::fmt;
use std::io::{self, IoSlice, Write};
use std::os::fd::OwnedFd;

use rustix::io::Errno as SysErrno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::socket;
use crate::tls::{Failure, Plain, Session};

/// Plaintext that is encrypted before it is sent: four full records, which stay in the cache.
pub(super) const SEAL_MAX: usize = 64 << 10;

/// A connection.
#[derive(Debug)]
pub(super) struct Stream {
    fd: AsyncFd<OwnedFd>,
    tls: Option<Box<Session>>,
}

/// Why it cannot go on.
#[derive(Debug)]
pub(super) enum StreamError {
    /// The socket failed.
    System(SysErrno),
    /// TLS failed.
    Tls(Failure),
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(e) => e.fmt(f),
            Self::Tls(e) => write!(f, "TLS: {e}"),
        }
    }
}

impl From<SysErrno> for StreamError {
    fn from(e: SysErrno) -> Self {
        Self::System(e)
    }
}

impl From<Failure> for StreamError {
    fn from(e: Failure) -> Self {
        Self::Tls(e)
    }
}

/// What an attempt to receive came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet; the reactor will tell.
    Nothing,
    /// The other side has closed.
    End,
}

impl Stream {
    /// In the clear.
    pub(super) fn new(fd: AsyncFd<OwnedFd>) -> Self {
        Self { fd, tls: None }
    }

    /// On another thread's reactor, as it was.
    pub(super) fn resume(fd: AsyncFd<OwnedFd>, tls: Option<Box<Session>>) -> Self {
        Self { fd, tls }
    }

    /// For another thread.
    pub(super) fn into_parts(self) -> (OwnedFd, Option<Box<Session>>) {
        (self.fd.into_inner(), self.tls)
    }

    pub(super) fn fd(&self) -> &AsyncFd<OwnedFd> {
        &self.fd
    }

    /// The socket, and what encrypts what goes out.
    pub(super) fn sender(&mut self) -> (&OwnedFd, Option<&mut Session>) {
        (self.fd.get_ref(), self.tls.as_deref_mut())
    }

    /// TLS has something to send of its own or that was written before.
    pub(super) fn wants_send(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_send())
    }

    /// Encrypts everything from here on, after a handshake.
    pub(super) async fn start_tls(&mut self, mut session: Session) -> Result<(), StreamError> {
        let shaken = self.shake(&mut session).await;
        if shaken.is_err() {
            // The other side is told why, if it listens.
            let _ = session.send(&mut Socket(self.fd.get_ref()));
        }
        shaken?;
        self.tls = Some(Box::new(session));
        Ok(())
    }

    async fn shake(&self, session: &mut Session) -> Result<(), StreamError> {
        session.shake()?;
        loop {
            self.flush(session).await?;
            if !session.is_handshaking() {
                return Ok(());
            }
            match socket::receive(&self.fd, session.room()).await? {
                0 => return Err(Failure::new("the other side hung up in its handshake").into()),
                n => session.received(n),
            }
            session.shake()?;
        }
    }

    /// What the TLS session is, once there is one.
    pub(super) fn session(&self) -> Option<&Session> {
        self.tls.as_deref()
    }

    /// Receives what there is; 0 at the end of the stream.
    pub(super) async fn receive(&mut self, buf: &mut [u8]) -> Result<usize, StreamError> {
        loop {
            match self.try_receive(buf)? {
                Received::Bytes(n) => return Ok(n),
                Received::End => return Ok(0),
                Received::Nothing => {
                    let _ready = self.fd.readable().await.map_err(socket::errno)?;
                }
            }
        }
    }

    /// Sends all of it.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let Some(mut tls) = self.tls.take() else {
            return Ok(socket::send(&self.fd, bytes).await?);
        };
        let written = tls.write(&[IoSlice::new(bytes)]);
        let sent = self.flush(&mut tls).await;
        self.tls = Some(tls);
        written?;
        sent
    }

    async fn flush(&self, session: &mut Session) -> Result<(), StreamError> {
        while session.wants_send() {
            if self.try_socket(|socket| session.send(socket))? == 0 {
                let _ready = self.fd.writable().await.map_err(socket::errno)?;
            }
        }
        Ok(())
    }

    /// Receives what there is without waiting.
    pub(super) fn try_receive(&mut self, into: &mut [u8]) -> Result<Received, StreamError> {
        let Some(tls) = &mut self.tls else {
            return Ok(receive(&self.fd, into)?);
        };
        loop {
            match tls.read(into)? {
                Plain::Bytes(n) => return Ok(Received::Bytes(n)),
                Plain::End => return Ok(Received::End),
                Plain::Nothing => {}
            }
            match receive(&self.fd, tls.room())? {
                Received::Bytes(n) => tls.received(n),
                other => return Ok(other),
            }
        }
    }

    /// Sends pieces as far as there is room without waiting; 0: there is none now.
    pub(super) fn try_send(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, StreamError> {
        if self.tls.is_none() {
            return self.try_socket(|socket| socket.write_vectored(pieces));
        }
        // One batch at a time: what was encrypted is gone from the owner's queue.
        self.try_flush()?;
        let Some(tls) = self.tls.as_mut().filter(|tls| !tls.wants_send()) else {
            return Ok(0);
        };
        let mut room = SEAL_MAX;
        let mut some = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let now = piece.len().min(room);
            some.push(IoSlice::new(&piece[..now]));
            room -= now;
        }
        Ok(tls.write(&some)?)
    }

    /// Sends what was encrypted before, as far as there is room.
    pub(super) fn try_flush(&mut self) -> Result<(), StreamError> {
        let Some(mut tls) = self.tls.take() else {
            return Ok(());
        };
        let mut sent = Ok(1);
        while tls.wants_send() && matches!(sent, Ok(1..)) {
            sent = self.try_socket(|socket| tls.send(socket));
        }
        self.tls = Some(tls);
        sent.map(drop)
    }

    /// What a call does to the socket; 0: the socket is full.
    fn try_socket(
        &self,
        mut call: impl FnMut(&mut Socket<'_>) -> io::Result<usize>,
    ) -> Result<usize, StreamError> {
        loop {
            match call(&mut Socket(self.fd.get_ref())) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.clear_writable();
                    return Ok(0);
                }
                Err(e) => return Err(socket::errno(e).into()),
            }
        }
    }

    /// The reactor reports edges: tell it that the socket was full.
    pub(super) fn clear_writable(&self) {
        let _ = self.fd.try_io(Interest::WRITABLE, |_| {
            Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock))
        });
    }

    /// Says goodbye if TLS has a way to, as far as the socket takes it.
    pub(super) fn say_goodbye(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.say_goodbye();
            let _ = tls.send(&mut Socket(self.fd.get_ref()));
        }
    }
}

fn receive(fd: &AsyncFd<OwnedFd>, into: &mut [u8]) -> Result<Received, SysErrno> {
    loop {
        match rustix::net::recv(fd.get_ref(), &mut *into, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(Received::End),
            Ok((n, _)) => return Ok(Received::Bytes(n)),
            Err(SysErrno::AGAIN) => {
                // The reactor reports edges: tell it that the socket was empty.
                let _ = fd.try_io(Interest::READABLE, |_| {
                    Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock))
                });
                return Ok(Received::Nothing);
            }
            Err(SysErrno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// A socket that is written to without waiting and without signals.
pub(super) struct Socket<'a>(pub(super) &'a OwnedFd);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut nothing = SendAncillaryBuffer::default();
        Ok(rustix::net::sendmsg(self.0, pieces, &mut nothing, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
