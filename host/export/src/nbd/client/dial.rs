//! Reaching a server: names to addresses to a connected socket.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use outport_block::strerror;
use tokio::net::{TcpStream, UnixStream};

/// Where a server listens.
#[derive(Debug)]
pub enum ServerAddress {
    /// TCP.
    Inet {
        /// Host name or address.
        host: String,
        /// Number.
        port: String,
        /// IPv4 wanted or not.
        ipv4: Option<bool>,
        /// IPv6 wanted or not.
        ipv6: Option<bool>,
        /// Probe a silent connection.
        keep_alive: bool,
    },
    /// A unix socket.
    Unix {
        /// File, or abstract name.
        path: PathBuf,
        /// In the abstract namespace.
        is_abstract: bool,
        /// Abstract names: no padding to the structure's length.
        tight: bool,
    },
    /// A socket that is connected already: it serves once.
    Fd(Mutex<Option<OwnedFd>>),
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Unix { path, .. } => write!(f, "{}", path.display()),
            Self::Fd(_) => f.write_str("a passed descriptor"),
        }
    }
}

impl ServerAddress {
    /// The URI of an export, as QEMU spells it.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        let slash = if export.is_empty() { "" } else { "/" };
        match self {
            Self::Inet { host, port, .. } => format!("nbd://{host}:{port}{slash}{export}"),
            Self::Unix { path, .. } => {
                format!("nbd+unix://{slash}{export}?socket={}", path.display())
            }
            Self::Fd(_) => format!("nbd://{slash}{export}"),
        }
    }

    /// A connected socket, not blocking.
    pub(super) async fn connect(&self) -> Result<OwnedFd, String> {
        let failed = |e: &io::Error| {
            if let (Self::Unix { path, .. }, io::ErrorKind::InvalidInput) = (self, e.kind()) {
                return format!("UNIX socket path '{}' is too long", path.display());
            }
            let reason = e.raw_os_error().map_or_else(|| e.to_string(), strerror);
            format!("Failed to connect to '{self}': {reason}")
        };
        match self {
            Self::Inet { .. } => self.connect_tcp().await,
            Self::Unix {
                path,
                is_abstract,
                tight,
            } => {
                let path = match is_abstract {
                    true => abstract_path(path, *tight),
                    false => path.clone(),
                };
                let stream = UnixStream::connect(path).await.map_err(|e| failed(&e))?;
                let stream = stream.into_std().map_err(|e| failed(&e))?;
                Ok(stream.into())
            }
            Self::Fd(fd) => {
                let fd = fd.lock().unwrap_or_else(PoisonError::into_inner).take();
                fd.ok_or_else(|| "A passed descriptor cannot be connected again".to_owned())
            }
        }
    }

    async fn connect_tcp(&self) -> Result<OwnedFd, String> {
        let Self::Inet {
            host,
            port,
            ipv4,
            ipv6,
            keep_alive,
        } = self
        else {
            return Err("not a TCP address".to_owned());
        };
        let unresolved = |why: &str| format!("address resolution failed for {self}: {why}");
        let number: u16 = port
            .parse()
            .map_err(|_| unresolved("Servname not supported for ai_socktype"))?;
        let found = tokio::net::lookup_host((host.as_str(), number)).await;
        let found = found.map_err(|_| unresolved("Name or service not known"))?;
        let mut last = unresolved("Name or service not known");
        for address in found.filter(|address| is_wanted(address, *ipv4, *ipv6)) {
            let connected = match TcpStream::connect(address).await {
                Ok(stream) => stream.set_nodelay(true).and_then(|()| stream.into_std()),
                Err(e) => Err(e),
            };
            match connected {
                Ok(stream) => {
                    if *keep_alive {
                        // Only a hint: without it a dead server is noticed later.
                        let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
                    }
                    return Ok(stream.into());
                }
                Err(e) => {
                    let reason = e.raw_os_error().map_or_else(|| e.to_string(), strerror);
                    last = format!("Failed to connect to '{self}': {reason}");
                }
            }
        }
        Err(last)
    }
}

/// `ipv4` alone means only IPv4, and so on, as for listeners.
fn is_wanted(address: &SocketAddr, ipv4: Option<bool>, ipv6: Option<bool>) -> bool {
    let (mine, other) = if address.is_ipv4() {
        (ipv4, ipv6)
    } else {
        (ipv6, ipv4)
    };
    mine.unwrap_or(other != Some(true))
}

/// The path by which tokio knows a name in the abstract namespace.
fn abstract_path(name: &Path, tight: bool) -> PathBuf {
    let mut bytes = vec![0];
    bytes.extend_from_slice(name.as_os_str().as_bytes());
    if !tight {
        // The padded form has a fixed length of 107 bytes after the NUL.
        bytes.resize(108.max(bytes.len()), 0);
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}
