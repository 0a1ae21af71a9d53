//! Unit tests that need a host.

#[path = "../../tests/host/mod.rs"]
mod host;

pub(crate) use host::Host;

mod hostile;
