//! vhost-user-blk exports.

use std::sync::Arc;

use outport_block::{IoThread, Node};
use outport_export::nbd::Listener;
use outport_export::vhost_user::limits::{QUEUE_SIZE_MAX, QUEUES_DEFAULT};
use outport_export::vhost_user::{self, Options};
use outport_export::{Export, ExportOptions};
use outport_qmp::Error;
use outport_qmp::types::block_export::BlockExportOptionsVhostUserBlk;
use outport_qmp::types::sockets::SocketAddressBranch;

use crate::addresses;
use crate::daemon::Daemon;
use crate::graph::{Claim, Permissions};

/// Sizes of a logical block that guests understand, as QEMU's.
const BLOCK_SIZE_MIN: u64 = 512;
const BLOCK_SIZE_MAX: u64 = 2 << 20;

/// `VIRTIO_BLK_ID_BYTES`: what GET_ID has room for.
const SERIAL_BYTES_MAX: usize = 20;

/// What it needs of its node: a guest can be told of another length.
pub(super) fn claim(writable: bool) -> Claim {
    Claim {
        required: match writable {
            true => Permissions::CONSISTENT_READ.or(Permissions::WRITE),
            false => Permissions::CONSISTENT_READ,
        },
        shared: Permissions::ALL,
    }
}

/// Checks in QEMU's order, then listens.
pub(super) fn offer(
    daemon: &Daemon,
    node: &Arc<Node>,
    wanted: ExportOptions,
    vhost: &BlockExportOptionsVhostUserBlk,
    threads: Vec<IoThread>,
) -> Result<Arc<Export>, Error> {
    let options = options(&wanted.id, vhost)?;
    let served = matches!(
        vhost.addr.branch,
        SocketAddressBranch::Unix(_) | SocketAddressBranch::Fd(_)
    );
    if !served {
        return Err(Error::generic(
            "Only socket address types 'unix' and 'fd' are supported",
        ));
    }
    let address = addresses::listen_on(vhost.addr.clone(), daemon);
    let listener = address.and_then(Listener::bind_alone);
    let listener = listener.map_err(Error::generic)?;
    let wanted = ExportOptions {
        name: wanted.id.clone(),
        multi_conn: false,
        clients_max: 1,
        ..wanted
    };
    let export = Export::new(node.clone(), wanted, threads);
    vhost_user::start(listener, &export, options);
    Ok(export)
}

fn options(id: &str, vhost: &BlockExportOptionsVhostUserBlk) -> Result<Options, Error> {
    let block = vhost.logical_block_size.unwrap_or(BLOCK_SIZE_MIN);
    // QEMU lets 0 through and divides by it.
    let block_size = (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX)
        .contains(&block)
        .then(|| u32::try_from(block).ok().filter(|it| it.is_power_of_two()))
        .flatten()
        .ok_or_else(|| {
            Error::generic(format!(
                "parameter logical-block-size must be a power of 2 between {BLOCK_SIZE_MIN} and \
                 {BLOCK_SIZE_MAX}"
            ))
        })?;
    let num_queues = vhost.num_queues.unwrap_or(QUEUES_DEFAULT);
    if num_queues == 0 {
        return Err(Error::generic("num-queues must be greater than 0"));
    }
    let queue_size_max = vhost.queue_size.unwrap_or(QUEUE_SIZE_MAX);
    if !queue_size_max.is_power_of_two() || queue_size_max > QUEUE_SIZE_MAX {
        return Err(Error::generic(format!(
            "queue-size must be a power of 2 up to {QUEUE_SIZE_MAX}"
        )));
    }
    let serial = vhost.serial.clone();
    if serial
        .as_ref()
        .is_some_and(|it| it.len() > SERIAL_BYTES_MAX)
    {
        return Err(Error::generic(format!(
            "serial must not be longer than {SERIAL_BYTES_MAX} bytes"
        )));
    }
    Ok(Options {
        logical_block_size: block_size,
        num_queues,
        queue_size_max,
        serial: serial.unwrap_or_else(|| id.to_owned()),
    })
}
