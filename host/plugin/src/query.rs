//! What `query-plugins` and the metrics show.

use outport_block::format::FaultKind;
use serde_json::Value;

use crate::counters::CallStats;
use crate::examine::PluginKind;
use crate::limits::Limits;
use crate::registry::{Card, Entry};

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
        let Card {
            about,
            limits,
            counters,
        } = entry.factory.card();
        Self {
            id: entry.id.clone(),
            name: about.name.to_string(),
            kind: entry.kind,
            version: about.version.clone(),
            description: about.description.clone(),
            options_schema: about.schema.json().clone(),
            sha256: entry.sha256.clone(),
            bundled: entry.bundled,
            pinned: entry.pinned,
            overridden: false,
            users: entry.factory.users(),
            instances: counters.instances(),
            limits,
            calls: counters.calls(),
            faults: counters.faults(),
        }
    }
}
