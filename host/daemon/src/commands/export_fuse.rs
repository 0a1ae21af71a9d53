//! `block-export-add type=fuse`: from options to a mounted file.
//!
//! Control plane. Mounting may wait, for a path that leads to a server: it happens on a thread of
//! its own, while the export's id and its use of the node are taken already.

use std::rc::{Rc, Weak};
use std::sync::Arc;

use outport_block::{Errno, IoThread, Node};
use outport_export::fuse::{self, AllowOther, FileOptions, Resizer};
use outport_export::{Export, ExportOptions};
use outport_qmp::Error;
use outport_qmp::types::OnOffAuto;
use outport_qmp::types::block_export::BlockExportOptionsFuse;
use tokio::sync::{mpsc, oneshot};

use crate::daemon::Daemon;
use crate::graph::{Claim, Permissions, Use, User};

/// What a file's users do to the node, and let others do.
pub(super) fn claim(fuse: &BlockExportOptionsFuse, writable: bool) -> Claim {
    let read = Permissions::CONSISTENT_READ;
    let required = match (writable, fuse.growable) {
        (false, _) => read,
        (true, Some(true)) => read.or(Permissions::WRITE).or(Permissions::RESIZE),
        (true, _) => read.or(Permissions::WRITE),
    };
    // The length of a file may change under its users.
    Claim {
        required,
        shared: Permissions::ALL,
    }
}

/// Mounts the file and serves it.
///
/// # Errors
/// QEMU's sentences about the file; the daemon is ending.
pub(super) async fn offer(
    daemon: &Rc<Daemon>,
    node: &Arc<Node>,
    options: ExportOptions,
    fuse: &BlockExportOptionsFuse,
    threads: Vec<IoThread>,
) -> Result<Arc<Export>, Error> {
    let path = fuse.mountpoint.clone();
    let writable = options.writable;
    let passthrough = match fuse.passthrough {
        Some(true) if writable => {
            return Err(Error::generic(
                "Parameter 'passthrough' needs a read-only export: writes would bypass the node",
            ));
        }
        Some(true) => Some(fuse::identity(node).map_err(Error::generic)?),
        Some(false) | None => None,
    };
    let allow_other = match fuse.allow_other {
        Some(OnOffAuto::Off) => AllowOther::Off,
        Some(OnOffAuto::On) => AllowOther::On,
        Some(OnOffAuto::Auto) | None => AllowOther::Auto,
    };
    let mounting =
        tokio::task::spawn_blocking(move || fuse::mount(path.as_ref(), writable, allow_other));
    let mounted = mounting
        .await
        .map_err(|error| Error::generic(error.to_string()))?
        .map_err(|error| Error::generic(error.to_string()))?;
    if daemon.is_ending() {
        return Err(Error::generic("The daemon is ending"));
    }
    let export = Export::new(node.clone(), options, threads);
    let file = FileOptions {
        growable: fuse.growable.unwrap_or(false),
        passthrough,
    };
    fuse::serve(mounted, &export, file, resizer(daemon, node)).map_err(|reason| {
        tracing::warn!(export = export.id(), %reason, "cannot serve the file");
        Error::generic("Failed to mount FUSE session to export")
    })?;
    Ok(export)
}

/// A length that a client of the file wants.
struct Wanted {
    len: u64,
    done: oneshot::Sender<Result<(), Errno>>,
}

/// Changes the node's length as `block_resize` does: only if nobody minds.
fn resizer(daemon: &Rc<Daemon>, node: &Arc<Node>) -> Resizer {
    let (ask, mut asked) = mpsc::unbounded_channel::<Wanted>();
    let (daemon, node) = (Rc::downgrade(daemon), node.clone());
    tokio::task::spawn_local(async move {
        while let Some(Wanted { len, done }) = asked.recv().await {
            let _client_left = done.send(resize(&daemon, &node, len).await);
        }
    });
    Box::new(move |len| {
        let ask = ask.clone();
        Box::pin(async move {
            let (done, wait) = oneshot::channel();
            ask.send(Wanted { len, done })
                .map_err(|_| Errno::Shutdown)?;
            wait.await.map_err(|_| Errno::Shutdown)?
        })
    })
}

async fn resize(daemon: &Weak<Daemon>, node: &Arc<Node>, len: u64) -> Result<(), Errno> {
    let daemon = daemon.upgrade().ok_or(Errno::Shutdown)?;
    let purpose = Use::Direct(Claim {
        required: Permissions::RESIZE,
        shared: Permissions::ALL,
    });
    let iothread = daemon.default_iothread().map_err(|_| Errno::NoMem)?;
    let edge = daemon
        .graph
        .borrow_mut()
        .attach(User::Block, node.name(), "root", purpose)
        .map_err(|_| Errno::Perm)?;
    let node = node.clone();
    let resized = iothread.run(move || async move { node.set_len(len).await });
    let resized = resized.await.unwrap_or(Err(Errno::Io));
    daemon.graph.borrow_mut().detach(edge);
    daemon.exports.tell_resized();
    resized
}
