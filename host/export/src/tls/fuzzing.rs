//! What the fuzzer drives: everything here that takes bytes of a certificate or of a file of
//! credentials apart.

use super::certificate::Certificate;
use super::{name, pem, priority, psk};

/// A certificate, or the content of a name.
pub fn certificate(bytes: &[u8]) {
    let _ = name::spell(bytes);
    if let Ok(it) = Certificate::parse(bytes) {
        let _ = name::spell(it.subject);
        let _ = name::spell(it.issuer);
        let _ = it.common_name();
    }
}

/// A file of certificates, revocation lists or a key in the clear.
pub fn pem(bytes: &[u8]) {
    for der in pem::certificates(bytes).into_iter().flatten() {
        certificate(&der);
    }
    let _ = pem::revocation_lists(bytes);
    // Without a password: how long decryption takes is the file's to say.
    let _ = pem::private_key(bytes, None);
}

/// A file of pre-shared keys.
pub fn psk_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let all = psk::everybody(&text);
    assert!(all.len() <= text.lines().count());
    for (user, key) in &all {
        assert!((1..=psk::KEY_BYTES_MAX).contains(&key.len()));
        assert!(user.len() <= text.len());
    }
    let user = text.split([':', '\n']).next().unwrap_or_default();
    if let Some(Some((_, key))) = psk::one(&text, user) {
        assert!(all.iter().any(|(_, other)| *other == key));
    }
}

/// GnuTLS' priority string.
pub fn priority(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(versions) = priority::versions(&text) {
        assert!((1..=2).contains(&versions.len()));
    }
}
