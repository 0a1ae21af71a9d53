//! Whose the images are: `blockdev-set-active`, and what follows it.
//!
//! Two daemons that share storage hand an image over: one makes its nodes inactive, the other
//! makes its own active. An inactive node writes nothing and holds no locks; clients of exports
//! that allow it may go on reading.
//!
//! On the control thread; one change at a time (`Daemon::activity`), while other commands run.
//! Order: a parent becomes inactive before its children, as it writes into them, and active after
//! them. Invariants: when a command says that a node is inactive, nothing of it is in flight; a
//! node that changes hands is not deleted meanwhile.

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use outport_block::Node;
use outport_qmp::Error;
use serde_json::Value;

use crate::blockdev::Held;
use crate::daemon::Daemon;

/// `blockdev-set-active`: one node with what is below it, or all.
///
/// # Errors
/// In QEMU's words. What changed before stays changed.
pub(crate) async fn set(daemon: &Daemon, node: Option<&str>, active: bool) -> Result<(), Error> {
    let _whole = daemon.whole()?;
    let _alone = daemon.activity.lock().await;
    let Some(name) = node else {
        return match active {
            true => activate_all(daemon).await,
            false => inactivate_all(daemon).await,
        };
    };
    let known = daemon.graph.borrow().find(name).is_some();
    if !known {
        return Err(Error::no_such_node(name));
    }
    if active {
        return activate(daemon, name.to_owned()).await;
    }
    if daemon.graph.borrow().has_active_parent(name) {
        return Err(Error::generic("Node has active parent node"));
    }
    let done = inactivate(daemon, name.to_owned()).await;
    done.map_err(|why| Error::generic(format!("Failed to inactivate node: {why}")))
}

/// A node that somebody wants to use is made active.
///
/// # Errors
/// As [`set`].
pub(crate) async fn ensure(daemon: &Daemon, name: &str) -> Result<(), Error> {
    let is_active = {
        let graph = daemon.graph.borrow();
        // It may be becoming inactive just now.
        let entry = graph.find(name);
        graph.is_active(name) && entry.is_none_or(|entry| entry.node.is_active())
    };
    if is_active {
        return Ok(());
    }
    let _alone = daemon.activity.lock().await;
    activate(daemon, name.to_owned()).await
}

/// A node that was opened inactive leaves its image alone.
///
/// # Errors
/// What it has to write back could not be written.
pub(crate) async fn leave(daemon: &Daemon, node: &Arc<Node>) -> Result<(), Error> {
    let left = run(daemon, node, |node| async move { node.inactivate().await }).await;
    left.map_err(Error::generic)
}

/// On an error everything is as far as it got, as in QEMU.
async fn inactivate_all(daemon: &Daemon) -> Result<(), Error> {
    let tops = daemon.graph.borrow().tops();
    for name in tops {
        let done = inactivate(daemon, name).await;
        done.map_err(|why| Error::generic(format!("Failed to inactivate all nodes: {why}")))?;
    }
    Ok(())
}

async fn activate_all(daemon: &Daemon) -> Result<(), Error> {
    let names: Vec<_> = {
        let graph = daemon.graph.borrow();
        let entries = graph.newest_first();
        entries.map(|it| it.node.name().to_owned()).collect()
    };
    for name in names {
        activate(daemon, name).await?;
    }
    Ok(())
}

/// Makes a node inactive, then the children that no active node uses any more.
fn inactivate(daemon: &Daemon, name: String) -> LocalBoxFuture<'_, Result<(), String>> {
    Box::pin(async move {
        let node = {
            let graph = daemon.graph.borrow();
            let Some(entry) = graph.find(&name) else {
                return Ok(());
            };
            if !graph.is_active(&name) || graph.has_active_parent(&name) {
                return Ok(());
            }
            if graph.insists_on_writing(&name) {
                return Err(outport_block::Errno::Perm.to_string());
            }
            entry.node.clone()
        };
        let mut held = Held::new(daemon);
        held.hold(&name);
        let done = run(daemon, &node, |node| async move { node.inactivate().await }).await;
        if done.is_ok() {
            // As long as what is below is ours: bitmaps were stored.
            refresh_facts(daemon, &node).await;
            daemon.graph.borrow_mut().deactivate(&name);
        }
        held.release().await;
        done?;
        let children: Vec<_> = {
            let graph = daemon.graph.borrow();
            graph.children(&name).map(|(_, it)| it.to_owned()).collect()
        };
        for child in children {
            inactivate(daemon, child).await?;
        }
        Ok(())
    })
}

/// Makes what is below a node active, then the node.
fn activate(daemon: &Daemon, name: String) -> LocalBoxFuture<'_, Result<(), Error>> {
    Box::pin(async move {
        let (node, children) = {
            let graph = daemon.graph.borrow();
            let Some(entry) = graph.find(&name) else {
                return Ok(());
            };
            let children = graph.children(&name);
            let children: Vec<_> = children.map(|(_, it)| it.to_owned()).collect();
            (entry.node.clone(), children)
        };
        let mut held = Held::new(daemon);
        held.hold(&name);
        let done = activate_above(daemon, &node, children).await;
        held.release().await;
        done
    })
}

/// Makes a node active, after these children of it.
async fn activate_above(
    daemon: &Daemon,
    node: &Arc<Node>,
    children: Vec<String>,
) -> Result<(), Error> {
    for child in children {
        activate(daemon, child).await?;
    }
    let name = node.name();
    if daemon.graph.borrow().is_active(name) {
        return Ok(());
    }
    daemon.graph.borrow_mut().try_activate(name)?;
    let active = run(daemon, node, |node| async move { node.activate().await }).await;
    if let Err(why) = active {
        daemon.graph.borrow_mut().deactivate(name);
        return Err(Error::generic(why));
    }
    refresh_facts(daemon, node).await;
    // Or one of another length.
    daemon.exports.tell_resized();
    Ok(())
}

/// Somebody else may have made another image of it.
pub(crate) async fn refresh_facts(daemon: &Daemon, node: &Arc<Node>) {
    let Some(image) = node.image().cloned() else {
        return;
    };
    let facts = match daemon.default_iothread() {
        Ok(iothread) => {
            iothread
                .run(move || async move { image.facts().await })
                .await
        }
        Err(_) => None,
    };
    let facts = facts.and_then(Result::ok);
    let facts = facts.and_then(|facts| serde_json::from_str(&facts).ok());
    let mut graph = daemon.graph.borrow_mut();
    if let (Some(Value::Object(facts)), Some(entry)) = (facts, graph.find_mut(node.name())) {
        entry.facts = facts;
    }
}

/// Something slow that a node does, on an iothread; a failure in words.
async fn run<F>(
    daemon: &Daemon,
    node: &Arc<Node>,
    work: impl FnOnce(Arc<Node>) -> F + Send + 'static,
) -> Result<(), String>
where
    F: Future<Output = outport_block::Result<()>> + 'static,
{
    let node = node.clone();
    let iothread = daemon.default_iothread().map_err(|error| error.desc)?;
    let done = iothread.run(move || work(node)).await;
    let done = done.ok_or_else(|| "The iothread that serves nodes is gone".to_owned())?;
    done.map_err(|error| error.to_string())
}
