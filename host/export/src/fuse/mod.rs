//! FUSE exports: a node as one regular file.
//!
//! Protocol below, I/O above: `wire`, `request`, `reply` and `mountinfo` are pure; `mount` and
//! `fusermount` make and take away mounts on the control plane; a [`queue`] per iothread serves.
//! `ARCHITECTURE-fuse.md` has the picture.

mod file;
mod fusermount;
mod mount;
mod mountinfo;
mod passthrough;
mod queue;
mod reply;
mod request;
mod serve;
mod sys;
mod wire;

use std::io;
use std::sync::Arc;

use tokio::sync::watch;

pub use file::{FileOptions, Resizer, Resizing};
pub use mount::{AllowOther, MountError, Mounted, mount};
pub use passthrough::identity;
pub use request::fuzz;

use crate::export::Export;
use file::File;
use queue::Handover;

/// Serves a mounted file until the export is shut down, or until somebody unmounts it, which
/// shuts the export down.
///
/// Runs in the background, on the current runtime and on the export's iothreads: one queue each.
///
/// # Errors
/// No descriptor to be had for a queue; the file is unmounted then.
pub fn serve(
    mounted: Mounted,
    export: &Arc<Export>,
    options: FileOptions,
    resizer: Resizer,
) -> io::Result<()> {
    let Mounted {
        device,
        mount,
        allow_other,
    } = mounted;
    let mut devices = Vec::new();
    for _ in 1..export.iothreads().len() {
        devices.push(sys::clone_device(&device)?);
    }
    devices.push(device);
    let file = Arc::new(File::new(export.clone(), options, allow_other, resizer));
    let (end, unmounted) = watch::channel(false);
    for (at, (device, iothread)) in devices.into_iter().zip(export.iothreads()).enumerate() {
        let handover = Handover {
            device,
            file: file.clone(),
            hold: export.hold(),
            unmounted: unmounted.clone(),
            first: at == 0,
        };
        iothread.spawn(move || queue::run(handover));
    }
    let hold = export.hold();
    tokio::spawn(async move {
        let export = file.export();
        export.cut().await;
        // Queues go on meanwhile: what is dirty in the kernel's cache may come to them.
        let abort = export.users() > 0;
        let unmounting = tokio::task::spawn_blocking(move || mount.unmount(abort));
        if let Err(reason) = unmounting.await {
            tracing::error!(%reason, "unmounting failed");
        }
        let _all_ended = end.send(true);
        file.release_all();
        drop(hold);
    });
    Ok(())
}
