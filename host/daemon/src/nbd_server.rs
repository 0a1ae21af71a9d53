//! The NBD server: at most one, started and stopped by commands.
//!
//! Control plane; connections are served on iothreads by `outport_export`. Invariant: while a
//! server stops, none can be started and nothing can be exported over the old one.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use outport_export::Export;
use outport_export::nbd::{Listener, Server, ServerOptions};
use outport_qmp::Error;
use outport_qmp::types::block_export::{BlockExportType, NbdServerOptions};

use crate::addresses;
use crate::daemon::Daemon;

/// Clients at a time if nobody says otherwise (QEMU's default since CVE-2024-7409).
const CONNECTIONS_MAX: u32 = 100;

/// Seconds that a handshake may take if nobody says otherwise (QEMU's default).
const HANDSHAKE_MAX_SECONDS: u32 = 10;

#[derive(Default)]
enum State {
    #[default]
    Stopped,
    Running(Rc<Server>),
    Stopping,
}

/// The server, or none.
#[derive(Default)]
pub(crate) struct NbdServer {
    state: RefCell<State>,
}

impl NbdServer {
    /// `nbd-server-start`.
    ///
    /// # Errors
    /// It runs already, the address cannot be bound, or TLS was asked for.
    pub(crate) fn start(&self, daemon: &Daemon, options: NbdServerOptions) -> Result<(), Error> {
        if !matches!(*self.state.borrow(), State::Stopped) {
            return Err(Error::generic("NBD server already running"));
        }
        let address = addresses::listen_on(options.addr, &mut daemon.inherited.borrow_mut());
        let listener = address.and_then(Listener::bind).map_err(Error::generic)?;
        if let Some(id) = options.tls_creds {
            // The listener goes, and its socket file with it.
            return Err(Error::generic(format!("No TLS credentials with id '{id}'")));
        }
        tracing::info!(uri = listener.uri(""), "NBD server started");
        let server = Server::start(
            listener,
            ServerOptions {
                max_connections: options.max_connections.unwrap_or(CONNECTIONS_MAX),
                handshake_max_seconds: options
                    .handshake_max_seconds
                    .unwrap_or(HANDSHAKE_MAX_SECONDS),
            },
        );
        *self.state.borrow_mut() = State::Running(Rc::new(server));
        Ok(())
    }

    /// `nbd-server-stop`: deletes the NBD exports and waits for them, then for the server.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) async fn stop(&self, daemon: &Daemon) -> Result<(), Error> {
        let server = match self.state.replace(State::Stopping) {
            State::Running(server) => server,
            other => {
                *self.state.borrow_mut() = other;
                return Err(not_running());
            }
        };
        daemon
            .exports
            .close_kind(daemon, BlockExportType::Nbd)
            .await;
        server.stop().await;
        drop(server);
        *self.state.borrow_mut() = State::Stopped;
        Ok(())
    }

    /// Stops it if it runs.
    pub(crate) async fn close(&self, daemon: &Daemon) {
        if self.stop(daemon).await.is_ok() {
            tracing::debug!("NBD server stopped");
        }
    }

    /// The running server.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) fn running(&self) -> Result<Rc<Server>, Error> {
        match &*self.state.borrow() {
            State::Running(server) => Ok(server.clone()),
            State::Stopped | State::Stopping => Err(not_running()),
        }
    }

    /// Clients at a time.
    pub(crate) fn connections_max(&self) -> Option<u32> {
        self.running()
            .ok()
            .map(|server| server.options().max_connections)
    }

    /// Offers an export.
    ///
    /// # Errors
    /// The server does not run, or the name is taken.
    pub(crate) fn offer(&self, export: Arc<Export>) -> Result<(), Error> {
        self.running()?.add(export).map_err(Error::generic)
    }

    /// Does not offer an export any longer; its name is free from now on.
    pub(crate) fn withdraw(&self, name: &str) {
        if let Ok(server) = self.running() {
            server.remove(name);
        }
    }
}

fn not_running() -> Error {
    Error::generic("NBD server not running")
}
