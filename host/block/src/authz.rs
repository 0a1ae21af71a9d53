//! The authorization seam: whether a peer may use an export, in the words of `wit/authz.wit`.
//! `host/plugin` implements it with Wasm components; tests implement it in Rust.
//!
//! Asked on the control plane, never by a request. Invariants: a policy cannot fail open, because
//! its answer has no third case; an allow narrows what the operator configured and never widens
//! it.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::pin::Pin;
use std::time::Duration;

use crate::Errno;

/// A decision that is being made. `Send`, because it may be asked from any thread.
pub type Deciding<'a> = Pin<Box<dyn Future<Output = Decision> + Send + 'a>>;

/// How a peer came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Transport {
    /// NBD over TCP.
    #[default]
    NbdTcp,
    /// NBD over a unix socket.
    NbdUnix,
    /// A virtual machine's disk.
    VhostUserBlk,
    /// A file that was opened.
    Fuse,
}

impl Transport {
    /// The contract's word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::NbdTcp => "nbd-tcp",
            Self::NbdUnix => "nbd-unix",
            Self::VhostUserBlk => "vhost-user-blk",
            Self::Fuse => "fuse",
        }
    }
}

/// What a TLS handshake proved of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsPeer {
    /// The issuer's distinguished name.
    pub issuer: Option<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    pub fingerprint: Option<String>,
    /// Subject alternative names as `KIND:value`, e.g. `DNS:vm1.example`, `URI:spiffe://a/b`.
    pub subject_alt_names: Vec<String>,
    /// Who presented a pre-shared key.
    pub psk_user: Option<String>,
}

/// Alternative names of a certificate that a log line tells.
const NAMES_TOLD: usize = 4;

/// Characters of a name that a log line tells.
const NAME_CHARS_TOLD: usize = 256;

/// A peer's own words, as far as a log line has room for them, so that they end where they seem to.
struct Told<'a>(&'a str);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.char_indices().nth(NAME_CHARS_TOLD);
        match end {
            Some((end, _)) => write!(f, "'{}...'", self.0[..end].escape_debug()),
            None => write!(f, "'{}'", self.0.escape_debug()),
        }
    }
}

impl fmt::Display for TlsPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.psk_user {
            write!(f, " psk-user={}", Told(user))?;
        }
        for name in self.subject_alt_names.iter().take(NAMES_TOLD) {
            write!(f, " san={}", Told(name))?;
        }
        match self.subject_alt_names.len().saturating_sub(NAMES_TOLD) {
            0 => Ok(()),
            more => write!(f, " and {more} more names"),
        }
    }
}

/// What the host itself established of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// How it came.
    pub transport: Transport,
    /// What QEMU's authorization objects compare: the certificate's distinguished name. Empty if
    /// there is none.
    pub identity: String,
    /// What TLS proved; `None` without TLS.
    pub tls: Option<TlsPeer>,
    /// Its network address, `host:port`.
    pub address: Option<String>,
    /// The user it runs as, told by the kernel.
    pub uid: Option<u32>,
    /// That user's group.
    pub gid: Option<u32>,
    /// Its process, which may be another one by now.
    pub pid: Option<u32>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.transport.word())?;
        if let Some(address) = &self.address {
            write!(f, " {address}")?;
        }
        if let Some(uid) = self.uid {
            write!(f, " uid={uid}")?;
        }
        if let Some(pid) = self.pid {
            write!(f, " pid={pid}")?;
        }
        if !self.identity.is_empty() {
            write!(f, " identity={}", Told(&self.identity))?;
        }
        match &self.tls {
            Some(tls) => tls.fmt(f),
            None => Ok(()),
        }
    }
}

/// A question: may this peer use this export?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Who asks.
    pub peer: Peer,
    /// The export as clients name it; `None` while only the identity is judged (`tls-authz`).
    pub export_name: Option<String>,
    /// It would be able to write.
    pub wants_write: bool,
}

/// What an allow is worth. The default narrows nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// It may not write.
    pub read_only: bool,
    /// Ask again after this time; `None`: the session is not judged again.
    pub expires_after: Option<Duration>,
    /// Requests per second; `None`: no limit.
    pub iops_max: Option<NonZeroU32>,
    /// Bytes per second, read and written; `None`: no limit.
    pub bytes_per_second_max: Option<NonZeroU64>,
}

impl Grant {
    /// What is left when both were granted: the narrower of each.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        fn least<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
            match (a, b) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        }
        Self {
            read_only: self.read_only || other.read_only,
            expires_after: least(self.expires_after, other.expires_after),
            iops_max: least(self.iops_max, other.iops_max),
            bytes_per_second_max: least(self.bytes_per_second_max, other.bytes_per_second_max),
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, within these bounds.
    Allow(Grant),
    /// No. The reason is for the log, never for the peer.
    Deny(String),
}

/// Who decides. Whatever is wrong with a policy, its decision is a denial.
pub trait Policy: fmt::Debug + Send + Sync {
    /// QEMU's question: is this identity admitted? `facts` have no export name.
    fn is_allowed<'a>(&'a self, facts: &'a Facts) -> Deciding<'a>;

    /// The rich question, asked when an export is chosen.
    fn decide<'a>(&'a self, facts: &'a Facts) -> Deciding<'a>;
}

/// The files that the operator granted a policy by name, and nothing else: a policy never names a
/// path.
pub trait ConfigFiles: Send + Sync {
    /// All bytes of a file.
    ///
    /// # Errors
    /// It was not granted, or cannot be read.
    fn read(&self, name: &str) -> Result<Vec<u8>, Errno>;

    /// Another number whenever the file is another; cheap enough for every decision.
    ///
    /// # Errors
    /// It was not granted, or is not there.
    fn generation(&self, name: &str) -> Result<u64, Errno>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_grants_leave_the_narrower_of_each() {
        let ops = NonZeroU32::new;
        let (seconds, minute) = (Duration::from_secs(5), Duration::from_secs(60));
        let first = Grant {
            read_only: true,
            expires_after: Some(minute),
            iops_max: ops(10),
            bytes_per_second_max: None,
        };
        let second = Grant {
            read_only: false,
            expires_after: Some(seconds),
            iops_max: None,
            bytes_per_second_max: NonZeroU64::new(7),
        };
        let both = Grant {
            read_only: true,
            expires_after: Some(seconds),
            iops_max: ops(10),
            bytes_per_second_max: NonZeroU64::new(7),
        };
        assert_eq!(first.and(second), both);
        assert_eq!(second.and(first), both);
        assert_eq!(first.and(Grant::default()), first);
    }

    #[test]
    fn a_peer_s_name_cannot_forge_a_log_line() {
        let peer = Peer {
            transport: Transport::NbdUnix,
            identity: "CN=a\nb'".into(),
            uid: Some(0),
            ..Peer::default()
        };
        assert_eq!(peer.to_string(), "nbd-unix uid=0 identity='CN=a\\nb\\''");
    }

    #[test]
    fn what_tls_proved_is_told_within_bounds() {
        let mut tls = TlsPeer {
            psk_user: Some("a'b".into()),
            ..TlsPeer::default()
        };
        assert_eq!(tls.to_string(), " psk-user='a\\'b'");
        tls = TlsPeer {
            subject_alt_names: (0..9).map(|n| format!("URI:x/{n}")).collect(),
            ..TlsPeer::default()
        };
        let told = tls.to_string();
        assert!(told.starts_with(" san='URI:x/0' san='URI:x/1'"), "{told}");
        assert!(told.ends_with(" and 5 more names"), "{told}");
        tls.subject_alt_names = vec!["\u{e9}".repeat(1000)];
        assert!(tls.to_string().chars().count() < 300);
    }
}
