//! Requests that are held up, for tests: what qemu-io does with a `blkdebug` node of its own
//! (`break`, `remove_break`, `resume`), over QMP.

use std::sync::Arc;

use outport_block::Node;
use outport_block::filter::Blkdebug;
use outport_block::filter::blkdebug::Event;
use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::block_debug::{
    BlkdebugBreak, BlkdebugInfo, BlkdebugRemoveBreak, BlkdebugResume, QueryBlkdebug,
};

use crate::daemon::Daemon;

/// `x-blkdebug-break`.
pub(super) fn add_break(daemon: &Daemon, arguments: &BlkdebugBreak) -> Result<Empty, Error> {
    let event = arguments.event.as_str();
    let event = Event::named(event).ok_or_else(|| Error::bad_enum("event", event))?;
    let node = find(daemon, &arguments.node_name)?;
    debug(&node)?.add_break(event, &arguments.tag);
    Ok(Empty {})
}

/// `x-blkdebug-remove-break`.
pub(super) fn remove_break(
    daemon: &Daemon,
    arguments: &BlkdebugRemoveBreak,
) -> Result<Empty, Error> {
    let node = find(daemon, &arguments.node_name)?;
    match debug(&node)?.remove_breaks(&arguments.tag) {
        0 => Err(no_such_tag(&arguments.tag)),
        _ => Ok(Empty {}),
    }
}

/// `x-blkdebug-resume`.
pub(super) fn resume(daemon: &Daemon, arguments: &BlkdebugResume) -> Result<Empty, Error> {
    let node = find(daemon, &arguments.node_name)?;
    let resumed = debug(&node)?.resume(arguments.tag.as_deref());
    match &arguments.tag {
        Some(tag) if resumed == 0 => Err(no_such_tag(tag)),
        _ => Ok(Empty {}),
    }
}

/// `x-query-blkdebug`.
pub(super) fn query(daemon: &Daemon, arguments: &QueryBlkdebug) -> Result<BlkdebugInfo, Error> {
    let node = find(daemon, &arguments.node_name)?;
    let debug = debug(&node)?;
    Ok(BlkdebugInfo {
        state: debug.rule_state(),
        suspended: debug.held(),
    })
}

fn find(daemon: &Daemon, name: &str) -> Result<Arc<Node>, Error> {
    daemon.graph.borrow().lookup("", name)
}

fn debug(node: &Node) -> Result<&Blkdebug, Error> {
    let message = || Error::generic(format!("Node '{}' is not a blkdebug node", node.name()));
    node.blkdebug().ok_or_else(message)
}

fn no_such_tag(tag: &str) -> Error {
    Error::generic(format!("No request with tag '{tag}' is held up"))
}
