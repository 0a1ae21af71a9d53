//! Version and negotiation (`control.json`).

use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::control::VersionInfo;

/// The QEMU whose schema is spoken, and who speaks it.
pub(crate) fn version() -> VersionInfo {
    VersionInfo::with_package(concat!("outport ", env!("CARGO_PKG_VERSION")))
}

/// `qmp_capabilities` after negotiation; sessions answer it themselves.
pub(super) fn capabilities() -> Result<Empty, Error> {
    Err(Error::command_not_found(
        "Capabilities negotiation is already complete, command ignored",
    ))
}
