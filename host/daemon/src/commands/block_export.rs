//! The NBD server and exports (`block-export.json`).

use std::rc::Rc;
use std::sync::Arc;

use outport_block::bitmap::Held;
use outport_block::file::HostFile;
use outport_block::metacontext::ContextProvider;
use outport_block::{IoThread, Node};
use outport_export::{Access, Export, ExportContext, ExportOptions, Reads};
use outport_qmp::Error;
use outport_qmp::error::is_identifier;
use outport_qmp::types::Empty;
use outport_qmp::types::block_export::{
    BlockDirtyBitmapOrStr, BlockExportBranch, BlockExportDel, BlockExportIothreads,
    BlockExportOptions, BlockExportOptionsNbd, BlockExportRemoveMode, BlockExportType,
    NbdServerAdd, NbdServerRemove, NbdServerStart, NbdServerStop,
};

use super::{export_fuse, export_vhost_user};
use crate::activity;
use crate::bitmaps;
use crate::contexts;
use crate::daemon::Daemon;
use crate::exports::Entry;
use crate::graph::{Claim, Permissions, Use, User};

/// Names and descriptions may have this many bytes (NBD's limit for strings).
const NBD_STRING_BYTES_MAX: usize = 4096;

/// `nbd-server-start`.
pub(super) async fn start_server(
    daemon: &Daemon,
    arguments: NbdServerStart,
) -> Result<Empty, Error> {
    daemon.nbd.start(daemon, arguments.into()).await?;
    Ok(Empty {})
}

/// `nbd-server-stop`.
pub(super) async fn stop_server(daemon: &Daemon, arguments: NbdServerStop) -> Result<Empty, Error> {
    daemon.nbd.stop(daemon, arguments.id.as_deref()).await?;
    Ok(Empty {})
}

/// `nbd-server-add`: looks for the node before the server, and never fails over `writable`.
pub(super) async fn add_nbd(daemon: &Rc<Daemon>, arguments: NbdServerAdd) -> Result<Empty, Error> {
    let node = daemon
        .graph
        .borrow()
        .lookup(&arguments.device, &arguments.device)?;
    daemon.nbd.running(None)?;
    let name = arguments.name.unwrap_or_else(|| arguments.device.clone());
    let bitmaps = arguments
        .bitmap
        .map(|bitmap| vec![BlockDirtyBitmapOrStr::Local(bitmap)]);
    let nbd = BlockExportOptionsNbd {
        name: Some(name.clone()),
        description: arguments.description,
        bitmaps,
        ..BlockExportOptionsNbd::default()
    };
    add(
        daemon,
        BlockExportOptions {
            id: name,
            fixed_iothread: None,
            iothread: None,
            node_name: node.name().to_owned(),
            writable: Some(arguments.writable.unwrap_or(false) && !node.is_read_only()),
            writethrough: None,
            allow_inactive: None,
            authz: None,
            branch: BlockExportBranch::Nbd(nbd),
        },
    )
    .await
}

/// `nbd-server-remove`.
pub(super) async fn remove_nbd(
    daemon: &Daemon,
    arguments: &NbdServerRemove,
) -> Result<Empty, Error> {
    let id = &arguments.name;
    let (_, kind) = daemon.exports.find(id)?;
    if kind != BlockExportType::Nbd {
        return Err(Error::generic(format!(
            "Block export '{id}' is not an NBD export"
        )));
    }
    remove(daemon, id, arguments.mode).await
}

/// `block-export-del`.
pub(super) async fn delete(daemon: &Daemon, arguments: &BlockExportDel) -> Result<Empty, Error> {
    remove(daemon, &arguments.id, arguments.mode).await
}

async fn remove(
    daemon: &Daemon,
    id: &str,
    mode: Option<BlockExportRemoveMode>,
) -> Result<Empty, Error> {
    let mode = mode.unwrap_or(BlockExportRemoveMode::Safe);
    daemon.exports.delete(daemon, id, mode).await?;
    Ok(Empty {})
}

/// `block-export-add`.
pub(crate) async fn add(daemon: &Rc<Daemon>, options: BlockExportOptions) -> Result<Empty, Error> {
    let told = options.clone();
    let brought = contexts::open(daemon, &options).await?;
    let added = check_and_add(daemon, options, brought).await?;
    daemon.config.export_added(&daemon.exports, told);
    Ok(added)
}

/// The checks are in QEMU's order (spec 3.3).
async fn check_and_add(
    daemon: &Rc<Daemon>,
    options: BlockExportOptions,
    brought: Vec<Arc<dyn ContextProvider>>,
) -> Result<Empty, Error> {
    let several = matches!(options.iothread, Some(BlockExportIothreads::Multi(_)));
    if options.fixed_iothread == Some(true) && several {
        return Err(Error::generic(
            "Cannot use fixed-iothread for a multi-threaded export",
        ));
    }
    let kind = options.export_type();
    let id = options.id;
    if !is_identifier(&id) {
        return Err(Error::generic("Invalid block export id"));
    }
    let _whole = daemon.whole()?;
    // Taken from here on: some kinds wait before they are there.
    let Some(_reserved) = daemon.exports.reserve(&id) else {
        return Err(Error::generic(format!(
            "Block export id '{id}' is already in use"
        )));
    };
    let writable = options.writable.unwrap_or(false);
    let claim = match &options.branch {
        BlockExportBranch::Nbd(_) => nbd_claim(writable),
        BlockExportBranch::Fuse(fuse) => export_fuse::claim(fuse, writable),
        BlockExportBranch::VhostUserBlk(_) => export_vhost_user::claim(writable),
    };
    let node = daemon.graph.borrow().lookup("", &options.node_name)?;
    // A file that cannot be written says why when it is used.
    let refused = node.host_file().and_then(HostFile::why_read_only);
    if writable && node.is_read_only() && refused.is_none() {
        return Err(Error::generic("Cannot export read-only node as writable"));
    }
    let known = iothreads(daemon, options.iothread.clone(), node.name())?;
    let allow_inactive = options.allow_inactive == Some(true);
    if allow_inactive && matches!(options.branch, BlockExportBranch::Fuse(_)) {
        return Err(Error::generic(
            "Export type does not support inactive exports",
        ));
    }
    // What was found may be gone when this has waited.
    let (node, (threads, iothreads)) = if allow_inactive {
        (node, known)
    } else {
        activity::ensure(daemon, &options.node_name).await?;
        let node = daemon.graph.borrow().lookup("", &options.node_name)?;
        let threads = iothreads(daemon, options.iothread, node.name())?;
        (node, threads)
    };
    let purpose = Use::Export {
        claim,
        allow_inactive,
    };
    let edge = daemon
        .graph
        .borrow_mut()
        .attach(User::Block, node.name(), "root", purpose)?;
    if options.fixed_iothread == Some(true) {
        let mut graph = daemon.graph.borrow_mut();
        let pinned = graph.pin(edge, node.name(), iothreads.first().cloned());
        if let Err(error) = pinned {
            graph.detach(edge);
            return Err(error);
        }
    }
    let wanted = ExportOptions {
        id: id.clone(),
        name: node.name().to_owned(),
        description: None,
        writable,
        writethrough: options.writethrough.unwrap_or(false),
        multi_conn: true,
        clients_max: 0,
        contexts: Vec::new(),
        reads: Reads::default(),
        access: Access::new(&daemon.policies, options.authz, false),
    };
    let bypassed = matches!(&options.branch, BlockExportBranch::Fuse(fuse)
        if fuse.passthrough == Some(true));
    let server = match &options.branch {
        BlockExportBranch::Nbd(nbd) => nbd.server.clone(),
        _ => None,
    };
    let offered = match &options.branch {
        BlockExportBranch::Nbd(nbd) => offer_nbd(daemon, &id, &node, wanted, nbd, threads, brought),
        BlockExportBranch::Fuse(fuse) => export_fuse::offer(daemon, &node, wanted, fuse, threads)
            .await
            .map(|export| (export, Vec::new())),
        BlockExportBranch::VhostUserBlk(vhost) => {
            export_vhost_user::offer(daemon, &node, wanted, vhost, threads)
                .map(|export| (export, Vec::new()))
        }
    };
    match offered {
        Ok((export, held)) => {
            daemon.exports.add(
                daemon,
                Entry {
                    export,
                    kind,
                    edge,
                    iothreads,
                    drained: Vec::new(),
                    bypassed,
                    server,
                    held,
                },
            );
            tracing::info!(export = id, node = options.node_name, "export added");
            Ok(Empty {})
        }
        Err(error) => {
            daemon.graph.borrow_mut().detach(edge);
            Err(error)
        }
    }
}

fn nbd_claim(writable: bool) -> Claim {
    Claim {
        required: match writable {
            true => Permissions::CONSISTENT_READ.or(Permissions::WRITE),
            false => Permissions::CONSISTENT_READ,
        },
        // Clients were told the length.
        shared: Permissions::ALL.without(Permissions::RESIZE),
    }
}

/// The threads that serve an export, and the ids of the objects among them.
fn iothreads(
    daemon: &Daemon,
    wanted: Option<BlockExportIothreads>,
    node: &str,
) -> Result<(Vec<IoThread>, Vec<String>), Error> {
    let ids = match wanted {
        None => match daemon.iothread_of(node) {
            Some(id) => vec![id],
            None => return Ok((vec![daemon.default_iothread()?], Vec::new())),
        },
        Some(BlockExportIothreads::Single(id)) => vec![id],
        Some(BlockExportIothreads::Multi(ids)) => ids,
    };
    if ids.is_empty() {
        return Err(Error::generic("The set of I/O threads must not be empty"));
    }
    let objects = daemon.objects.borrow();
    let known = |id: &String| objects.iothread_id(id);
    let ids: Vec<_> = ids.iter().map(known).collect::<Result<_, _>>()?;
    let threads = ids
        .iter()
        .map(|id| objects.iothread(id))
        .collect::<Result<_, _>>()?;
    Ok((threads, ids))
}

fn offer_nbd(
    daemon: &Daemon,
    id: &str,
    node: &Arc<Node>,
    wanted: ExportOptions,
    nbd: &BlockExportOptionsNbd,
    threads: Vec<IoThread>,
    brought: Vec<Arc<dyn ContextProvider>>,
) -> Result<(Arc<Export>, Vec<Held>), Error> {
    let server = daemon.nbd.running(nbd.server.as_deref())?;
    let name = nbd.name.clone().unwrap_or_else(|| node.name().to_owned());
    if name.len() > NBD_STRING_BYTES_MAX {
        return Err(Error::generic(format!("export name '{name}' too long")));
    }
    if let Some(description) = &nbd.description
        && description.len() > NBD_STRING_BYTES_MAX
    {
        return Err(Error::generic(format!(
            "description '{description}' too long"
        )));
    }
    let (contexts, held) = all_contexts(daemon, id, node, nbd, wanted.writable, brought)?;
    let reads = reads(nbd, wanted.writable, &held)?;
    let clients_max = nbd.max_connections.unwrap_or(0);
    let export = Export::new(
        node.clone(),
        ExportOptions {
            name,
            description: nbd.description.clone(),
            // One client at a time has nobody to share its flushes with.
            multi_conn: server.options().max_connections != 1 && clients_max != 1,
            clients_max,
            contexts,
            reads,
            ..wanted
        },
        threads,
    );
    daemon.nbd.offer(nbd.server.as_deref(), export.clone())?;
    Ok((export, held))
}

/// What clients may read, and what becomes of it.
///
/// # Errors
/// The options do not fit what is exported.
fn reads(nbd: &BlockExportOptionsNbd, writable: bool, held: &[Held]) -> Result<Reads, Error> {
    let restricted = nbd.restrict_reads.unwrap_or(false);
    if restricted && held.is_empty() {
        return Err(Error::generic("'restrict-reads' needs 'bitmaps'"));
    }
    let discard = nbd.discard_after_read.unwrap_or(false);
    if discard && !writable {
        return Err(Error::generic(
            "'discard-after-read' needs a writable export",
        ));
    }
    let bitmaps = held.iter().map(|held| held.bitmap().clone());
    let within = restricted.then(|| bitmaps.collect());
    Ok(Reads { within, discard })
}

/// The contexts that an export offers, with QEMU's ids: 1 is the depth, bitmaps begin at 2, those
/// of plugins follow.
///
/// # Errors
/// In QEMU's words: there is no such bitmap, or it cannot be used now.
fn all_contexts(
    daemon: &Daemon,
    id: &str,
    node: &Arc<Node>,
    nbd: &BlockExportOptionsNbd,
    writable: bool,
    brought: Vec<Arc<dyn ContextProvider>>,
) -> Result<(Vec<ExportContext>, Vec<Held>), Error> {
    let bitmaps = nbd.bitmaps.iter().flatten();
    let bitmaps: Vec<_> = bitmaps
        .map(|wanted| bitmaps::to_offer(daemon, node, wanted, writable))
        .collect::<Result<_, _>>()?;
    let mut offered = Vec::new();
    if nbd.allocation_depth == Some(true) {
        offered.push(ExportContext {
            id: 1,
            provider: contexts::allocation_depth(daemon, id, node)?,
        });
    }
    for (number, (of, bitmap)) in (2..).zip(&bitmaps) {
        let provider = contexts::dirty_bitmap(daemon, id, node, of, bitmap)?;
        offered.push(ExportContext {
            id: number,
            provider,
        });
    }
    let next = offered
        .iter()
        .map(|context: &ExportContext| context.id)
        .max();
    for (id, provider) in (next.unwrap_or(1) + 1..).zip(brought) {
        offered.push(ExportContext { id, provider });
    }
    let held = bitmaps.iter().map(|(_, bitmap)| bitmap.hold()).collect();
    Ok((offered, held))
}
