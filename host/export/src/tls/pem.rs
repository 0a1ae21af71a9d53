//! PEM files: certificates, CRLs and private keys, encrypted ones included.
//!
//! Errors are the words that GnuTLS has for them, because QEMU passes those on.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pkcs8::EncryptedPrivateKeyInfoRef;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

/// Nothing that could be an object.
pub(super) const NO_HEADER: &str = "Base64 unexpected header error.";
/// An object that is none.
pub(super) const UNDECODABLE: &str = "Base64 decoding error.";
/// No key, or a form that is not known.
const NO_KEY: &str = "The requested data were not available.";
const NOT_DECRYPTED: &str = "Decryption has failed.";

const ENCRYPTED_BEGIN: &str = "-----BEGIN ENCRYPTED PRIVATE KEY-----";
const ENCRYPTED_END: &str = "-----END ENCRYPTED PRIVATE KEY-----";

/// All certificates of a file, in order; none is an error.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(NO_HEADER),
        Ok(found) => Ok(found),
        Err(_) => Err(UNDECODABLE),
    }
}

/// All revocation lists of a file; none is an error.
pub(super) fn revocation_lists(
    pem: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, &'static str> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(pem).collect();
    found.ok().filter(|it| !it.is_empty()).ok_or(UNDECODABLE)
}

/// The private key of a file.
pub(super) fn private_key(
    pem: &[u8],
    password: Option<&[u8]>,
) -> Result<PrivateKeyDer<'static>, &'static str> {
    let text = String::from_utf8_lossy(pem);
    if let Some((_, rest)) = text.split_once(ENCRYPTED_BEGIN) {
        let (body, _) = rest.split_once(ENCRYPTED_END).ok_or(UNDECODABLE)?;
        let password = password.ok_or(NOT_DECRYPTED)?;
        return decrypt(body, password);
    }
    if text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(
            "The key has the traditional encryption of OpenSSL, which is not read; convert it to \
             PKCS #8: openssl pkcs8 -topk8 -in OLD.pem -out NEW.pem",
        );
    }
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| NO_KEY)
}

fn decrypt(body: &str, password: &[u8]) -> Result<PrivateKeyDer<'static>, &'static str> {
    let digits: Vec<u8> = body.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let der = STANDARD.decode(digits).map_err(|_| UNDECODABLE)?;
    let encrypted = EncryptedPrivateKeyInfoRef::try_from(der.as_slice());
    let encrypted = encrypted.map_err(|_| NOT_DECRYPTED)?;
    let clear = encrypted.decrypt(password).map_err(|_| NOT_DECRYPTED)?;
    let key = clear.as_bytes().to_vec();
    Ok(PrivateKeyDer::Pkcs8(key.into()))
}
