//! TLS credentials: what is in a directory, for servers and `nbd` nodes.
//!
//! Control plane; files are read elsewhere. Invariant: an object of these types holds credentials
//! that passed their checks.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use outport_export::tls::{self, Credentials, Endpoint, Loaded, PskOptions, X509Options};
use outport_qmp::Error;
use outport_qmp::types::qom::{
    QCryptoTLSCredsEndpoint, TlsCredsPskProperties, TlsCredsX509Properties,
};

use crate::daemon::Daemon;

/// `tls-creds-x509`.
///
/// # Errors
/// In QEMU's words.
pub(super) async fn x509(
    daemon: &Daemon,
    properties: &TlsCredsX509Properties,
) -> Result<Loaded, Error> {
    let password = match &properties.passwordid {
        Some(id) => Some(daemon.objects.borrow().secret(id)?.to_vec()),
        None => None,
    };
    let priority = properties.priority.as_deref().unwrap_or_default();
    let options = X509Options {
        dir: directory(properties.dir.as_deref())?,
        endpoint: endpoint(properties.endpoint),
        verify_peer: properties.verify_peer.unwrap_or(true),
        sanity_check: properties.sanity_check.unwrap_or(true),
        versions: tls::versions(priority).map_err(Error::generic)?,
        password,
    };
    let loaded = tokio::task::spawn_blocking(move || tls::load_x509(&options)).await;
    let loaded = loaded.map_err(|error| Error::generic(error.to_string()))?;
    loaded.map_err(Error::generic)
}

/// `tls-creds-psk`.
///
/// # Errors
/// In QEMU's words.
pub(super) async fn psk(properties: &TlsCredsPskProperties) -> Result<Loaded, Error> {
    let priority = properties.priority.as_deref().unwrap_or_default();
    let options = PskOptions {
        dir: directory(properties.dir.as_deref())?,
        endpoint: endpoint(properties.endpoint),
        versions: tls::versions(priority).map_err(Error::generic)?,
        username: properties.username.clone(),
    };
    let loaded = tokio::task::spawn_blocking(move || tls::load_psk(&options)).await;
    let loaded = loaded.map_err(|error| Error::generic(error.to_string()))?;
    loaded.map_err(Error::generic)
}

/// Why there is no `tls-creds-anon`.
pub(super) fn anonymous() -> Error {
    Error::generic(
        "Anonymous TLS credentials are not supported: whoever is in the middle could read and \
         change everything. Use 'tls-creds-x509' or 'tls-creds-psk'",
    )
}

fn directory(dir: Option<&str>) -> Result<PathBuf, Error> {
    let dir = dir.ok_or_else(|| Error::generic("Missing 'dir' property value"))?;
    Ok(PathBuf::from(dir))
}

fn endpoint(endpoint: Option<QCryptoTLSCredsEndpoint>) -> Endpoint {
    match endpoint {
        Some(QCryptoTLSCredsEndpoint::Server) => Endpoint::Server,
        Some(QCryptoTLSCredsEndpoint::Client) | None => Endpoint::Client,
    }
}

/// New credentials, or those of a server that was started with an object of this id: an object
/// that replaces one that was deleted takes its place there too.
pub(super) fn share(daemon: &Rc<Daemon>, id: &str, loaded: Loaded) -> Arc<Credentials> {
    match daemon.nbd.credentials(id) {
        Some(used) if used.endpoint() == loaded.endpoint() => {
            used.replace(loaded);
            used
        }
        _ => Credentials::new(loaded),
    }
}
