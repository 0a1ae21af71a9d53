//! Plugins (ours).

use outport_plugin::{PluginInfo as Info, PluginKind as Kind};
use outport_qmp::Error;
use outport_qmp::types::plugin::{PluginInfo, PluginKind};

use crate::daemon::Daemon;

/// `query-plugins`.
pub(super) fn query(daemon: &Daemon) -> Result<Vec<PluginInfo>, Error> {
    let plugins = daemon.plugins.registry()?.query();
    Ok(plugins.into_iter().map(info).collect())
}

fn info(plugin: Info) -> PluginInfo {
    let milliseconds = plugin
        .limits
        .call_time_max
        .map_or(0, |limit| limit.as_millis());
    let (kind, drivers) = match plugin.kind {
        Kind::FormatReader | Kind::Format | Kind::FormatFull => {
            (PluginKind::Format, vec![plugin.name])
        }
        Kind::Authz => (PluginKind::Authz, Vec::new()),
        Kind::MetadataContext => (PluginKind::MetadataContext, Vec::new()),
    };
    PluginInfo {
        name: plugin.id,
        kind,
        version: plugin.version,
        drivers,
        bundled: plugin.bundled,
        sha256: plugin.sha256,
        memory_max: plugin.limits.memory_max,
        call_time_max_ms: u64::try_from(milliseconds).unwrap_or(u64::MAX),
        calls: plugin.calls.iter().map(|call| call.count).sum(),
        faults: plugin.faults.iter().map(|(_, count)| count).sum(),
    }
}
