//! Character devices (`char.json`).

use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::char::{
    ChardevAdd, ChardevBackendInfo, ChardevBackendKind, ChardevRemove, ChardevReturn,
};

use crate::chardev;
use crate::daemon::Daemon;

/// `chardev-add`.
pub(super) async fn add(daemon: &Daemon, arguments: ChardevAdd) -> Result<ChardevReturn, Error> {
    let ChardevAdd { id, backend } = arguments;
    if daemon.chardevs.borrow().has(&id) {
        return Err(Error::generic(format!(
            "Chardev with id '{id}' already exists"
        )));
    }
    let failed = |reason| Error::generic(format!("Failed to add chardev '{id}': {reason}"));
    let backend = chardev::from_qmp(backend).map_err(|error| failed(error.desc))?;
    let announce = |message: String| tracing::info!(message);
    let opened = chardev::open(daemon, id.clone(), backend, announce).await;
    opened.map_err(failed)?;
    Ok(ChardevReturn::default())
}

/// `chardev-remove`.
pub(super) fn remove(daemon: &Daemon, arguments: &ChardevRemove) -> Result<Empty, Error> {
    daemon.chardevs.borrow_mut().remove(&arguments.id)?;
    Ok(Empty {})
}

/// `query-chardev-backends`.
pub(super) fn backends() -> Vec<ChardevBackendInfo> {
    let kinds = [
        ChardevBackendKind::Null,
        ChardevBackendKind::Socket,
        ChardevBackendKind::Stdio,
    ];
    let info = |kind: ChardevBackendKind| ChardevBackendInfo {
        name: kind.to_string(),
    };
    kinds.map(info).into()
}
