//! Character devices: where monitors get their clients from.
//!
//! Owned by the control plane. A device is made by `--chardev` and taken by one `--monitor`, which
//! then owns its listener. Invariant: a device has one client at a time; further ones wait in the
//! listen backlog.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use outport_export::nbd::Listener;
use rustix::net::AddressFamily;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::descriptors::Arrived;

mod options;
mod passing;

pub(crate) use options::{Backend, Endpoint, parse};

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
    pub(crate) fn stdio() -> Self {
        Self {
            reader: Box::new(tokio::io::stdin()),
            writer: Box::new(tokio::io::stdout()),
            arrived: Arrived::default(),
        }
    }
}

/// Brings clients, one after another.
pub(crate) enum Source {
    /// As many as connect; the first may have connected already.
    Listener {
        listener: Listener,
        first: Option<Client>,
    },
    /// One, and no more.
    Once(Option<Client>),
}

impl Source {
    /// The next client; `None` if there will be no more.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Client>> {
        match self {
            Self::Once(client) => Ok(client.take()),
            Self::Listener { first, .. } if first.is_some() => Ok(first.take()),
            Self::Listener { listener, .. } => {
                let accepted = listener.accept().await?;
                Client::of_socket(accepted.fd).map(Some)
            }
        }
    }

    /// Waits for the first client (`wait=on`).
    pub(crate) async fn await_first(&mut self) -> io::Result<()> {
        if let Self::Listener { listener, first } = self
            && first.is_none()
        {
            let accepted = listener.accept().await?;
            *first = Some(Client::of_socket(accepted.fd)?);
        }
        Ok(())
    }
}

/// All character devices, by id. The source is gone once a monitor has taken it.
#[derive(Default)]
pub(crate) struct Chardevs {
    devices: Vec<(String, Option<Source>)>,
    stdio: bool,
}

impl Chardevs {
    /// Adds a device.
    ///
    /// # Errors
    /// The id is taken.
    pub(crate) fn check_id(&self, id: &str) -> Result<(), String> {
        match self.devices.iter().any(|(other, _)| other == id) {
            true => Err(format!("Duplicate ID '{id}' for chardev")),
            false => Ok(()),
        }
    }

    /// Adds a device whose id was checked.
    pub(crate) fn add(&mut self, id: String, source: Source) {
        self.devices.push((id, Some(source)));
    }

    /// Reserves standard input and output, which only one device can have.
    ///
    /// # Errors
    /// Another device has them.
    pub(crate) fn take_stdio(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.stdio, true) {
            true => Err("cannot use stdio by multiple character devices".into()),
            false => Ok(()),
        }
    }

    /// Gives a device to a monitor.
    ///
    /// # Errors
    /// There is none of that name, or another monitor has it.
    pub(crate) fn take(&mut self, id: &str) -> Result<Source, String> {
        let device = self.devices.iter_mut().find(|(name, _)| name == id);
        let (_, source) = device.ok_or_else(|| format!("chardev \"{id}\" not found"))?;
        source
            .take()
            .ok_or_else(|| format!("chardev '{id}' is already in use"))
    }

    /// Ids, for `qom-list`.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|(id, _)| id.as_str())
    }
}

/// Connects to a listening socket (`server=off`).
///
/// # Errors
/// QEMU's sentence.
pub(crate) async fn connect(endpoint: &Endpoint) -> Result<Client, String> {
    let failed = |error: &io::Error| {
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
pub(crate) fn adopt(fd: OwnedFd) -> Result<Client, String> {
    Client::of_socket(fd).map_err(|error| error.to_string())
}
