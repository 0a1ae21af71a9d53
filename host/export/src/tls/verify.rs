//! Whom to believe: rustls' verification of chains, with what QEMU's users expect around it.
//!
//! Beyond webpki: an authority that has expired vouches for nobody; a server without alternative
//! names may be known by its common name, as certificates of old are; a CRL that has expired
//! refuses everybody (who knows what the next one says). Called in handshakes, on the control
//! plane or a link's thread.

use std::sync::{Arc, LazyLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature,
    verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};

use super::certificate::{AltName, Certificate};
use super::sanity::seconds;

/// The cryptography of all sessions.
pub(super) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    &PROVIDER
}

/// How a peer may prove that it has its certificate's key.
fn algorithms() -> &'static WebPkiSupportedAlgorithms {
    &provider().signature_verification_algorithms
}

/// The certificate authorities of credentials and what they revoked.
#[derive(Debug)]
pub(super) struct Authorities {
    anchors: Vec<Anchor>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
}

#[derive(Debug)]
struct Anchor {
    der: CertificateDer<'static>,
    not_before: i64,
    not_after: i64,
}

impl Anchor {
    fn is_valid_at(&self, now: i64) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }
}

fn unknown_issuer() -> Error {
    Error::InvalidCertificate(CertificateError::UnknownIssuer)
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Other(rustls::OtherError(Arc::new(error)))
}

impl Authorities {
    /// Certificates that cannot be read vouch for nobody.
    pub(super) fn new(
        certificates: Vec<CertificateDer<'static>>,
        revoked: Vec<CertificateRevocationListDer<'static>>,
    ) -> Self {
        let anchors = certificates.into_iter().filter_map(|der| {
            let (not_before, not_after) = {
                let it = Certificate::parse(&der).ok()?;
                (it.not_before, it.not_after)
            };
            Some(Anchor {
                der,
                not_before,
                not_after,
            })
        });
        Self {
            anchors: anchors.collect(),
            revoked,
        }
    }

    fn all_valid_at(&self, now: i64) -> bool {
        self.anchors.iter().all(|it| it.is_valid_at(now))
    }

    fn roots(&self, now: Option<i64>) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        for anchor in &self.anchors {
            if now.is_none_or(|now| anchor.is_valid_at(now)) {
                let _unusable = roots.add(anchor.der.clone());
            }
        }
        Arc::new(roots)
    }

    /// `now`: only with those that are valid then.
    fn of_clients(&self, now: Option<i64>) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        let builder =
            WebPkiClientVerifier::builder_with_provider(self.roots(now), provider().clone());
        let builder = builder
            .with_crls(self.revoked.iter().cloned())
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
        builder.build().map_err(other)
    }

    fn of_servers(&self, now: Option<i64>) -> Result<Arc<WebPkiServerVerifier>, Error> {
        let builder =
            WebPkiServerVerifier::builder_with_provider(self.roots(now), provider().clone());
        let builder = builder
            .with_crls(self.revoked.iter().cloned())
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
        builder.build().map_err(other)
    }
}

/// What a server believes of clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    authorities: Authorities,
    /// `None`: no authority, so nobody is believed.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
}

impl ClientVerifier {
    /// # Errors
    /// A revocation list cannot be used.
    pub(super) fn new(authorities: Authorities) -> Result<Self, Error> {
        let verifier = match authorities.roots(None).is_empty() {
            true => None,
            false => Some(authorities.of_clients(None)?),
        };
        Ok(Self {
            authorities,
            verifier,
        })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        let verifier = self.verifier.as_ref();
        verifier.map_or(&[], |it| it.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verifier = self.verifier.as_ref().ok_or_else(unknown_issuer)?;
        let at = seconds(now);
        if self.authorities.all_valid_at(at) {
            return verifier.verify_client_cert(end_entity, intermediates, now);
        }
        let rest = self.authorities.of_clients(Some(at));
        let rest = rest.map_err(|_| unknown_issuer())?;
        rest.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// What a client believes of servers.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    authorities: Authorities,
    /// `None`: no authority, so nobody is believed.
    verifier: Option<Arc<WebPkiServerVerifier>>,
    /// `verify-peer`.
    verify: bool,
}

impl ServerVerifier {
    /// # Errors
    /// A revocation list cannot be used.
    pub(super) fn new(authorities: Authorities, verify: bool) -> Result<Self, Error> {
        let verifier = match authorities.roots(None).is_empty() {
            true => None,
            false => Some(authorities.of_servers(None)?),
        };
        Ok(Self {
            authorities,
            verifier,
            verify,
        })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.verify {
            return Ok(ServerCertVerified::assertion());
        }
        let at = seconds(now);
        let verifier = match (&self.verifier, self.authorities.all_valid_at(at)) {
            (None, _) => return Err(unknown_issuer()),
            (Some(all), true) => all.clone(),
            (Some(_), false) => {
                let rest = self.authorities.of_servers(Some(at));
                rest.map_err(|_| unknown_issuer())?
            }
        };
        let verified =
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            // The chain is looked at before the name is.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if is_common_name(end_entity, server_name) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Whether a certificate without names of hosts has the host's name as its common name.
fn is_common_name(der: &CertificateDer<'_>, host: &ServerName<'_>) -> bool {
    let Ok(it) = Certificate::parse(der) else {
        return false;
    };
    let names = it.alt_names.iter().flatten();
    let mut hosts = names.filter(|name| matches!(name, AltName::Dns(_) | AltName::Ip(_)));
    if hosts.next().is_some() {
        return false;
    }
    match (host, it.common_name()) {
        (ServerName::DnsName(host), Some(name)) => name.eq_ignore_ascii_case(host.as_ref()),
        _ => false,
    }
}
