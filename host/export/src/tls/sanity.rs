//! QEMU's checks of one's own certificates (`sanity-check`), in QEMU's words.
//!
//! They find at once what would otherwise be a client's handshake failing later. Called on the
//! control plane, when credentials are made.

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error};

use super::certificate::{
    ANY_PURPOSE, CERTIFICATE_SIGN, CLIENT_AUTH, Certificate, DIGITAL_SIGNATURE, SERVER_AUTH,
};
use super::credentials::Endpoint;
use super::verify::provider;

/// A file and what is in it.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) path: &'a str,
    pub(super) certificates: &'a [CertificateDer<'static>],
}

/// Checks the authorities, and the own certificate if there is one.
///
/// # Errors
/// QEMU's sentence.
pub(super) fn check(
    authorities: Source<'_>,
    own: Option<Source<'_>>,
    endpoint: Endpoint,
) -> Result<(), String> {
    let now = UnixTime::now();
    if let Some(own) = own {
        let der = own.certificates.first().map_or(&[][..], |it| it);
        let unread = |_| format!("Unable to import {} certificate {}", endpoint, own.path);
        let parsed = Certificate::parse(der).map_err(unread)?;
        check_own(&parsed, own.path, endpoint, seconds(now))?;
    }
    for der in authorities.certificates {
        let unread = |_| format!("Unable to import CA certificate list {}", authorities.path);
        let parsed = Certificate::parse(der).map_err(unread)?;
        check_authority(&parsed, authorities.path, seconds(now))?;
    }
    match own {
        Some(own) => check_pair(authorities, own, now),
        None => Ok(()),
    }
}

pub(super) fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

fn check_times(it: &Certificate<'_>, kind: &str, path: &str, now: i64) -> Result<(), String> {
    if it.not_after < now {
        return Err(format!("The {kind} certificate {path} has expired"));
    }
    if it.not_before > now {
        return Err(format!("The {kind} certificate {path} is not yet active"));
    }
    Ok(())
}

fn check_own(it: &Certificate<'_>, path: &str, endpoint: Endpoint, now: i64) -> Result<(), String> {
    check_times(it, &endpoint.to_string(), path, now)?;
    if it.is_ca == Some(true) {
        return Err(format!(
            "The certificate {path} basic constraints show a CA, but we need one for a {endpoint}"
        ));
    }
    let usage = it.key_usage.as_ref();
    if !it.may(DIGITAL_SIGNATURE) && usage.is_some_and(|usage| usage.critical) {
        return Err(format!(
            "Certificate {path} usage does not permit digital signature"
        ));
    }
    let wanted = match endpoint {
        Endpoint::Server => SERVER_AUTH,
        Endpoint::Client => CLIENT_AUTH,
    };
    if let Some(purposes) = &it.purposes
        && purposes.critical
        && !purposes.value.contains(&wanted)
        && !purposes.value.contains(&ANY_PURPOSE)
    {
        return Err(format!(
            "Certificate {path} purpose does not allow use with a TLS {endpoint}"
        ));
    }
    Ok(())
}

fn check_authority(it: &Certificate<'_>, path: &str, now: i64) -> Result<(), String> {
    check_times(it, "CA", path, now)?;
    match it.is_ca {
        Some(true) => {}
        Some(false) => {
            return Err(format!(
                "The certificate {path} basic constraints do not show a CA"
            ));
        }
        None => {
            return Err(format!(
                "The certificate {path} is missing basic constraints for a CA"
            ));
        }
    }
    let usage = it.key_usage.as_ref();
    if !it.may(CERTIFICATE_SIGN) && usage.is_some_and(|usage| usage.critical) {
        return Err(format!(
            "Certificate {path} usage does not permit certificate signing"
        ));
    }
    Ok(())
}

/// Whether the own certificate was issued by the authorities.
fn check_pair(authorities: Source<'_>, own: Source<'_>, now: UnixTime) -> Result<(), String> {
    let failed = |reason| {
        Err(format!(
            "Our own certificate {} failed validation against {}: {reason}",
            own.path, authorities.path
        ))
    };
    let Some((first, rest)) = own.certificates.split_first() else {
        return failed("The certificate is not trusted");
    };
    let mut roots = RootCertStore::empty();
    for der in authorities.certificates {
        let may_sign = Certificate::parse(der).is_ok_and(|it| it.may(CERTIFICATE_SIGN));
        if may_sign {
            let _unusable = roots.add(der.clone());
        }
    }
    let algorithms = provider().signature_verification_algorithms.all;
    let verified = ParsedCertificate::try_from(first).and_then(|it| {
        verify_server_cert_signed_by_trust_anchor(&it, &roots, rest, now, algorithms)
    });
    match verified {
        Ok(()) => Ok(()),
        // What it may be used for was looked at before, and only what it insists on counts.
        Err(Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
        )) => Ok(()),
        Err(_) if is_issued_by(own.certificates, authorities.certificates) => {
            failed("The certificate is not trusted")
        }
        Err(_) => failed("The certificate hasn't got a known issuer"),
    }
}

fn is_issued_by(own: &[CertificateDer<'_>], authorities: &[CertificateDer<'_>]) -> bool {
    let last = own.last().and_then(|der| Certificate::parse(der).ok());
    last.is_some_and(|last| {
        authorities.iter().any(|der| {
            Certificate::parse(der).is_ok_and(|authority| authority.subject == last.issuer)
        })
    })
}
