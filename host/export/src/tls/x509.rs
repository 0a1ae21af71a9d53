//! A directory of certificates and keys, as QEMU lays it out, becomes credentials.
//!
//! ```text
//! ca-cert.pem                      who is believed (required)
//! ca-crl.pem                       what they revoked
//! server-cert.pem server-key.pem   identity; further ones: server-cert-0.pem ... -3.pem
//! client-cert.pem client-key.pem   the same of a client, which may have none
//! ```
//!
//! Reads files: call it where blocking is allowed. Errors are QEMU's sentences.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outport_block::strerror;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, Error, InconsistentKeys, ServerConfig};

use super::certificate::{AltName, Certificate};
use super::credentials::{Endpoint, Loaded, Material};
use super::pem;
use super::priority::Versions;
use super::sanity::{self, Source};
use super::verify::{Authorities, ClientVerifier, ServerVerifier, provider};

/// Identities beside the first one (QEMU 11.1).
const NUMBERED: u32 = 4;

/// A file of credentials: longer ones are a mistake. A CRL may have a hundred thousand entries.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// What `tls-creds-x509` says.
#[derive(Clone, Debug)]
pub struct X509Options {
    /// Where the files are.
    pub dir: PathBuf,
    /// Which side they are for.
    pub endpoint: Endpoint,
    /// Whether the other side has to prove who it is.
    pub verify_peer: bool,
    /// Whether QEMU's checks are made.
    pub sanity_check: bool,
    /// Protocol versions that are offered.
    pub versions: Versions,
    /// What the private keys are encrypted with.
    pub password: Option<Vec<u8>>,
}

/// Reads and checks a directory.
///
/// # Errors
/// In QEMU's words.
pub fn load(options: &X509Options) -> Result<Loaded, String> {
    let folder = Folder(&options.dir);
    let endpoint = options.endpoint;
    let ca_path = folder.path("ca-cert.pem");
    let authorities = folder.need(&ca_path)?;
    let files = identities(folder, endpoint)?;
    let crl_path = folder.path("ca-crl.pem");
    let crl = folder.maybe(&crl_path)?;

    let authorities = pem::certificates(&authorities);
    if options.sanity_check {
        let unread = |_| format!("Unable to import CA certificate list {ca_path}");
        let authorities = authorities.as_deref().map_err(unread)?;
        check(&ca_path, authorities, &files, endpoint)?;
    }
    let password = options.password.as_deref();
    let own = files.iter().map(|it| it.identity(password));
    let own = own.collect::<Result<Vec<_>, _>>()?;
    let crl_failed = |reason: &str| format!("Cannot load CRL '{crl_path}': {reason}");
    let revoked = match crl {
        Some(crl) => pem::revocation_lists(&crl).map_err(crl_failed)?,
        None => Vec::new(),
    };
    // Without sanity checks, authorities that cannot be read vouch for nobody.
    let authorities = Authorities::new(authorities.unwrap_or_default(), revoked);
    let unusable = |e: Error| crl_failed(&e.to_string());
    match endpoint {
        Endpoint::Server => server(options, authorities, own).map_err(unusable),
        Endpoint::Client => client(options, authorities, own).map_err(unusable),
    }
}

fn check(
    ca_path: &str,
    authorities: &[CertificateDer<'static>],
    files: &[Files],
    endpoint: Endpoint,
) -> Result<(), String> {
    let authorities = Source {
        path: ca_path,
        certificates: authorities,
    };
    if files.is_empty() {
        return sanity::check(authorities, None, endpoint);
    }
    for it in files {
        let unread = |reason| {
            let path = &it.certificate_path;
            format!("Unable to import {endpoint} certificate {path}: {reason}")
        };
        let certificates = pem::certificates(&it.certificate).map_err(unread)?;
        let own = Source {
            path: &it.certificate_path,
            certificates: &certificates,
        };
        sanity::check(authorities, Some(own), endpoint)?;
    }
    Ok(())
}

fn server(
    options: &X509Options,
    authorities: Authorities,
    own: Vec<Arc<CertifiedKey>>,
) -> Result<Loaded, Error> {
    let builder = ServerConfig::builder_with_provider(provider().clone());
    let builder = builder.with_protocol_versions(options.versions)?;
    let builder = match options.verify_peer {
        true => builder.with_client_cert_verifier(Arc::new(ClientVerifier::new(authorities)?)),
        false => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(Identities::new(own)));
    // Who resumes a session would not be held against what was revoked since.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded(Material::X509Server(Arc::new(config))))
}

fn client(
    options: &X509Options,
    authorities: Authorities,
    own: Vec<Arc<CertifiedKey>>,
) -> Result<Loaded, Error> {
    let builder = ClientConfig::builder_with_provider(provider().clone());
    let builder = builder.with_protocol_versions(options.versions)?;
    let verifier = ServerVerifier::new(authorities, options.verify_peer)?;
    let builder = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own.into_iter().next() {
        Some(own) => {
            let resolver = rustls::sign::SingleCertAndKey::from(own);
            builder.with_client_cert_resolver(Arc::new(resolver))
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Loaded(Material::X509Client {
        config: Arc::new(config),
        verifies: options.verify_peer,
    }))
}

/// Where files are looked for.
#[derive(Clone, Copy)]
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn need(&self, path: &str) -> Result<Vec<u8>, String> {
        read(path).map_err(|e| unreachable_file(path, &e))
    }

    fn maybe(&self, path: &str) -> Result<Option<Vec<u8>>, String> {
        match read(path) {
            Ok(content) => Ok(Some(content)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unreachable_file(path, &e)),
        }
    }
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > FILE_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(
            rustix::io::Errno::FBIG.raw_os_error(),
        ));
    }
    fs::read(path)
}

/// QEMU's sentence for a file that is not there.
pub(super) fn unreachable_file(path: &str, e: &io::Error) -> String {
    let reason = e.raw_os_error().map_or_else(|| e.to_string(), strerror);
    format!("Unable to access credentials {path}: {reason}")
}

/// A certificate and its key, as they lie in files.
struct Files {
    certificate_path: String,
    key_path: String,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// The identities that there are: a server has at least one.
fn identities(folder: Folder<'_>, endpoint: Endpoint) -> Result<Vec<Files>, String> {
    let paths = |number: &str| {
        (
            folder.path(&format!("{endpoint}-cert{number}.pem")),
            folder.path(&format!("{endpoint}-key{number}.pem")),
        )
    };
    let mut found = Vec::new();
    let (certificate_path, key_path) = paths("");
    let first = (folder.maybe(&certificate_path)?, folder.maybe(&key_path)?);
    let first_is_whole = matches!(first, (Some(_), Some(_)));
    if let (Some(certificate), Some(key)) = first {
        found.push(Files {
            certificate_path: certificate_path.clone(),
            key_path: key_path.clone(),
            certificate,
            key,
        });
    }
    for number in 0..NUMBERED {
        let (certificate_path, key_path) = paths(&format!("-{number}"));
        let files = (folder.maybe(&certificate_path)?, folder.maybe(&key_path)?);
        match files {
            (Some(certificate), Some(key)) => found.push(Files {
                certificate_path,
                key_path,
                certificate,
                key,
            }),
            (None, None) => break,
            (Some(_), None) => {
                return Err(format!(
                    "Cert '{certificate_path}' without corresponding key '{key_path}'"
                ));
            }
            (None, Some(_)) => {
                return Err(format!(
                    "Key '{key_path}' without corresponding cert '{certificate_path}'"
                ));
            }
        }
    }
    if endpoint == Endpoint::Server && !first_is_whole && found.is_empty() {
        folder.need(&certificate_path)?;
        folder.need(&key_path)?;
    }
    Ok(found)
}

impl Files {
    fn identity(&self, password: Option<&[u8]>) -> Result<Arc<CertifiedKey>, String> {
        let failed = |reason: &str| {
            format!(
                "Cannot load certificate '{}' & key '{}': {reason}",
                self.certificate_path, self.key_path
            )
        };
        let chain = pem::certificates(&self.certificate);
        let chain = chain.map_err(|_| failed(pem::UNDECODABLE))?;
        let key = pem::private_key(&self.key, password).map_err(failed)?;
        let key = provider().key_provider.load_private_key(key);
        let key = key.map_err(|_| failed("The requested data were not available."))?;
        let pair = CertifiedKey::new(chain, key);
        match pair.keys_match() {
            Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
                Err(failed("The certificate and the given key do not match."))
            }
            _ => Ok(Arc::new(pair)),
        }
    }
}

/// Chooses among several identities: one for the name that the client asks for, if it can sign
/// what the client understands, or else the first that can.
struct Identities(Vec<Identity>);

struct Identity {
    names: Vec<String>,
    pair: Arc<CertifiedKey>,
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|it| &it.names))
            .finish()
    }
}

impl Identities {
    fn new(pairs: Vec<Arc<CertifiedKey>>) -> Self {
        let identities = pairs.into_iter().map(|pair| {
            let parsed = pair.cert.first();
            let parsed = parsed.and_then(|der| Certificate::parse(der).ok());
            let names = parsed.and_then(|it| it.alt_names).unwrap_or_default();
            let names = names.into_iter().filter_map(|name| match name {
                AltName::Dns(name) => Some(name),
                AltName::Email(_) | AltName::Uri(_) | AltName::Ip(_) => None,
            });
            Identity {
                names: names.collect(),
                pair,
            }
        });
        Self(identities.collect())
    }
}

impl ResolvesServerCert for Identities {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let mut able = self
            .0
            .iter()
            .filter(|it| it.pair.key.choose_scheme(schemes).is_some());
        let first = able.clone().next();
        let wanted = hello.server_name();
        let named = able.find(|it| {
            let mut names = it.names.iter();
            wanted.is_some_and(|wanted| names.any(|name| name.eq_ignore_ascii_case(wanted)))
        });
        named.or(first).map(|it| it.pair.clone())
    }
}
