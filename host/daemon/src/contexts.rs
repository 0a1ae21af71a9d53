//! Metadata contexts that plugins bring: opened before their export is added.

use std::sync::Arc;

use outport_block::metacontext::ContextProvider;
use outport_block::view::Sight;
use outport_qmp::Error;
use outport_qmp::types::block_export::{BlockExportBranch, BlockExportOptions};
use serde_json::Value;

use crate::daemon::Daemon;

/// The contexts that `metadata-contexts` asks for.
///
/// # Errors
/// There is no such plugin, the plugin's sentence about its configuration, or two contexts of one
/// name.
pub(crate) async fn open(
    daemon: &Daemon,
    options: &BlockExportOptions,
) -> Result<Vec<Arc<dyn ContextProvider>>, Error> {
    let mut contexts: Vec<Arc<dyn ContextProvider>> = Vec::new();
    let wanted = match &options.branch {
        BlockExportBranch::Nbd(nbd) => nbd.metadata_contexts.as_deref().unwrap_or_default(),
        _ => &[],
    };
    for wanted in wanted {
        let node = daemon.graph.borrow().lookup("", &options.node_name)?;
        let factory = daemon.plugins.registry()?.provider(&wanted.plugin);
        let factory = factory.map_err(|error| Error::generic(error.to_string()))?;
        let config = Value::Object(wanted.config.clone().unwrap_or_default()).to_string();
        let opened = factory.open(&options.id, &config, Arc::new(Sight::new(node)));
        let opened = opened.await;
        for context in opened.map_err(|error| Error::generic(error.to_string()))? {
            if contexts.iter().any(|other| other.name() == context.name()) {
                return Err(Error::generic(format!(
                    "Two plugins bring the metadata context '{}'",
                    context.name()
                )));
            }
            contexts.push(context);
        }
    }
    Ok(contexts)
}
