//! The plugin host as the daemon uses it: started when the first plugin is needed.
//!
//! A daemon that serves raw files never pays for an engine.

use std::cell::OnceCell;
use std::sync::Arc;

use outport_plugin::{
    Bundled, CompileCache, MachineCode, PluginKind, PluginRegistry, RegistryConfig,
};
use outport_qmp::Error;
use outport_qmp::types::block_core::BlockdevDriver;

use crate::events::EventSender;

/// Drivers that are the host's own; no plugin may take their names. The options of qcow2 have
/// types, but its driver is a plugin.
fn native_drivers() -> Vec<String> {
    let names = BlockdevDriver::NAMES.iter().copied();
    let qcow2 = BlockdevDriver::Qcow2;
    names
        .filter(|name| *name != qcow2.as_str())
        .map(str::to_owned)
        .collect()
}

/// The registry, or nothing yet.
pub(crate) struct Plugins {
    registry: OnceCell<Arc<PluginRegistry>>,
    events: EventSender,
}

impl Plugins {
    pub(crate) fn new(events: EventSender) -> Self {
        Self {
            registry: OnceCell::new(),
            events,
        }
    }

    /// The registry, started now if it was not.
    ///
    /// # Errors
    /// The engine does not start on this machine.
    pub(crate) fn registry(&self) -> Result<&Arc<PluginRegistry>, Error> {
        if let Some(registry) = self.registry.get() {
            return Ok(registry);
        }
        let events = self.events.clone();
        let config = RegistryConfig {
            bundled: bundled(),
            reserved: native_drivers(),
            cache: cache(),
            on_fault: Some(Arc::new(move |event| events.fault(event))),
        };
        let registry = PluginRegistry::new(config);
        let registry = registry.map_err(|error| Error::generic(error.to_string()))?;
        Ok(self.registry.get_or_init(|| Arc::new(registry)))
    }

    /// Whether a driver name is known. Starts the registry only for a name that is not native.
    pub(crate) fn has_format(&self, name: &str) -> Result<bool, Error> {
        Ok(self
            .registry()?
            .format_names()
            .iter()
            .any(|known| known == name))
    }
}

#[allow(
    unsafe_code,
    reason = "the machine code of the bundled plugins enters here, and only here"
)]
fn bundled() -> Vec<Bundled> {
    let plugins = outport_plugins::bundled().iter();
    let convert = |plugin: &outport_plugins::Bundled| {
        Some(Bundled {
            name: plugin.name,
            kind: PluginKind::of_world(plugin.kind)?,
            wasm: plugin.wasm,
            // SAFETY: `plugins/build` made it with `precompile` while this program was built,
            // and it is a constant of the program since.
            compiled: unsafe { MachineCode::new(plugin.compiled) },
        })
    };
    plugins.filter_map(convert).collect()
}

/// Where compiled plugins are kept; set but empty: nowhere.
const CACHE_VARIABLE: &str = "OUTPORTD_CACHE_DIR";

/// Without a cache an operator's plugins are compiled at each start: slower, not wrong.
fn cache() -> Option<CompileCache> {
    let folder = match std::env::var_os(CACHE_VARIABLE) {
        Some(folder) if folder.is_empty() => return None,
        Some(folder) => folder.into(),
        None => CompileCache::default_dir()?,
    };
    match CompileCache::open(&folder) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::info!(folder = %folder.display(), %error, "no cache for compiled plugins");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_driver_is_native_or_bundled() {
        let native = native_drivers();
        let formats = bundled().into_iter().map(|it| it.name.to_owned());
        let all: Vec<String> = native.iter().cloned().chain(formats).collect();
        for name in BlockdevDriver::NAMES {
            assert!(all.iter().any(|it| it == name), "nobody has '{name}'");
        }
        for name in ["nbd", "blkdebug", "throttle", "compress", "copy-on-read"] {
            assert!(
                native.iter().any(|it| it == name),
                "a plugin may claim '{name}'"
            );
        }
    }
}
