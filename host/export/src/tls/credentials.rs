//! Credentials: what sessions are made with, replaceable while clients are connected.
//!
//! Made on the control plane, used there and by links of `nbd` nodes. Invariant: a session keeps
//! what it began with; the next one gets what there is then.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use super::openssl;
use super::session::Session;

/// Which side of a handshake credentials are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The one that connects.
    Client,
    /// The one that accepts.
    Server,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

/// What was read from a directory of credentials.
#[derive(Clone, Debug)]
pub struct Loaded(pub(super) Material);

/// What sessions are made from.
#[derive(Clone, Debug)]
pub(super) enum Material {
    X509Server(Arc<ServerConfig>),
    X509Client {
        config: Arc<ClientConfig>,
        /// Servers have to prove their name.
        verifies: bool,
    },
    Psk(Arc<openssl::Context>),
}

impl Loaded {
    /// The side that it is for.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        match &self.0 {
            Material::Psk(context) => context.endpoint(),
            Material::X509Server(_) => Endpoint::Server,
            Material::X509Client { .. } => Endpoint::Client,
        }
    }
}

/// Credentials in use.
#[derive(Debug)]
pub struct Credentials(RwLock<Loaded>);

impl Credentials {
    /// Shares what was loaded.
    #[must_use]
    pub fn new(loaded: Loaded) -> Arc<Self> {
        Arc::new(Self(RwLock::new(loaded)))
    }

    /// Whoever connects from now on gets `loaded`; sessions go on with what they have.
    pub fn replace(&self, loaded: Loaded) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = loaded;
    }

    /// What there is now.
    #[must_use]
    pub fn current(&self) -> Loaded {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The side that they are for.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.current().endpoint()
    }

    /// The server's side of a new session.
    pub(crate) fn accept(&self) -> Result<Session, String> {
        match self.current().0 {
            Material::X509Server(config) => {
                let connection = ServerConnection::new(config).map_err(|e| e.to_string())?;
                Ok(Session::rustls(connection.into()))
            }
            Material::Psk(context) if context.endpoint() == Endpoint::Server => {
                openssl::Connection::new(context).map(Session::openssl)
            }
            Material::X509Client { .. } | Material::Psk(_) => {
                Err("Expected TLS credentials for a server endpoint".to_owned())
            }
        }
    }

    /// The client's side of a new session with the server of this name.
    pub(crate) fn connect(&self, host: Option<&str>) -> Result<Session, String> {
        match self.current().0 {
            Material::X509Client { config, verifies } => {
                let name = match host {
                    Some(host) => server_name(host)?,
                    None if verifies => {
                        return Err("No hostname for certificate validation".to_owned());
                    }
                    None => ServerName::IpAddress(IpAddr::from([0, 0, 0, 0]).into()),
                };
                let connection = ClientConnection::new(config, name).map_err(|e| e.to_string())?;
                Ok(Session::rustls(connection.into()))
            }
            Material::Psk(context) if context.endpoint() == Endpoint::Client => {
                openssl::Connection::new(context).map(Session::openssl)
            }
            Material::X509Server(_) | Material::Psk(_) => {
                Err("Expected TLS credentials for a client endpoint".to_owned())
            }
        }
    }
}

/// # Errors
/// No certificate can have this name.
fn server_name(host: &str) -> Result<ServerName<'static>, String> {
    let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    ServerName::try_from(bare.unwrap_or(host).to_owned())
        .map_err(|_| format!("'{host}' is not the name of a host"))
}
