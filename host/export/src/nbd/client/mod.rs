//! The `nbd` node: another NBD server's export as a node of ours.
//!
//! ```text
//! Node -> RemoteNode -> NbdRemote -> Queue ..thread.. link -> socket
//!                                                  handshake, receiver (pure)
//! ```
//!
//! Requests come from any thread and wait in the [`queue`]; one task on the node's iothread, the
//! [`link`], sends them, many at a time, and hands replies back. The server is a stranger: what it
//! says goes through [`handshake`] and [`receiver`], which are pure and fuzzed. Invariants: a
//! request is answered once, whatever becomes of the connection; a server that breaks the protocol
//! is not spoken to again. `host/ARCHITECTURE.md` tells what happens when a connection is lost.

mod dial;
pub mod handshake;
mod link;
mod queue;
pub mod receiver;
mod remote;

use std::sync::Arc;
use std::time::Duration;

use outport_block::IoThread;
use outport_block::remote::Remote;

use super::stream::StreamError;
use crate::tls::{Credentials, Distrust};
pub use dial::ServerAddress;
use queue::Queue;
use remote::NbdRemote;

/// What `blockdev-add` says of a server.
#[derive(Debug)]
pub struct ClientOptions {
    /// Where the server listens.
    pub server: ServerAddress,
    /// The export's name; empty is the default export.
    pub export: String,
    /// For so long after a connection was lost requests wait for the next one; then they fail until
    /// there is one.
    pub reconnect_delay: Duration,
    /// For so long the first connection is tried again; zero: once.
    pub open_timeout: Duration,
    /// Nothing is said in the clear then.
    pub tls: Option<ClientTls>,
}

/// TLS of a connection to a server.
#[derive(Debug)]
pub struct ClientTls {
    /// What this side proves itself with and whom it believes.
    pub credentials: Arc<Credentials>,
    /// The server's name, which its certificate has to be for.
    pub hostname: Option<String>,
}

impl ClientTls {
    /// Why a handshake failed, in QEMU's words where it has some.
    fn refusal(&self, error: &StreamError) -> String {
        let StreamError::Tls(failure) = error else {
            return format!("TLS handshake failed: {error}");
        };
        match failure.distrust() {
            Some(Distrust::Name) => {
                let name = self.hostname.as_deref().unwrap_or_default();
                format!("Certificate does not match the hostname {name}")
            }
            Some(Distrust::Issuer) => "The certificate hasn't got a known issuer".to_owned(),
            Some(Distrust::Revoked) => "The certificate has been revoked".to_owned(),
            Some(Distrust::Other) => "The certificate is not trusted".to_owned(),
            None => format!("TLS handshake failed: {failure}"),
        }
    }
}

/// An export that was connected to.
#[derive(Debug)]
pub struct Connected {
    /// The seam to a node.
    pub remote: Arc<dyn Remote>,
    /// The server refuses writes.
    pub read_only: bool,
}

/// Connects; the connection lives on `iothread`.
///
/// # Errors
/// QEMU's sentences, such as `Failed to connect to '/s': No such file or directory`.
pub async fn connect(options: ClientOptions, iothread: &IoThread) -> Result<Connected, String> {
    let queue = Arc::new(Queue::default());
    let name = options.server.uri(&options.export);
    let for_link = queue.clone();
    let opened = iothread
        .run(move || async move { link::open(options, for_link).await })
        .await;
    let agreed = opened.ok_or_else(|| "the connection's task ended".to_owned())??;
    let remote = NbdRemote::new(queue, agreed, name, iothread.clone());
    Ok(Connected {
        read_only: remote.is_read_only(),
        remote: Arc::new(remote),
    })
}
