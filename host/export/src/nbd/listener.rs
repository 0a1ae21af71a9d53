//! Listening sockets: binding in QEMU's words, accepting, cleaning up.
//!
//! Control plane. Invariant: a path that holds anything but a socket is never
//! removed, and a socket file that we made is removed with its listener.

use std::ffi::OsStr;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use outport_block::authz::{Peer, Transport};
use outport_block::strerror;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{TcpListener, UnixListener};

/// As many as the kernel allows: clients beyond `max-connections` wait here.
const BACKLOG: i32 = 4096;

/// Where to listen.
#[derive(Debug)]
pub enum Address {
    /// TCP.
    Inet {
        /// Host name or address; empty: all addresses.
        host: String,
        /// Number or service; "0": any free port.
        port: String,
        /// Try ports up to this one.
        to: Option<u16>,
        /// IPv4 wanted or not.
        ipv4: Option<bool>,
        /// IPv6 wanted or not.
        ipv6: Option<bool>,
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
    /// An inherited or passed descriptor.
    Fd(OwnedFd),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// The file to remove, and which inode it was.
    file: Mutex<Option<(PathBuf, u64)>>,
    abstract_name: Option<PathBuf>,
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// TCP; `None` if the system does not tell.
    Inet(Option<SocketAddr>),
    /// A socket file; an empty path for a passed descriptor without one.
    Unix(PathBuf),
    /// A name in the abstract namespace.
    Abstract(PathBuf),
}

/// Whoever connected.
#[derive(Debug)]
pub struct Accepted {
    /// Non-blocking.
    pub fd: OwnedFd,
    /// What the system says of it.
    pub peer: Peer,
}

fn reason(e: &std::io::Error) -> String {
    strerror(e.raw_os_error().unwrap_or(libc_eio()))
}

const fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

impl Listener {
    /// Bind and listen. Call inside a tokio runtime. Waits for nothing but the name of a host.
    ///
    /// # Errors
    /// QEMU's sentences, such as `Failed to bind socket to /p: No such file or
    /// directory`.
    pub async fn bind(address: Address) -> Result<Self, String> {
        match address {
            Address::Inet {
                host,
                port,
                to,
                ipv4,
                ipv6,
            } => bind_tcp(&host, &port, to, ipv4, ipv6).await,
            local => bind_local(local),
        }
    }

    /// As [`Listener::bind`], but never waits, so not for TCP, and a socket that somebody listens
    /// on does not make way.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind_alone(address: Address) -> Result<Self, String> {
        if let Address::Unix {
            path,
            is_abstract: false,
            ..
        } = &address
            && is_listened_on(path)
        {
            let path = path.display();
            return Err(format!(
                "Failed to bind socket to {path}: Address already in use"
            ));
        }
        bind_local(address)
    }

    /// The URI for an export of this name.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        match &self.socket {
            Socket::Tcp(tcp) => match tcp.local_addr() {
                Ok(addr) if addr.ip().is_unspecified() => {
                    format!("nbd://localhost:{}/{export}", addr.port())
                }
                Ok(addr) => format!("nbd://{addr}/{export}"),
                Err(_) => format!("nbd://localhost/{export}"),
            },
            Socket::Unix(_) => {
                let path = match (&*self.file(), &self.abstract_name) {
                    (Some((path, _)), _) => path.display().to_string(),
                    (_, Some(name)) => format!("@{}", name.display()),
                    _ => String::new(),
                };
                format!("nbd+unix:///{export}?socket={path}")
            }
        }
    }

    /// Where it listens: the address that was chosen where several would do.
    #[must_use]
    pub fn bound(&self) -> Bound {
        match (&self.socket, &*self.file(), &self.abstract_name) {
            (Socket::Tcp(tcp), ..) => Bound::Inet(tcp.local_addr().ok()),
            (_, Some((path, _)), _) => Bound::Unix(path.clone()),
            (_, _, Some(name)) => Bound::Abstract(name.clone()),
            _ => Bound::Unix(PathBuf::new()),
        }
    }

    /// Remove the socket file now, whoever still holds the listener.
    pub fn withdraw(&self) {
        if let Some((path, inode)) = self.file().take()
            && std::fs::symlink_metadata(&path)
                .is_ok_and(|m| m.file_type().is_socket() && m.ino() == inode)
        {
            let _ = std::fs::remove_file(path);
        }
    }

    fn file(&self) -> MutexGuard<'_, Option<(PathBuf, u64)>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The TCP port, once bound.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Tcp(tcp) => tcp.local_addr().ok().map(|a| a.port()),
            Socket::Unix(_) => None,
        }
    }

    /// The next client.
    ///
    /// # Errors
    /// The system's; those of one connection are worth another try.
    pub async fn accept(&self) -> std::io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp(tcp) => {
                let (stream, peer) = tcp.accept().await?;
                // Replies are batched by us; the kernel must not wait for more.
                stream.set_nodelay(true)?;
                let fd = OwnedFd::from(stream.into_std()?);
                Ok(Accepted {
                    fd,
                    peer: Peer {
                        transport: Transport::NbdTcp,
                        address: Some(peer.to_string()),
                        ..Peer::default()
                    },
                })
            }
            Socket::Unix(unix) => {
                let (stream, _) = unix.accept().await?;
                let credentials = stream.peer_cred().ok();
                let peer = Peer {
                    transport: Transport::NbdUnix,
                    uid: credentials.map(|c| c.uid()),
                    gid: credentials.map(|c| c.gid()),
                    pid: credentials.and_then(|c| u32::try_from(c.pid()?).ok()),
                    ..Peer::default()
                };
                Ok(Accepted {
                    fd: OwnedFd::from(stream.into_std()?),
                    peer,
                })
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// What needs no name of a host looked up.
fn bind_local(address: Address) -> Result<Listener, String> {
    match address {
        Address::Inet { .. } => {
            Err("Only socket address types 'unix' and 'fd' are supported".into())
        }
        Address::Unix {
            path,
            is_abstract,
            tight,
        } => bind_unix(&path, is_abstract, tight),
        Address::Fd(fd) => adopt(fd),
    }
}

async fn bind_tcp(
    host: &str,
    port: &str,
    to: Option<u16>,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
) -> Result<Listener, String> {
    let unresolved = |why: &str| format!("address resolution failed for {host}:{port}: {why}");
    if (ipv4, ipv6) == (Some(false), Some(false)) {
        return Err("Cannot disable IPv4 and IPv6 at same time".into());
    }
    let first: u16 = match port.parse() {
        Ok(number) => number,
        Err(_) if port.bytes().all(|b| b.is_ascii_digit()) => {
            return Err(unresolved("Servname not supported for ai_socktype"));
        }
        Err(_) => return Err(unresolved("Servname not supported for ai_socktype")),
    };
    let name = if host.is_empty() { "::" } else { host };
    // Elsewhere, unless it is a number: servers of names take their time.
    let resolved = match tokio::net::lookup_host((name, first)).await {
        Ok(list) => list.collect::<Vec<_>>(),
        Err(_) => return Err(unresolved("Name or service not known")),
    };
    let wanted = |a: &SocketAddr| {
        let (mine, other) = if a.is_ipv4() {
            (ipv4, ipv6)
        } else {
            (ipv6, ipv4)
        };
        mine.unwrap_or(other != Some(true))
    };
    let mut addresses: Vec<SocketAddr> = resolved.into_iter().filter(wanted).collect();
    if host.is_empty() && (ipv6 == Some(false) || addresses.is_empty()) {
        addresses = vec![SocketAddr::from(([0, 0, 0, 0], first))];
    }
    let mut last = None;
    for port in first..=to.unwrap_or(first).max(first) {
        for address in &addresses {
            let address = SocketAddr::new(address.ip(), port);
            match listen_tcp(address, ipv4 != Some(false)) {
                Ok(socket) => {
                    return Ok(Listener {
                        socket: Socket::Tcp(socket),
                        file: Mutex::default(),
                        abstract_name: None,
                    });
                }
                Err(e) => last = Some(e),
            }
        }
    }
    let Some(e) = last else {
        return Err(unresolved("Address family for hostname not supported"));
    };
    let what = if e.kind() == std::io::ErrorKind::AddrInUse {
        "Failed to find an available port"
    } else {
        "Failed to bind socket"
    };
    Err(format!("{what}: {}", reason(&e)))
}

fn listen_tcp(address: SocketAddr, dual: bool) -> std::io::Result<TcpListener> {
    use rustix::net::sockopt;
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, !(dual && address.ip().is_unspecified()))?;
    }
    rustix::net::bind(&fd, &address)?;
    rustix::net::listen(&fd, BACKLOG)?;
    TcpListener::from_std(StdTcpListener::from(fd))
}

fn bind_unix(path: &Path, is_abstract: bool, tight: bool) -> Result<Listener, String> {
    let bytes = path.as_os_str().as_bytes();
    let too_long = || format!("UNIX socket path '{}' is too long", path.display());
    let fail = |e: std::io::Error| {
        format!(
            "Failed to bind socket to {}: {}",
            path.display(),
            reason(&e)
        )
    };
    let address = if is_abstract {
        let mut name = bytes.to_vec();
        if !tight {
            // The padded form has a fixed length of 107 bytes after the NUL.
            name.resize(107.max(name.len()), 0);
        }
        SocketAddrUnix::new_abstract_name(&name)
    } else {
        SocketAddrUnix::new(path)
    };
    let address = address.map_err(|_| too_long())?;
    if !is_abstract {
        make_way(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let bound = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|fd| {
            rustix::net::bind(&fd, &address)?;
            rustix::net::listen(&fd, BACKLOG)?;
            Ok(fd)
        });
    let fd = bound.map_err(|e| fail(e.into()))?;
    let file = if is_abstract {
        None
    } else {
        std::fs::symlink_metadata(path)
            .ok()
            .map(|m| (path.to_owned(), m.ino()))
    };
    let socket = UnixListener::from_std(fd.into()).map_err(fail)?;
    let abstract_name = is_abstract.then(|| path.to_owned());
    Ok(Listener {
        socket: Socket::Unix(socket),
        file: Mutex::new(file),
        abstract_name,
    })
}

/// Whether somebody has the socket. One who accepts nobody keeps nobody waiting here.
fn is_listened_on(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let Ok((fd, address)) = fd.and_then(|fd| Ok((fd, SocketAddrUnix::new(path)?))) else {
        return false;
    };
    let connected = rustix::net::connect(&fd, &address);
    matches!(connected, Ok(()) | Err(rustix::io::Errno::AGAIN))
}

/// Remove a stale socket; refuse to remove anything else. (QEMU deletes a
/// regular file at the path.)
fn make_way(path: &Path) -> Result<(), String> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(format!(
            "Failed to bind socket to {}: the path exists and is no socket; remove it or choose \
             another",
            path.display()
        ));
    }
    std::fs::remove_file(path)
        .map_err(|e| format!("Failed to unlink socket {}: {}", path.display(), reason(&e)))
}

/// A descriptor that is a bound socket; it may not listen yet.
fn adopt(fd: OwnedFd) -> Result<Listener, String> {
    let not_socket = || format!("File descriptor '{}' is not a socket", fd.as_raw_fd());
    let domain = rustix::net::sockopt::socket_domain(&fd).map_err(|_| not_socket())?;
    let fail = |e: std::io::Error| format!("Failed to listen on descriptor: {}", reason(&e));
    rustix::io::ioctl_fionbio(&fd, true).map_err(|e| fail(e.into()))?;
    rustix::net::listen(&fd, BACKLOG).map_err(|e| fail(e.into()))?;
    let _ = rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::CLOEXEC);
    let mut abstract_name = None;
    let socket = if domain == AddressFamily::UNIX {
        if let Ok(address) = rustix::net::getsockname(&fd)
            && let Ok(unix) = SocketAddrUnix::try_from(address)
        {
            abstract_name = unix
                .abstract_name()
                .map(|n| PathBuf::from(OsStr::from_bytes(n)));
        }
        UnixListener::from_std(fd.into()).map(Socket::Unix)
    } else {
        TcpListener::from_std(fd.into()).map(Socket::Tcp)
    };
    Ok(Listener {
        socket: socket.map_err(fail)?,
        file: Mutex::default(),
        abstract_name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> Address {
        Address::Unix {
            path: path.to_owned(),
            is_abstract: false,
            tight: true,
        }
    }

    #[tokio::test]
    async fn a_regular_file_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "data").unwrap();
        let error = Listener::bind(unix(&path)).await.unwrap_err();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_stale_socket_makes_way_and_ours_goes_with_us() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(unix(&path)).await.unwrap();
        assert_eq!(
            listener.uri("x"),
            format!("nbd+unix:///x?socket={}", path.display())
        );
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn errors_are_qemus() {
        let missing = Path::new("/nonexistent/s");
        assert_eq!(
            Listener::bind(unix(missing)).await.unwrap_err(),
            "Failed to bind socket to /nonexistent/s: No such file or directory"
        );
        let long = PathBuf::from("/".to_owned() + &"x".repeat(200));
        assert!(
            Listener::bind(unix(&long))
                .await
                .unwrap_err()
                .ends_with("is too long")
        );
    }

    #[tokio::test]
    async fn tcp_tries_the_ports_that_it_may() {
        let bind = |port: u16, to| {
            Listener::bind(Address::Inet {
                host: "127.0.0.1".to_owned(),
                port: port.to_string(),
                to,
                ipv4: None,
                ipv6: None,
            })
        };
        let first = bind(0, None).await.unwrap();
        let port = first.port().unwrap();
        let error = bind(port, None).await.unwrap_err();
        assert_eq!(
            error,
            "Failed to find an available port: Address already in use"
        );
        if let Some(to) = port.checked_add(50) {
            let next = bind(port, Some(to)).await.unwrap();
            assert_ne!(next.port(), Some(port));
        }
    }

    #[tokio::test]
    async fn a_socket_with_a_full_queue_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let flags = SocketFlags::CLOEXEC;
        let socket = |flags| {
            let kind = SocketType::STREAM;
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap()
        };
        let address = SocketAddrUnix::new(&path).unwrap();
        let busy = socket(flags);
        rustix::net::bind(&busy, &address).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = socket(flags | SocketFlags::NONBLOCK);
            if rustix::net::connect(&client, &address).is_err() {
                break;
            }
            waiting.push(client);
        }
        let error = Listener::bind_alone(unix(&path)).unwrap_err();
        assert!(error.ends_with("Address already in use"), "{error}");
    }
}
