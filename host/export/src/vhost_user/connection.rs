//! The socket of a front-end: messages with descriptors in, replies out.
//!
//! One task on the first iothread of the export. Invariant: a message is carried out before the
//! next one is read, and descriptors that no message wanted are closed.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno as SysErrno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::unix::AsyncFd;

use super::limits::REGIONS_PER_TABLE;
use super::wire::{HEADER, Header};

/// Why it ended, for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the front-end left")]
    Left,
    #[error("the export was shut down")]
    ShutDown,
    #[error("{0}")]
    Protocol(String),
    #[error("{0}")]
    System(SysErrno),
}

impl From<SysErrno> for End {
    fn from(e: SysErrno) -> Self {
        match e {
            SysErrno::PIPE | SysErrno::CONNRESET => Self::Left,
            other => Self::System(other),
        }
    }
}

/// A message, not yet understood.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What is sent back.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// A socket.
pub(super) struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Know it to this thread's reactor.
    pub(super) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        outport_block::engine::register(fd).map(Self)
    }

    /// The next message.
    pub(super) async fn receive(&self) -> Result<Message, End> {
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        self.fill(&mut header, &mut fds, true).await?;
        let header = Header::parse(&header).map_err(|e| End::Protocol(e.to_string()))?;
        let mut payload = vec![0; header.size];
        self.fill(&mut payload, &mut fds, false).await?;
        Ok(Message {
            header,
            payload,
            fds,
        })
    }

    async fn fill(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        mut may_end: bool,
    ) -> Result<(), End> {
        let mut have = 0;
        while have < buf.len() {
            let mut ready = self.0.readable().await.map_err(|_| End::Left)?;
            match receive_some(&self.0, &mut buf[have..], fds) {
                Ok(0) if may_end => return Err(End::Left),
                Ok(0) => return Err(End::Protocol("a message that ends midway".into())),
                Ok(n) => {
                    have += n;
                    may_end = false;
                }
                Err(SysErrno::AGAIN) => ready.clear_ready(),
                Err(SysErrno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            if fds.len() > REGIONS_PER_TABLE {
                return Err(End::Protocol("a message with too many descriptors".into()));
            }
        }
        Ok(())
    }

    /// Send a reply.
    pub(super) async fn send(&self, reply: &Reply) -> Result<(), End> {
        let mut sent = 0;
        while sent < reply.bytes.len() {
            let mut ready = self.0.writable().await.map_err(|_| End::Left)?;
            let fd = reply.fd.as_ref().filter(|_| sent == 0);
            match send_some(&self.0, &reply.bytes[sent..], fd) {
                Ok(n) => sent += n,
                Err(SysErrno::AGAIN) => ready.clear_ready(),
                Err(SysErrno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

fn receive_some(
    socket: &AsyncFd<OwnedFd>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, SysErrno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_PER_TABLE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut into = [IoSliceMut::new(buf)];
    let received = rustix::net::recvmsg(socket, &mut into, &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}

fn send_some(
    socket: &AsyncFd<OwnedFd>,
    bytes: &[u8],
    fd: Option<&OwnedFd>,
) -> Result<usize, SysErrno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}
