//! Pre-shared keys (`tls-creds-psk`): the file `keys.psk`, as GnuTLS' psktool writes it.
//!
//! Reads files: call it where blocking is allowed. Errors are QEMU's sentences.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use super::credentials::{Endpoint, Loaded, Material};
use super::openssl::Context;
use super::priority::Versions;
use super::x509::unreachable_file;

/// Whose key a client shows if nobody says so.
const USER: &str = "qemu";

/// Longest key that OpenSSL takes.
pub(super) const KEY_BYTES_MAX: usize = 256;

/// What `tls-creds-psk` says.
#[derive(Clone, Debug)]
pub struct PskOptions {
    /// Where `keys.psk` is.
    pub dir: PathBuf,
    /// Which side it is for.
    pub endpoint: Endpoint,
    /// Protocol versions that are offered.
    pub versions: Versions,
    /// Whose key a client shows.
    pub username: Option<String>,
}

/// A user and their key.
pub(super) type Entry = (Vec<u8>, Vec<u8>);

/// Users and their keys.
pub(super) struct Keys(Vec<Entry>);

/// Logs show how many there are, and no more.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl Keys {
    pub(super) fn get(&self, user: &[u8]) -> Option<&[u8]> {
        let mut keys = self.0.iter();
        let (_, key) = keys.find(|(other, _)| other == user)?;
        Some(key)
    }

    /// The first user and their key: a client has one.
    pub(super) fn only(&self) -> Option<(&[u8], &[u8])> {
        self.0.first().map(|(user, key)| (&user[..], &key[..]))
    }
}

/// Reads the keys.
///
/// # Errors
/// In QEMU's words, or OpenSSL is not there.
pub fn load(options: &PskOptions) -> Result<Loaded, String> {
    let endpoint = options.endpoint;
    if endpoint == Endpoint::Server && options.username.is_some() {
        return Err("username should not be set when endpoint=server".to_owned());
    }
    let path = options.dir.join("keys.psk").display().to_string();
    let text = fs::read_to_string(&path).map_err(|e| unreachable_file(&path, &e))?;
    let keys = match endpoint {
        Endpoint::Server => everybody(&text),
        Endpoint::Client => {
            let user = options.username.as_deref().unwrap_or(USER);
            let key = one(&text, user);
            let key = key.ok_or_else(|| format!("Username {user} not found in PSK file {path}"))?;
            let unreadable = "Cannot set PSK client credentials: Error in parsing.";
            vec![key.ok_or(unreadable)?]
        }
    };
    let context = Context::new(Keys(keys), endpoint, options.versions)?;
    Ok(Loaded(Material::Psk(context)))
}

fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(':'))
}

/// All users and their keys; a line that is no key is nobody's.
pub(super) fn everybody(text: &str) -> Vec<Entry> {
    lines(text).filter_map(entry).collect()
}

/// The key of one user: `None` if there is no line, `Some(None)` if it is no key.
pub(super) fn one(text: &str, user: &str) -> Option<Option<Entry>> {
    let line = lines(text).find(|(other, _)| *other == user);
    line.map(entry)
}

/// A user and a key; names that are not plain text are told in digits behind `#`.
fn entry((user, key): (&str, &str)) -> Option<Entry> {
    let user = match user.strip_prefix('#') {
        Some(digits) => bytes(digits)?,
        None => user.as_bytes().to_vec(),
    };
    let key = bytes(key.trim_end())?;
    let fits = (1..=KEY_BYTES_MAX).contains(&key.len());
    fits.then_some((user, key))
}

fn bytes(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.as_bytes();
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = pairs.iter();
    pairs
        .map(|[high, low]| Some((digit(*high)? << 4 | digit(*low)?) as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_users_and_keys() {
        let user = |name: &str| name.as_bytes().to_vec();
        assert_eq!(entry(("me", "00fF")), Some((user("me"), vec![0, 255])));
        assert_eq!(entry(("#6d65", "01\r")), Some((user("me"), vec![1])));
        for bad in ["", "0", "zz", "0g"] {
            assert_eq!(entry(("me", bad)), None, "{bad}");
        }
    }
}
