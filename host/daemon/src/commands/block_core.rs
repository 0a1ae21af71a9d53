//! Nodes (`block-core.json`).

use std::rc::Rc;
use std::sync::Arc;

use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::Empty;
use outport_qmp::types::block_core::{
    BlockResize, BlockSetWriteThreshold, BlockdevDel, BlockdevOptions, BlockdevReopen,
    BlockdevSetIothread, QueryNamedBlockNodes, StrOrNull,
};
use outport_qmp::types::block_info::BlockDeviceInfo;

use crate::blockdev;
use crate::daemon::Daemon;
use crate::graph::{Claim, Permissions, Use, User};
use crate::nodes;

/// `blockdev-add`.
pub(super) async fn add(daemon: &Daemon, options: BlockdevOptions) -> Result<Empty, Error> {
    blockdev::add(daemon, options, Mode::Typed).await?;
    Ok(Empty {})
}

/// `blockdev-reopen`.
pub(super) async fn reopen(daemon: &Daemon, arguments: BlockdevReopen) -> Result<Empty, Error> {
    blockdev::reopen(daemon, arguments.options).await?;
    Ok(Empty {})
}

/// `blockdev-del`.
pub(super) async fn delete(daemon: &Daemon, arguments: BlockdevDel) -> Result<Empty, Error> {
    blockdev::delete(daemon, &arguments.node_name).await?;
    Ok(Empty {})
}

/// `x-blockdev-set-iothread`.
pub(super) fn set_iothread(
    daemon: &Daemon,
    arguments: BlockdevSetIothread,
) -> Result<Empty, Error> {
    let name = &arguments.node_name;
    let mut graph = daemon.graph.borrow_mut();
    if graph.find(name).is_none() {
        return Err(Error::no_such_node(name));
    }
    if arguments.force != Some(true) && graph.has_exports(name) {
        return Err(Error::generic(format!(
            "Node {name} is associated with a BlockBackend and could be in use (use force=true to \
             override this check)"
        )));
    }
    let wanted = match arguments.iothread {
        StrOrNull::Text(id) => Some(id),
        StrOrNull::Null(()) => None,
    };
    if let Some(id) = &wanted
        && daemon.objects.borrow().iothread(id).is_err()
    {
        return Err(Error::generic(format!("Cannot find iothread {id}")));
    }
    graph.set_iothread(name, wanted.as_deref())?;
    Ok(Empty {})
}

/// `block_resize`.
pub(super) async fn resize(daemon: &Rc<Daemon>, arguments: BlockResize) -> Result<Empty, Error> {
    let device = arguments.device.unwrap_or_default();
    let name = arguments.node_name.unwrap_or_default();
    // A device is a guest's, of which there are none; only a node name finds something.
    if name.is_empty() {
        return Err(Error::no_such_device_or_node(&device, &name));
    }
    let _whole = daemon.whole()?;
    let node = daemon.graph.borrow().lookup(&device, &name)?;
    let size = u64::try_from(arguments.size);
    let size = size.map_err(|_| Error::expects("size", "a >0 size"))?;
    // Exports do not share this: a client has been told the length.
    let claim = Claim {
        required: Permissions::RESIZE,
        shared: Permissions::ALL,
    };
    let purpose = Use::Direct(claim);
    let edge = daemon
        .graph
        .borrow_mut()
        .attach(User::Block, node.name(), "root", purpose)?;
    let iothread = daemon.default_iothread();
    let resized = match iothread {
        Ok(iothread) => {
            iothread
                .run(move || async move { node.resize(size).await })
                .await
        }
        Err(error) => {
            daemon.graph.borrow_mut().detach(edge);
            return Err(error);
        }
    };
    daemon.graph.borrow_mut().detach(edge);
    match resized {
        Some(Err(error)) => Err(Error::generic(error.to_string())),
        Some(Ok(())) | None => {
            daemon.exports.tell_resized();
            Ok(Empty {})
        }
    }
}

/// `block-set-write-threshold`.
pub(super) fn set_write_threshold(
    daemon: &Daemon,
    arguments: &BlockSetWriteThreshold,
) -> Result<Empty, Error> {
    let name = &arguments.node_name;
    let graph = daemon.graph.borrow();
    let entry = graph.find(name);
    let entry = entry.ok_or_else(|| Error::generic(format!("Device '{name}' not found")))?;
    let events = daemon.events.sender();
    let tell = Arc::new(move |exceeded| events.exceeded(exceeded));
    entry
        .node
        .set_write_threshold(arguments.write_threshold, tell);
    Ok(Empty {})
}

/// `query-named-block-nodes`, newest first.
pub(super) fn query_nodes(
    daemon: &Daemon,
    arguments: &QueryNamedBlockNodes,
) -> Vec<BlockDeviceInfo> {
    let graph = daemon.graph.borrow();
    let flat = arguments.flat.unwrap_or(false);
    graph
        .newest_first()
        .map(|entry| nodes::info(&graph, entry, flat))
        .collect()
}
