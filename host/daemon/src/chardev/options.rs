//! What `--chardev` and `chardev-add` say. Pure.

use std::fmt;
use std::path::PathBuf;

use outport_qmp::Error;
use outport_qmp::qemu_opts::QemuOpts;
use outport_qmp::types::char::{
    ChardevBackend, ChardevBackendBranch, ChardevCommon, ChardevCommonWrapper, ChardevSocket,
    ChardevSocketWrapper, ChardevStdio, ChardevStdioWrapper,
};
use outport_qmp::types::sockets::{
    FdSocketAddress, InetSocketAddress, SocketAddress, SocketAddressBranch, SocketAddressLegacy,
    UnixSocketAddress,
};

use crate::addresses::plain_inet;

/// A character device to make.
pub(crate) struct Parsed {
    pub(crate) id: String,
    pub(crate) backend: Backend,
    /// Deprecated spellings that were used.
    pub(crate) warnings: Vec<String>,
}

/// Where its clients come from.
#[derive(Debug, Clone)]
pub(crate) enum Backend {
    /// Nowhere.
    Null,
    Stdio,
    /// They connect to us; `wait`: startup goes on only when the first has.
    Server {
        address: SocketAddress,
        wait: bool,
    },
    /// We connect to the only one.
    Client(Endpoint),
    /// Our parent connected the only one; the descriptor's number.
    Connected(String),
}

/// Where to connect to.
#[derive(Debug, Clone)]
pub(crate) enum Endpoint {
    Unix { path: PathBuf },
    Inet { host: String, port: String },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path } => write!(f, "{}", path.display()),
            Self::Inet { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Backends that QEMU has and a storage daemon can do without.
const OTHER_BACKENDS: [&str; 8] = [
    "file", "memory", "mux", "parallel", "pipe", "pty", "ringbuf", "udp",
];

/// Options of sockets that would change what is spoken on them.
const OTHER_OPTIONS: [&str; 8] = [
    "logfile",
    "mux",
    "reconnect",
    "reconnect-ms",
    "telnet",
    "tls-authz",
    "tls-creds",
    "websocket",
];

/// Reads the value of `--chardev`.
///
/// # Errors
/// In QEMU's words.
pub(crate) fn parse(text: &str) -> Result<Parsed, Error> {
    let mut opts = QemuOpts::parse(text, Some("backend"))?;
    let warnings = std::mem::take(&mut opts.warnings);
    let id = opts.take_id()?;
    let backend = opts.take("backend");
    let Some(id) = id else {
        return Err(Error::generic("chardev: no id specified"));
    };
    let backend = match backend.as_deref() {
        None => return Err(Error::generic(format!("chardev: \"{id}\" missing backend"))),
        Some("null") => Backend::Null,
        Some("stdio") => {
            let _signals_stay_signals = opts.take_bool("signal")?;
            Backend::Stdio
        }
        Some("socket") => socket(&mut opts)?,
        Some(other) if OTHER_BACKENDS.contains(&other) => {
            return Err(Error::generic(format!(
                "chardev backend '{other}' is not supported"
            )));
        }
        Some(other) => {
            let message = format!("'{other}' is not a valid char driver name");
            return Err(Error::generic(message));
        }
    };
    opts.finish()?;
    Ok(Parsed {
        id,
        backend,
        warnings,
    })
}

fn socket(opts: &mut QemuOpts) -> Result<Backend, Error> {
    for name in OTHER_OPTIONS {
        if opts
            .take(name)
            .is_some_and(|value| value != "off" && value != "0")
        {
            return Err(Error::generic(format!(
                "Parameter '{name}' is not supported"
            )));
        }
    }
    let server = opts.take_bool("server")?.unwrap_or(false);
    let wait = opts.take_bool("wait")?;
    if wait.is_some() && !server {
        return Err(Error::generic(
            "'wait' option is incompatible with socket in client connect mode",
        ));
    }
    let _no_delay_needed = (opts.take_bool("nodelay")?, opts.take_bool("delay")?);
    let (path, host, fd) = (opts.take("path"), opts.take("host"), opts.take("fd"));
    if [&path, &host, &fd].into_iter().flatten().count() > 1 {
        let message = "None or one of 'path', 'fd' or 'host' option required.";
        return Err(Error::generic(message));
    }
    let branch = match (path, host, fd) {
        (Some(path), _, _) => unix(opts, path)?,
        (_, _, Some(str)) => SocketAddressBranch::Fd(FdSocketAddress { str }),
        (_, host, _) => inet(opts, host)?,
    };
    let address = SocketAddress { branch };
    match server {
        true => Ok(Backend::Server {
            address,
            wait: wait.unwrap_or(true),
        }),
        false => client(address),
    }
}

fn client(address: SocketAddress) -> Result<Backend, Error> {
    Ok(match address.branch {
        SocketAddressBranch::Unix(unix) => Backend::Client(Endpoint::Unix {
            path: unix.path.into(),
        }),
        SocketAddressBranch::Inet(inet) => Backend::Client(Endpoint::Inet {
            host: inet.host,
            port: inet.port,
        }),
        SocketAddressBranch::Fd(fd) => Backend::Connected(fd.str),
        SocketAddressBranch::Vsock(_) => return Err(Error::generic("vsock is not supported")),
    })
}

/// Reads what `chardev-add` says.
///
/// # Errors
/// In QEMU's words.
pub(crate) fn from_qmp(backend: ChardevBackend) -> Result<Backend, Error> {
    let socket = match backend.branch {
        ChardevBackendBranch::Null(_) => return Ok(Backend::Null),
        ChardevBackendBranch::Stdio(_) => return Ok(Backend::Stdio),
        ChardevBackendBranch::Socket(wrapper) => wrapper.data,
    };
    let spoken = [socket.telnet, socket.tn3270, socket.websocket];
    for (name, asked) in ["telnet", "tn3270", "websocket"].iter().zip(spoken) {
        if asked == Some(true) {
            return Err(unsupported(name));
        }
    }
    if let Some(id) = socket.tls_creds {
        return Err(Error::generic(format!("No TLS credentials with id '{id}'")));
    }
    for (name, period) in [
        ("reconnect", socket.reconnect),
        ("reconnect-ms", socket.reconnect_ms),
    ] {
        if period.unwrap_or(0) != 0 {
            return Err(unsupported(name));
        }
    }
    if socket.logfile.is_some() {
        return Err(unsupported("logfile"));
    }
    let address = SocketAddress::from(socket.addr);
    match socket.server.unwrap_or(true) {
        true => Ok(Backend::Server {
            address,
            wait: socket.wait.unwrap_or(false),
        }),
        false if socket.wait.is_some() => Err(Error::generic(
            "'wait' option is incompatible with socket in client connect mode",
        )),
        false => client(address),
    }
}

fn unsupported(name: &str) -> Error {
    Error::generic(format!("Parameter '{name}' is not supported"))
}

impl Backend {
    /// What to say to `chardev-add` to have it again. Nobody waits for a client then.
    pub(crate) fn to_qmp(&self) -> ChardevBackend {
        let (addr, server) = match self.clone() {
            Self::Null => {
                let data = ChardevCommon::default();
                let branch = ChardevBackendBranch::Null(ChardevCommonWrapper { data });
                return ChardevBackend { branch };
            }
            Self::Stdio => {
                let data = ChardevStdio::default();
                let branch = ChardevBackendBranch::Stdio(ChardevStdioWrapper { data });
                return ChardevBackend { branch };
            }
            Self::Server { address, .. } => (address.into(), true),
            Self::Client(endpoint) => (endpoint.into(), false),
            Self::Connected(str) => {
                let branch = SocketAddressBranch::Fd(FdSocketAddress { str });
                (SocketAddress { branch }.into(), false)
            }
        };
        let data = ChardevSocket {
            logfile: None,
            logappend: None,
            addr,
            tls_creds: None,
            tls_authz: None,
            server: Some(server),
            wait: server.then_some(false),
            nodelay: None,
            telnet: None,
            tn3270: None,
            websocket: None,
            reconnect: None,
            reconnect_ms: None,
        };
        let branch = ChardevBackendBranch::Socket(Box::new(ChardevSocketWrapper { data }));
        ChardevBackend { branch }
    }
}

impl From<Endpoint> for SocketAddressLegacy {
    fn from(endpoint: Endpoint) -> Self {
        let flat = match endpoint {
            Endpoint::Unix { path } => SocketAddress::unix(path.display().to_string()),
            Endpoint::Inet { host, port } => SocketAddress {
                branch: SocketAddressBranch::Inet(plain_inet(host, port)),
            },
        };
        flat.into()
    }
}

fn unix(opts: &mut QemuOpts, path: String) -> Result<SocketAddressBranch, Error> {
    let r#abstract = opts.take_bool("abstract")?;
    let tight = opts.take_bool("tight")?;
    Ok(SocketAddressBranch::Unix(UnixSocketAddress {
        path,
        r#abstract,
        tight,
    }))
}

fn inet(opts: &mut QemuOpts, host: Option<String>) -> Result<SocketAddressBranch, Error> {
    let Some(port) = opts.take("port") else {
        return Err(Error::generic("chardev: socket: no port given"));
    };
    let to = match opts.take_number("to")? {
        Some(to) => Some(u16::try_from(to).map_err(|_| Error::expects("to", "a port number"))?),
        None => None,
    };
    Ok(SocketAddressBranch::Inet(InetSocketAddress {
        to,
        ipv4: opts.take_bool("ipv4")?,
        ipv6: opts.take_bool("ipv6")?,
        ..plain_inet(host.unwrap_or_default(), port)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(text).err().unwrap().desc
    }

    #[test]
    fn mistakes_have_qemus_words() {
        assert_eq!(error("socket,path=/x"), "chardev: no id specified");
        assert_eq!(
            error("nosuch,id=c"),
            "'nosuch' is not a valid char driver name"
        );
        assert_eq!(
            error("socket,id=c,host=localhost"),
            "chardev: socket: no port given"
        );
        assert_eq!(error("stdio,id=c,foo=1"), "Invalid parameter 'foo'");
    }

    #[test]
    fn a_server_waits_unless_told_not_to() {
        let wait = |text| match parse(text).unwrap().backend {
            Backend::Server { wait, .. } => wait,
            _ => panic!("it is a server"),
        };
        assert!(wait("socket,id=c,path=/x,server=on"));
        assert!(!wait("socket,id=c,path=/x,server=on,wait=off"));
        let parsed = parse("socket,id=c,path=/x,server,nowait").unwrap();
        assert_eq!(parsed.warnings.len(), 2);
    }
}
