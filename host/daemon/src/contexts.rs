//! Metadata contexts that plugins bring. Those that an operator asks for are opened before their
//! export is added; those of QEMU's, which bundled plugins bring, when a client asks first.

use std::sync::Arc;

use outport_block::Node;
use outport_block::bitmap::DirtyBitmap;
use outport_block::metacontext::ContextProvider;
use outport_block::view::Sight;
use outport_qmp::Error;
use outport_qmp::types::block_export::{BlockExportBranch, BlockExportOptions};
use serde_json::{Value, json};

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

/// `qemu:allocation-depth` of an export's node.
///
/// # Errors
/// This build has no bundled plugins.
pub(crate) fn allocation_depth(
    daemon: &Daemon,
    export: &str,
    node: &Arc<Node>,
) -> Result<Arc<dyn ContextProvider>, Error> {
    let (name, view) = ("qemu:allocation-depth", Sight::new(node.clone()));
    bundled(daemon, "allocation-depth", export, name, json!({}), view)
}

/// `qemu:dirty-bitmap:NAME` of an export's node, with a bitmap of the node `of`.
///
/// # Errors
/// This build has no bundled plugins.
pub(crate) fn dirty_bitmap(
    daemon: &Daemon,
    export: &str,
    node: &Arc<Node>,
    of: &Arc<Node>,
    bitmap: &Arc<DirtyBitmap>,
) -> Result<Arc<dyn ContextProvider>, Error> {
    let name = format!("qemu:dirty-bitmap:{}", bitmap.name());
    let options = json!({"bitmap": bitmap.name()});
    let view = Sight::with_bitmap(node.clone(), of.clone(), bitmap.clone());
    bundled(daemon, "dirty-bitmap", export, &name, options, view)
}

fn bundled(
    daemon: &Daemon,
    plugin: &str,
    export: &str,
    name: &str,
    options: Value,
    view: Sight,
) -> Result<Arc<dyn ContextProvider>, Error> {
    let factory = daemon.plugins.registry()?.provider(plugin);
    let factory = factory.map_err(|error| Error::generic(error.to_string()))?;
    let context = factory.on_demand(export, name, options.to_string(), Arc::new(view));
    Ok(Arc::new(context))
}
