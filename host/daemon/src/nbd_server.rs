//! The NBD servers: QEMU's one, and further ones by id, started and stopped by commands.
//!
//! Control plane; connections are served on iothreads by `outport_export`. Invariant: while a
//! server stops, none of its id can be started and nothing can be exported over the old one.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use outport_export::nbd::{Admission, Bound, Listener, Server, ServerOptions, ServerTls};
use outport_export::tls::{Credentials, Endpoint};
use outport_export::{Access, Export};
use outport_qmp::Error;
use outport_qmp::error::is_identifier;
use outport_qmp::types::block_export::{NbdServerInfo, NbdServerOptions};
use outport_qmp::types::sockets::{SocketAddress, SocketAddressBranch, UnixSocketAddress};

use crate::addresses;
use crate::daemon::Daemon;

/// Clients at a time if nobody says otherwise (QEMU's default since CVE-2024-7409).
const CONNECTIONS_MAX: u32 = 100;

/// Seconds that a handshake may take if nobody says otherwise (QEMU's default).
const HANDSHAKE_MAX_SECONDS: u32 = 10;

/// One server. It keeps its place in the list, and its id, until it has stopped.
struct Entry {
    /// `None`: the server that QEMU's commands mean.
    id: Option<String>,
    /// `None`: it is being stopped.
    server: Option<Rc<Server>>,
    /// Id of its TLS credentials.
    tls_creds: Option<String>,
}

/// The servers, in the order in which they were started.
#[derive(Default)]
pub(crate) struct NbdServers {
    list: RefCell<Vec<Entry>>,
}

impl NbdServers {
    /// `nbd-server-start`.
    ///
    /// # Errors
    /// It runs already, the address cannot be bound, or there are no such credentials.
    pub(crate) async fn start(
        &self,
        daemon: &Daemon,
        options: NbdServerOptions,
    ) -> Result<(), Error> {
        let told = options.clone();
        let id = options.id;
        if id.as_deref().is_some_and(|id| !is_identifier(id)) {
            return Err(Error::not_an_identifier("id"));
        }
        self.check_free(id.as_deref())?;
        let address = addresses::listen_on(options.addr, daemon).map_err(Error::generic)?;
        let bound = Listener::bind(address).await;
        // From here on, on an error the listener goes, and its socket file with it.
        let listener = bound.map_err(Error::generic)?;
        // The name of a host may have taken its time.
        self.check_free(id.as_deref())?;
        if daemon.is_ending() {
            return Err(Error::generic("The daemon is ending"));
        }
        let tls = match &options.tls_creds {
            Some(id) => Some(tls(daemon, id, options.tls_authz)?),
            None => None,
        };
        let strict = options.strict_authz.unwrap_or(false);
        tracing::info!(uri = listener.uri(""), "NBD server started");
        let server = Server::start(
            listener,
            ServerOptions {
                max_connections: options.max_connections.unwrap_or(CONNECTIONS_MAX),
                handshake_max_seconds: options
                    .handshake_max_seconds
                    .unwrap_or(HANDSHAKE_MAX_SECONDS),
            },
            tls,
            Access::new(&daemon.policies, options.authz, strict),
        );
        self.list.borrow_mut().push(Entry {
            id,
            server: Some(Rc::new(server)),
            tls_creds: options.tls_creds,
        });
        daemon.config.server_started(self, told);
        Ok(())
    }

    /// Checks that no server has this id, not even one that is being stopped.
    fn check_free(&self, id: Option<&str>) -> Result<(), Error> {
        let list = self.list.borrow();
        if !list.iter().any(|entry| entry.id.as_deref() == id) {
            return Ok(());
        }
        Err(Error::generic(match id {
            None => "NBD server already running".to_owned(),
            Some(id) => format!("NBD server '{id}' already running"),
        }))
    }

    /// `nbd-server-stop`: deletes the server's exports and waits for them, then for the server.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) async fn stop(&self, daemon: &Daemon, id: Option<&str>) -> Result<(), Error> {
        let server = {
            let mut list = self.list.borrow_mut();
            let mut entries = list.iter_mut();
            let entry = entries.find(|entry| entry.id.as_deref() == id);
            entry.and_then(|entry| entry.server.take())
        };
        let server = server.ok_or_else(|| not_running(id))?;
        daemon.exports.close_served(daemon, id).await;
        server.stop().await;
        drop(server);
        let mut list = self.list.borrow_mut();
        list.retain(|entry| entry.id.as_deref() != id);
        Ok(())
    }

    /// Stops all that run.
    pub(crate) async fn close(&self, daemon: &Daemon) {
        loop {
            let next = {
                let list = self.list.borrow();
                let mut running = list.iter().filter(|entry| entry.server.is_some());
                running.next().map(|entry| entry.id.clone())
            };
            let Some(id) = next else { return };
            if self.stop(daemon, id.as_deref()).await.is_ok() {
                tracing::debug!(id, "NBD server stopped");
            }
        }
    }

    /// The running server of this id.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) fn running(&self, id: Option<&str>) -> Result<Rc<Server>, Error> {
        let list = self.list.borrow();
        let mut entries = list.iter();
        let entry = entries.find(|entry| entry.id.as_deref() == id);
        let server = entry.and_then(|entry| entry.server.clone());
        server.ok_or_else(|| not_running(id))
    }

    /// The credentials that a running server took from the object of this id.
    pub(crate) fn credentials(&self, id: &str) -> Option<Arc<Credentials>> {
        let list = self.list.borrow();
        let mut users = list.iter();
        let entry = users.find(|entry| entry.tls_creds.as_deref() == Some(id))?;
        entry.server.as_ref()?.credentials().cloned()
    }

    /// Offers an export.
    ///
    /// # Errors
    /// The server does not run, or the name is taken.
    pub(crate) fn offer(&self, id: Option<&str>, export: Arc<Export>) -> Result<(), Error> {
        self.running(id)?.add(export).map_err(Error::generic)
    }

    /// Does not offer an export any longer; its name is free from now on.
    pub(crate) fn withdraw(&self, id: Option<&str>, name: &str) {
        if let Ok(server) = self.running(id) {
            server.remove(name);
        }
    }

    /// `query-nbd-servers`, in the order in which they were started.
    pub(crate) fn query(&self, daemon: &Daemon) -> Vec<NbdServerInfo> {
        let list = self.list.borrow();
        let running = list.iter().filter_map(|entry| {
            let server = entry.server.as_ref()?;
            let options = server.options();
            Some(NbdServerInfo {
                id: entry.id.clone(),
                addr: address(&server.listener().bound()),
                connections: u32::try_from(server.connections()).unwrap_or(u32::MAX),
                max_connections: options.max_connections,
                handshake_max_seconds: options.handshake_max_seconds,
                exports: daemon.exports.served_by(entry.id.as_deref()),
            })
        });
        running.collect()
    }
}

/// What a server needs for TLS.
fn tls(daemon: &Daemon, id: &str, authz: Option<String>) -> Result<ServerTls, Error> {
    let credentials = daemon.objects.borrow().tls(id)?;
    if credentials.endpoint() != Endpoint::Server {
        let message = "Expected TLS credentials for a server endpoint";
        return Err(Error::generic(message));
    }
    Ok(ServerTls {
        credentials,
        admission: authz.map(|policy| Admission {
            policies: daemon.policies.clone(),
            policy,
        }),
    })
}

/// A bound address as QMP spells it.
fn address(bound: &Bound) -> SocketAddress {
    let branch = match bound {
        Bound::Inet(address) => SocketAddressBranch::Inet(addresses::plain_inet(
            address.map_or_else(String::new, |it| it.ip().to_string()),
            address.map_or_else(String::new, |it| it.port().to_string()),
        )),
        Bound::Unix(path) => SocketAddressBranch::Unix(UnixSocketAddress {
            path: path.display().to_string(),
            r#abstract: None,
            tight: None,
        }),
        Bound::Abstract(name) => SocketAddressBranch::Unix(UnixSocketAddress {
            path: name.display().to_string(),
            r#abstract: Some(true),
            tight: None,
        }),
    };
    SocketAddress { branch }
}

fn not_running(id: Option<&str>) -> Error {
    Error::generic(match id {
        None => "NBD server not running".to_owned(),
        Some(id) => format!("NBD server '{id}' not running"),
    })
}
