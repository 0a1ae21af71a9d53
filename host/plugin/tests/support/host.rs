//! A plugin of any kind with a registry of its own.

use std::sync::{Arc, Mutex};

use outport_plugin::{FaultEvent, Limits, PluginInfo, PluginRegistry, RegistryConfig};

use super::spec;

/// The plugin `p0`, and what was told of its faults.
pub struct Host {
    pub registry: PluginRegistry,
    pub info: PluginInfo,
    pub seen: Arc<Mutex<Vec<FaultEvent>>>,
}

impl Host {
    pub fn new(wasm: &[u8], limits: Limits) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let registry = PluginRegistry::new(RegistryConfig {
            on_fault: Some(Arc::new(move |event: &FaultEvent| {
                told.lock().unwrap().push(event.clone());
            })),
            ..RegistryConfig::default()
        })
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plugin.wasm");
        std::fs::write(&path, wasm).unwrap();
        let info = registry.add(&spec("p0", &path, limits)).unwrap();
        Self {
            registry,
            info,
            seen,
        }
    }
}
