//! Where a server listens, and a blocking stream to it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::encrypted::Encrypted;

/// The address of an NBD listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket in the file system.
    Unix(PathBuf),
    /// A unix socket in the abstract name space (name without the leading NUL).
    Abstract(String),
    /// TCP, version 4 or 6.
    Tcp(SocketAddr),
}

impl Address {
    /// A TCP port of the address that nobody uses now; an error where the address family is off.
    pub fn free_tcp(ip: impl Into<IpAddr>) -> io::Result<Self> {
        TcpListener::bind(SocketAddr::new(ip.into(), 0))?
            .local_addr()
            .map(Self::Tcp)
    }

    /// The NBD URI of `export` here, as libnbd, nbdcopy and QEMU read it.
    pub fn uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Self::Abstract(name) => format!("nbd+unix:///{export}?socket=@{name}"),
            Self::Tcp(addr) => format!("nbd://{addr}/{export}"),
        }
    }

    /// The path of a unix socket; panics for others.
    pub fn path(&self) -> &Path {
        match self {
            Self::Unix(path) => path,
            other => panic!("{other} is not a unix socket path"),
        }
    }

    /// Connects, blocking, without any timeout yet.
    pub fn connect(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Unix(path) => Socket::Unix(UnixStream::connect(path)?),
            Self::Abstract(name) => {
                let addr = UnixAddr::from_abstract_name(name.as_bytes())?;
                Socket::Unix(UnixStream::connect_addr(&addr)?)
            }
            Self::Tcp(addr) => {
                let stream = TcpStream::connect(addr)?;
                stream.set_nodelay(true)?;
                Socket::Tcp(stream)
            }
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract(name) => write!(f, "abstract:{name}"),
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
        }
    }
}

/// A connected stream, unix or TCP.
#[derive(Debug)]
pub enum Socket {
    /// Unix stream.
    Unix(UnixStream),
    /// TCP stream.
    Tcp(TcpStream),
    /// TLS over either; blocking only.
    Tls(Box<Encrypted>),
}

impl Socket {
    /// Bounds every read and write, so that a test against a mute server fails instead of hanging.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_read_timeout(limit).and(s.set_write_timeout(limit)),
            Self::Tcp(s) => s.set_read_timeout(limit).and(s.set_write_timeout(limit)),
            Self::Tls(s) => s.socket().set_timeout(limit),
        }
    }

    /// Turns blocking off or on.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_nonblocking(on),
            Self::Tcp(s) => s.set_nonblocking(on),
            Self::Tls(s) => s.socket().set_nonblocking(on),
        }
    }

    /// Closes one or both directions.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.shutdown(how),
            Self::Tcp(s) => s.shutdown(how),
            Self::Tls(s) => s.socket().shutdown(how),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buffer),
            Self::Tcp(s) => s.read(buffer),
            Self::Tls(s) => s.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buffer),
            Self::Tcp(s) => s.write(buffer),
            Self::Tls(s) => s.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(s) => s.as_raw_fd(),
            Self::Tcp(s) => s.as_raw_fd(),
            Self::Tls(s) => s.socket().as_raw_fd(),
        }
    }
}
