//! Metadata contexts that plugins bring. Those that an operator asks for are opened before their
//! export is added; those of QEMU's that are bundled, when a client asks first. A build without
//! bundled plugins has them natively.

use std::sync::Arc;

use outport_block::Node;
use outport_block::bitmap::{DirtyBitmap, DirtyBitmapContext};
use outport_block::metacontext::{AllocationDepth, ContextProvider};
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
pub(crate) fn allocation_depth(
    daemon: &Daemon,
    export: &str,
    node: &Arc<Node>,
) -> Arc<dyn ContextProvider> {
    let view = Sight::new(node.clone());
    let context = bundled(
        daemon,
        "allocation-depth",
        export,
        "qemu:allocation-depth",
        json!({}),
        view,
    );
    context.unwrap_or_else(|| Arc::new(AllocationDepth::new(node.clone())))
}

/// `qemu:dirty-bitmap:NAME` of an export's node, with a bitmap of the node `of`.
pub(crate) fn dirty_bitmap(
    daemon: &Daemon,
    export: &str,
    node: &Arc<Node>,
    of: &Arc<Node>,
    bitmap: &Arc<DirtyBitmap>,
) -> Arc<dyn ContextProvider> {
    let name = format!("qemu:dirty-bitmap:{}", bitmap.name());
    let options = json!({"bitmap": bitmap.name()});
    let view = Sight::with_bitmap(node.clone(), of.clone(), bitmap.clone());
    let context = bundled(daemon, "dirty-bitmap", export, &name, options, view);
    context.unwrap_or_else(|| Arc::new(DirtyBitmapContext::new(bitmap.clone())))
}

fn bundled(
    daemon: &Daemon,
    plugin: &str,
    export: &str,
    name: &str,
    options: Value,
    view: Sight,
) -> Option<Arc<dyn ContextProvider>> {
    let factory = daemon.plugins.registry().ok()?.provider(plugin).ok()?;
    let context = factory.on_demand(export, name, options.to_string(), Arc::new(view));
    Some(Arc::new(context))
}
