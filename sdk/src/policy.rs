//! The policy trait: `authz.wit` in Rust words. Default-deny: an error, a panic
//! or a call that runs too long is a denial, never an allow.

use crate::{Info, LogLevel, Result};

/// How a peer came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the contract's")]
pub enum Transport {
    NbdTcp,
    #[default]
    NbdUnix,
    VhostUserBlk,
    Fuse,
    Qmp,
}

/// What the host itself established of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// How it came.
    pub transport: Transport,
    /// What QEMU's authorization objects compare: the distinguished name of the
    /// TLS certificate. Empty if there is none.
    pub identity: String,
    /// The distinguished name of the certificate's issuer.
    pub tls_issuer: Option<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    pub tls_fingerprint: Option<String>,
    /// Subject alternative names, `KIND:value`: `URI:spiffe://acme/backup`.
    pub tls_san: Vec<String>,
    /// Who presented a pre-shared key.
    pub psk_user: Option<String>,
    /// `host:port`.
    pub address: Option<String>,
    /// The user at the other end of a unix socket.
    pub uid: Option<u32>,
    /// That user's group.
    pub gid: Option<u32>,
    /// The process; it may be another one by now.
    pub pid: Option<u32>,
}

/// A question: may this peer use this export?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub peer: Peer,
    /// The export.
    pub export_name: Option<String>,
    /// It would be able to write. Grant `read_only` where it must not.
    pub wants_write: bool,
    /// Wall clock, milliseconds since 1970: a policy has no clock of its own.
    pub now_ms: u64,
}

/// What an allow is worth. It narrows what the operator configured; the default
/// narrows nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Narrowing {
    /// It may not write.
    pub read_only: bool,
    /// Ask again after this many milliseconds; 0: never.
    pub ttl_ms: u64,
    /// Requests per second; 0: no limit.
    pub max_iops: u32,
    /// Bytes per second; 0: no limit.
    pub max_bytes_per_sec: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, within these bounds.
    Allow(Narrowing),
    /// No; the reason is for the operator's log.
    Deny(String),
}

impl Decision {
    /// Yes, with all that was configured.
    pub fn allow() -> Self {
        Self::Allow(Narrowing::default())
    }

    /// Yes, for reading.
    pub fn read_only() -> Self {
        Self::Allow(Narrowing {
            read_only: true,
            ..Narrowing::default()
        })
    }

    /// No, for this reason.
    pub fn deny(reason: impl Into<String>) -> Self {
        Self::Deny(reason.into())
    }
}

/// The files that the operator granted by name, and the log.
pub trait ConfigFiles {
    /// All bytes of a file, at most 1 MiB.
    fn read(&self, name: &str) -> Result<Vec<u8>>;

    /// Another number whenever the file is another; cheap enough to ask at each
    /// decision.
    fn generation(&self, name: &str) -> Result<u64>;

    /// One log line; the host adds plugin and object.
    fn log(&self, level: LogLevel, message: &str);
}

/// An authorization policy: an instance is one object of the operator.
pub trait Policy: Sized {
    /// Who the plugin is.
    fn info() -> Info;

    /// Begin with these options: a JSON object that fits the schema.
    fn open(files: &dyn ConfigFiles, options: &str) -> Result<Self>;

    /// Asked when a client names an export, and again when a grant has run out.
    fn decide(&mut self, files: &dyn ConfigFiles, request: &Request) -> Result<Decision>;

    /// QEMU's question (`tls-authz`): is this identity admitted at all? Asked
    /// right after the TLS handshake, with nothing else known. Nobody is, unless
    /// a policy says otherwise.
    fn is_allowed(&mut self, files: &dyn ConfigFiles, identity: &str) -> Result<bool> {
        let _ = (files, identity);
        Ok(false)
    }

    /// Other options from now on; an error leaves the old ones in force.
    fn reconfigure(&mut self, files: &dyn ConfigFiles, options: &str) -> Result<()> {
        *self = Self::open(files, options)?;
        Ok(())
    }
}
