//! Dirty bitmaps as commands see them: which one is meant, and what may be done with it.
//!
//! Control plane. The rules and the sentences are QEMU's (spec 3.3, 4.2).

use std::sync::Arc;

use outport_block::Node;
use outport_block::bitmap::DirtyBitmap;
use outport_block::image::CannotKeep;
use outport_block::node::Kind;
use outport_qmp::Error;
use outport_qmp::types::block_export::BlockDirtyBitmapOrStr;

use crate::activity::refresh_facts;
use crate::daemon::Daemon;

/// The node that a bitmap command names.
///
/// # Errors
/// There is none.
pub(crate) fn node(daemon: &Daemon, name: &str) -> Result<Arc<Node>, Error> {
    let graph = daemon.graph.borrow();
    let node = graph.find(name).map(|entry| entry.node.clone());
    node.ok_or_else(|| Error::generic(format!("Node '{name}' not found")))
}

/// A bitmap and its node.
///
/// # Errors
/// There is none.
pub(crate) fn find(
    daemon: &Daemon,
    node_name: &str,
    name: &str,
) -> Result<(Arc<Node>, Arc<DirtyBitmap>), Error> {
    let node = node(daemon, node_name)?;
    let bitmap = node.bitmaps().find(name);
    let bitmap =
        bitmap.ok_or_else(|| Error::generic(format!("Dirty bitmap '{name}' not found")))?;
    Ok((node, bitmap))
}

/// Whether somebody relies on it.
///
/// # Errors
/// Somebody does.
pub(crate) fn check_idle(bitmap: &DirtyBitmap) -> Result<(), Error> {
    if bitmap.is_busy() {
        return Err(Error::generic(format!(
            "Bitmap '{}' is currently in use by another operation and cannot be used",
            bitmap.name()
        )));
    }
    Ok(())
}

/// Whether its bits may be read, or it may be switched on and off.
///
/// # Errors
/// Somebody relies on it, or it says nothing.
pub(crate) fn check_usable(bitmap: &DirtyBitmap) -> Result<(), Error> {
    check_idle(bitmap)?;
    if bitmap.is_inconsistent() {
        return Err(Error::generic(format!(
            "Bitmap '{}' is inconsistent and cannot be used",
            bitmap.name()
        )));
    }
    Ok(())
}

/// Whether its image refuses writes: it could not be stored as it would be.
///
/// # Errors
/// It does.
pub(crate) fn check_storable(node: &Node, bitmap: &DirtyBitmap) -> Result<(), Error> {
    if bitmap.is_persistent() && node.is_read_only() {
        return Err(Error::generic(format!(
            "Bitmap '{}' is readonly and cannot be modified",
            bitmap.name()
        )));
    }
    Ok(())
}

/// Whether a new bitmap can be kept in the node's image, which is asked on an iothread.
///
/// # Errors
/// It cannot, or its format has no place for bitmaps.
pub(crate) async fn check_can_store(
    daemon: &Daemon,
    node: &Node,
    name: &str,
    granularity: u32,
) -> Result<(), Error> {
    let unsupported = || {
        let node = node.name();
        Error::generic(format!(
            "Can't store persistent bitmaps to {node}: Operation not supported"
        ))
    };
    let image = node.image().cloned().ok_or_else(unsupported)?;
    let wanted = name.to_owned();
    let iothread = daemon.default_iothread()?;
    let asked = iothread.run(move || async move { image.can_keep(&wanted, granularity).await });
    match asked.await {
        Some(Ok(())) => Ok(()),
        Some(Err(CannotKeep::Refused(why))) => Err(Error::generic(format!(
            "Can't make bitmap '{name}' persistent in '{}': {why}",
            node.name()
        ))),
        Some(Err(CannotKeep::Unsupported)) | None => Err(unsupported()),
    }
}

/// Bitmaps were removed from this node: they go from its image, too.
///
/// # Errors
/// The image could not be written.
pub(crate) async fn forget_removed(daemon: &Daemon, node: &Arc<Node>) -> Result<(), Error> {
    let Some(image) = node.image().cloned() else {
        return Ok(());
    };
    let iothread = daemon.default_iothread()?;
    let done = iothread.run(move || async move { image.forget_removed().await });
    if let Some(Err(why)) = done.await {
        return Err(Error::generic(format!(
            "Failed to remove persistent bitmaps from '{}': {why}",
            node.name()
        )));
    }
    refresh_facts(daemon, node).await;
    Ok(())
}

/// Whether its bits may be changed.
///
/// # Errors
/// Somebody relies on it, it says nothing, or its image refuses writes.
pub(crate) fn check_changeable(node: &Node, bitmap: &DirtyBitmap) -> Result<(), Error> {
    check_idle(bitmap)?;
    check_storable(node, bitmap)?;
    check_usable(bitmap)
}

/// The bitmap that an export of `root` is to offer.
///
/// # Errors
/// There is none, or it cannot be used now.
pub(crate) fn to_offer(
    daemon: &Daemon,
    root: &Arc<Node>,
    wanted: &BlockDirtyBitmapOrStr,
    writable: bool,
) -> Result<(Arc<Node>, Arc<DirtyBitmap>), Error> {
    let (node, bitmap) = match wanted {
        BlockDirtyBitmapOrStr::External(of) => find(daemon, &of.node, &of.name)?,
        BlockDirtyBitmapOrStr::Local(name) => {
            let (node, bitmap) = below(root, name)
                .ok_or_else(|| Error::generic(format!("Bitmap '{name}' is not found")))?;
            // A client could not make sense of a bitmap that somebody else goes on writing to.
            if !writable && !node.is_read_only() && bitmap.is_enabled() {
                return Err(Error::generic(format!(
                    "Enabled bitmap '{name}' incompatible with readonly export"
                )));
            }
            (node, bitmap)
        }
    };
    check_usable(&bitmap)?;
    Ok((node, bitmap))
}

/// The first bitmap of this name at a node, or on its way down through filters and backing nodes.
fn below(root: &Arc<Node>, name: &str) -> Option<(Arc<Node>, Arc<DirtyBitmap>)> {
    let next = |node: &Arc<Node>| match node.kind() {
        Kind::Filter(filter) => Some(filter.child().1.clone()),
        Kind::Image(image) => image.backing(),
        _ => None,
    };
    let mut nodes = std::iter::successors(Some(root.clone()), next);
    nodes.find_map(|node| {
        let bitmap = node.bitmaps().find(name)?;
        Some((node, bitmap))
    })
}
