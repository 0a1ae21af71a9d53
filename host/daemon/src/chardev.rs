//! Character devices: where monitors get their clients from.
//!
//! Owned by the control plane. A device is made by `--chardev` or `chardev-add` and used by one
//! monitor at a time. Invariant: a device has one client at a time; further ones wait in the listen
//! backlog.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use outport_export::nbd::Listener;
use rustix::net::AddressFamily;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::descriptors::Arrived;

mod device;
mod options;
mod passing;

pub(crate) use device::{Chardevs, Device, Frontend, open};
pub(crate) use options::{Backend, Endpoint, from_qmp, parse};

/// Bytes from a client.
pub(crate) type ClientReader = Box<dyn AsyncRead + Unpin>;

/// A connected client.
pub(crate) struct Client {
    pub(crate) reader: ClientReader,
    pub(crate) writer: Box<dyn AsyncWrite + Unpin>,
    /// Descriptors that came with its bytes; only unix sockets bring any.
    pub(crate) arrived: Arrived,
}

impl Client {
    fn of_stream(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            arrived: Arrived::default(),
        }
    }

    /// A unix socket: bytes, and descriptors with them.
    fn of_unix(stream: UnixStream) -> Self {
        let arrived = Arrived::default();
        let stream = Rc::new(stream);
        Self {
            reader: Box::new(passing::Reader::new(stream.clone(), arrived.clone())),
            writer: Box::new(passing::Writer::new(stream)),
            arrived,
        }
    }

    /// A stream socket of any family that was connected elsewhere.
    fn of_socket(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        if rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::UNIX {
            Ok(Self::of_unix(UnixStream::from_std(fd.into())?))
        } else {
            Ok(Self::of_stream(TcpStream::from_std(fd.into())?))
        }
    }

    /// The terminal, or whatever standard input and output are.
    fn stdio() -> Self {
        Self {
            reader: Box::new(tokio::io::stdin()),
            writer: Box::new(tokio::io::stdout()),
            arrived: Arrived::default(),
        }
    }
}

/// Brings clients, one after another.
enum Source {
    /// As many as connect; the first may have connected already.
    Listener {
        listener: Listener,
        first: Option<Client>,
    },
    /// One, and no more.
    Once(Option<Client>),
    /// None, ever.
    Never,
}

impl Source {
    /// The next client; `None` if there will be no more.
    async fn next(&mut self) -> io::Result<Option<Client>> {
        match self {
            Self::Once(client) => Ok(client.take()),
            Self::Never => Ok(None),
            Self::Listener { first, .. } if first.is_some() => Ok(first.take()),
            Self::Listener { listener, .. } => {
                let accepted = listener.accept().await?;
                Client::of_socket(accepted.fd).map(Some)
            }
        }
    }

    /// Waits for the first client (`wait=on`).
    async fn await_first(&mut self) -> io::Result<()> {
        if let Self::Listener { listener, first } = self
            && first.is_none()
        {
            let accepted = listener.accept().await?;
            *first = Some(Client::of_socket(accepted.fd)?);
        }
        Ok(())
    }
}

/// Connects to a listening socket (`server=off`).
///
/// # Errors
/// QEMU's sentence.
async fn connect(endpoint: &Endpoint) -> Result<Client, String> {
    let failed = |error: &io::Error| {
        if let (Endpoint::Unix { path }, io::ErrorKind::InvalidInput) = (endpoint, error.kind()) {
            return format!("UNIX socket path '{}' is too long", path.display());
        }
        let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
        format!("Failed to connect to '{endpoint}': {reason}")
    };
    match endpoint {
        Endpoint::Unix { path } => match UnixStream::connect(path).await {
            Ok(stream) => Ok(Client::of_unix(stream)),
            Err(error) => Err(failed(&error)),
        },
        Endpoint::Inet { host, port } => match TcpStream::connect(format!("{host}:{port}")).await {
            Ok(stream) => Ok(Client::of_stream(stream)),
            Err(error) => Err(failed(&error)),
        },
    }
}

/// A client on a socket that our parent connected.
///
/// # Errors
/// The system's.
fn adopt(fd: OwnedFd) -> Result<Client, String> {
    Client::of_socket(fd).map_err(|error| error.to_string())
}
