//! GnuTLS' priority strings, as far as they choose protocol versions.
//!
//! QEMU hands the string to GnuTLS. Cipher suites are rustls' choice here (all of them are sound),
//! but an administrator who turned a version off must not find it on.

use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};

/// Versions that are offered.
pub type Versions = &'static [&'static SupportedProtocolVersion];

static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
static NEW: [&SupportedProtocolVersion; 1] = [&TLS13];
static OLD: [&SupportedProtocolVersion; 1] = [&TLS12];

/// The versions that a priority string leaves.
///
/// # Errors
/// None is left.
pub fn versions(priority: &str) -> Result<Versions, String> {
    let (mut old, mut new) = (true, true);
    for word in priority.split([':', ',']) {
        let Some((sign, name)) = word.split_at_checked(1) else {
            continue;
        };
        let Some(version) = name.strip_prefix("VERS-") else {
            continue;
        };
        let on = sign == "+";
        if on || matches!(sign, "-" | "!") {
            match version.trim_start_matches("TLS-") {
                "ALL" => (old, new) = (on, on),
                "TLS1.2" => old = on,
                "TLS1.3" => new = on,
                _ => {}
            }
        }
    }
    match (old, new) {
        (true, true) => Ok(&BOTH),
        (false, true) => Ok(&NEW),
        (true, false) => Ok(&OLD),
        (false, false) => Err(format!(
            "Priority '{priority}' leaves no TLS version; there are VERS-TLS1.2 and VERS-TLS1.3"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_turned_on_and_off() {
        let names = |priority| {
            versions(priority).map(|it| it.iter().map(|it| it.version).collect::<Vec<_>>())
        };
        let (old, new) = (TLS12.version, TLS13.version);
        assert_eq!(names("NORMAL").unwrap(), [new, old]);
        assert_eq!(names("@QEMU,SYSTEM").unwrap(), [new, old]);
        assert_eq!(names("NORMAL:-VERS-TLS1.3").unwrap(), [old]);
        assert_eq!(names("NORMAL:!VERS-TLS1.2").unwrap(), [new]);
        assert_eq!(names("NORMAL:-VERS-ALL:+VERS-TLS1.3").unwrap(), [new]);
        assert!(names("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.0").is_err());
    }
}
