//! What the fuzzer drives: everything here that takes bytes of a certificate apart.

use super::certificate::Certificate;
use super::name;

/// A certificate, or the content of a name.
pub fn certificate(bytes: &[u8]) {
    let _ = name::spell(bytes);
    if let Ok(it) = Certificate::parse(bytes) {
        let _ = name::spell(it.subject);
        let _ = name::spell(it.issuer);
        let _ = it.common_name();
    }
}
