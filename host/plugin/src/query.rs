//! What `query-plugins` and the metrics show.

use std::sync::Arc;

use outport_block::format::{FaultKind, FormatFactory as _};
use serde_json::Value;

use crate::counters::CallStats;
use crate::examine::PluginKind;
use crate::limits::Limits;
use crate::registry::Entry;

/// One plugin, as it is now.
#[derive(Clone, Debug)]
pub struct PluginInfo {
    /// Object id; the driver name for a bundled one.
    pub id: String,
    /// Driver name.
    pub name: String,
    /// What it is.
    pub kind: PluginKind,
    /// Its own version.
    pub version: String,
    /// One sentence.
    pub description: String,
    /// JSON Schema of its options.
    pub options_schema: Value,
    /// Of the `.wasm`, in hex.
    pub sha256: String,
    /// Part of this program.
    pub bundled: bool,
    /// Loaded under a hash that the operator named (or bundled).
    pub pinned: bool,
    /// Bundled, but an operator's plugin has its driver name.
    pub overridden: bool,
    /// Nodes (and others) that hold it.
    pub users: usize,
    /// Instances alive.
    pub instances: usize,
    /// Its limits.
    pub limits: Limits,
    /// Calls that were made at least once.
    pub calls: Vec<CallStats>,
    /// Every kind of fault, with its count.
    pub faults: Vec<(FaultKind, u64)>,
}

impl PluginInfo {
    pub(crate) fn of(entry: &Entry) -> Self {
        let plugin = entry.factory.plugin();
        Self {
            id: entry.id.clone(),
            name: entry.factory.name().to_owned(),
            kind: entry.kind,
            version: plugin.about.version.clone(),
            description: plugin.about.description.clone(),
            options_schema: plugin.about.schema.json().clone(),
            sha256: entry.sha256.clone(),
            bundled: entry.bundled,
            pinned: entry.pinned,
            overridden: false,
            users: Arc::strong_count(&entry.factory).saturating_sub(1),
            instances: plugin.counters.instances(),
            limits: plugin.limits,
            calls: plugin.counters.calls(),
            faults: plugin.counters.faults(),
        }
    }
}
