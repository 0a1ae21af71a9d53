//! Plugin objects: components that an operator loads.

use std::time::Duration;

use outport_plugin::{Limits, PluginSpec};
use outport_qmp::Error;
use outport_qmp::types::plugin::WasmPluginProperties;

use crate::daemon::Daemon;

/// Compiles a plugin and enters it in the registry.
///
/// # Errors
/// A limit that cannot be, or the registry's sentence.
pub(super) async fn load(
    daemon: &Daemon,
    id: &str,
    properties: &WasmPluginProperties,
) -> Result<(), Error> {
    let mut limits = Limits::default();
    if let Some(bytes) = properties.memory_max {
        limits.memory_max = bytes.0;
    }
    match properties.call_time_max_ms {
        None => {}
        Some(0) => return Err(Error::expects("call-time-max-ms", "a value of at least 1")),
        Some(ms) => limits.call_time_max = Some(Duration::from_millis(ms)),
    }
    let spec = PluginSpec {
        id: id.to_owned(),
        filename: properties.filename.clone().into(),
        sha256: properties.sha256.clone(),
        allow_unpinned: properties.allow_unpinned.unwrap_or(false),
        limits,
    };
    let registry = daemon.plugins.registry()?.clone();
    let added = registry.add_in_background(spec).await;
    added
        .map(drop)
        .map_err(|error| Error::generic(error.to_string()))
}

/// Takes a plugin out of the registry.
///
/// # Errors
/// Something uses it.
pub(super) fn unload(daemon: &Daemon, id: &str) -> Result<(), Error> {
    // Nodes and authorization objects hold their plugin.
    let removed = daemon.plugins.registry()?.remove(id);
    removed.map_err(|_in_use| Error::object_in_use(id))
}
