//! TLS: credentials, handshakes and records, without any I/O of their own.
//!
//! ```text
//!  directory -> x509, psk -> Credentials -> Session (rustls | OpenSSL) <-> bytes
//!               sanity       replaceable     one per connection
//! ```
//!
//! Credentials are made and replaced on the control plane; a [`Session`] is made there, does its
//! handshake there and moves to an iothread with its connection. Invariants: a session keeps the
//! credentials that it began with; what a peer sends is only ever bytes to a library or to the
//! pure parsers here, which are fuzzed. `host/export/ARCHITECTURE-export.md` has the picture.

mod certificate;
mod credentials;
mod der;
pub mod fuzzing;
mod name;
mod openssl;
mod pem;
mod priority;
mod psk;
mod sanity;
mod session;
mod verify;
mod x509;

pub use certificate::{AltName, Certificate};
pub use credentials::{Credentials, Endpoint, Loaded};
pub use der::Malformed;
pub use name::{NameError, spell};
pub use priority::{Versions, versions};
pub use psk::{PskOptions, load as load_psk};
pub(crate) use session::{Distrust, Failure, Plain, Session};
pub use x509::{X509Options, load as load_x509};
