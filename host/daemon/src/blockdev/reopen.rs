//! `blockdev-reopen`: other options for nodes that are in use.
//!
//! ```text
//! plan (all nodes) --> files (may fail) --> graph --> images (may fail) --> windows --> told
//!                        ^------- on an error everything before is taken back ------'
//! ```
//! On the control thread, one at a time; what is slow runs elsewhere. What is changed, comes or
//! goes is held meanwhile, so nobody deletes it. Requests that came before end where they came in,
//! later ones take the new way. Nobody is refused meanwhile. What a driver cannot change is refused
//! ([`plan`]).

mod plan;

use std::sync::Arc;

use outport_block::Node;
use outport_block::file::FileMode;
use outport_block::filter::ThrottleGroup;
use outport_block::image::{Change as ImageChange, NewBacking};
use outport_block::node::Kind;
use outport_block::window::{OldWindow, Window};
use outport_qmp::Error;
use outport_qmp::types::block_core::BlockdevOptions;
use serde_json::Value;

use super::base::Common;
use super::{Held, control_error};
use crate::activity::refresh_facts;
use crate::daemon::Daemon;
use crate::graph::{Exchanged, Graph, Use};

pub(super) use plan::flat;

/// What becomes of one node.
struct Change {
    node: Arc<Node>,
    common: Common,
    options: Vec<(String, Value)>,
    /// Edges that lead elsewhere or to another end, by role.
    edges: Vec<(&'static str, Option<Arc<Node>>, Use)>,
    data: Data,
}

/// What the data path is told.
enum Data {
    Nothing,
    Window(Window),
    Throttle(Throttled),
    File(FileMode),
    Image(ImageChange),
}

/// A throttle's other child and other group.
struct Throttled {
    child: Option<Arc<Node>>,
    group: Option<Arc<ThrottleGroup>>,
}

/// Gives nodes other options, all of them or none.
///
/// # Errors
/// In QEMU's words; nothing changed then.
pub(crate) async fn reopen(daemon: &Daemon, options: Vec<BlockdevOptions>) -> Result<(), Error> {
    let _whole = daemon.whole()?;
    // A plan holds for the graph that it was made for: one change of what there is at a time.
    let _alone = daemon.activity.lock().await;
    let changes = {
        let graph = daemon.graph.borrow();
        let plans = options
            .iter()
            .map(|options| plan::plan(daemon, &graph, options));
        let plans = plans.collect::<Result<Vec<_>, _>>()?;
        plans.into_iter().flatten().collect::<Vec<_>>()
    };
    for change in &changes {
        let name = change.node.name();
        if daemon.exports.is_bypassed(name) {
            return Err(Error::generic(format!(
                "Node '{name}' cannot be reopened: a file with 'passthrough' is open"
            )));
        }
    }
    let mut held = Held::new(daemon);
    for change in &changes {
        held.hold(change.node.name());
        for child in change
            .edges
            .iter()
            .filter_map(|(_, child, _)| child.as_ref())
        {
            held.hold(child.name());
        }
    }
    let done = carry_out(daemon, &changes, &mut held).await;
    if done.is_ok() {
        for options in options {
            daemon.config.node_reopened(&daemon.graph.borrow(), options);
        }
    }
    held.release().await;
    done
}

/// Changes the nodes, all or none; what they leave behind is held, too.
async fn carry_out(daemon: &Daemon, changes: &[Change], held: &mut Held<'_>) -> Result<(), Error> {
    let files = reopen_files(changes).await?;
    let applied = apply(&mut daemon.graph.borrow_mut(), changes);
    let applied = match applied {
        Ok(applied) => applied,
        Err(error) => {
            restore_files(files).await;
            return Err(error);
        }
    };
    // It stays in use until the last request has left it.
    for old in applied.edges.iter().filter_map(Exchanged::old_child) {
        held.hold(old);
    }
    if let Err(error) = reopen_images(daemon, changes).await {
        applied.take_back(&mut daemon.graph.borrow_mut());
        restore_files(files).await;
        return Err(error);
    }
    for change in changes {
        let common = &change.common;
        change.node.set_options(common.read_only, common.unmap);
    }
    leave_windows(changes).await;
    Ok(())
}

// === files ===

/// Files that were opened in another way, and how they were.
type Reopened = Vec<(Arc<Node>, FileMode)>;

async fn reopen_files(changes: &[Change]) -> Result<Reopened, Error> {
    let mut done = Reopened::new();
    for change in changes {
        let (Data::File(mode), Some(file)) = (&change.data, change.node.host_file()) else {
            continue;
        };
        let before = file.mode();
        if let Err(error) = file.reopen(*mode).await {
            restore_files(done).await;
            return Err(control_error(&error));
        }
        done.push((change.node.clone(), before));
    }
    Ok(done)
}

async fn restore_files(files: Reopened) {
    for (node, mode) in files.into_iter().rev() {
        let Some(file) = node.host_file() else {
            continue;
        };
        if let Err(error) = file.reopen(mode).await {
            tracing::error!(node = node.name(), %error, "the file is open in another way");
        }
    }
}

// === graph ===

/// What was changed in the graph, and how it was.
struct Applied {
    edges: Vec<Exchanged>,
    before: Vec<Before>,
}

struct Before {
    node: Arc<Node>,
    read_only: bool,
    unmap: bool,
    entry: Told,
}

/// What the control plane tells of a node.
struct Told {
    detect_zeroes: outport_qmp::types::block_core::BlockdevDetectZeroesOptions,
    direct: bool,
    no_flush: bool,
    options: Vec<(String, Value)>,
}

impl Applied {
    fn take_back(self, graph: &mut Graph) {
        for before in &self.before {
            before.node.set_options(before.read_only, before.unmap);
        }
        for exchanged in self.edges.into_iter().rev() {
            graph.restore(exchanged);
        }
        for before in self.before {
            tell(graph, before.node.name(), before.entry);
        }
    }
}

/// Changes the graph; on an error it is as before.
fn apply(graph: &mut Graph, changes: &[Change]) -> Result<Applied, Error> {
    let mut applied = Applied {
        edges: Vec::new(),
        before: Vec::new(),
    };
    for change in changes {
        let node = &change.node;
        let Some(entry) = graph.find(node.name()) else {
            continue;
        };
        applied.before.push(Before {
            node: node.clone(),
            read_only: node.is_read_only(),
            unmap: node.unmaps(),
            entry: Told {
                detect_zeroes: entry.detect_zeroes,
                direct: entry.direct,
                no_flush: entry.no_flush,
                options: entry.options.clone(),
            },
        });
    }
    for change in changes.iter().filter(|change| !change.common.read_only) {
        change.node.set_options(false, change.common.unmap);
    }
    if let Err(error) = exchange(graph, changes, &mut applied.edges) {
        applied.take_back(graph);
        return Err(error);
    }
    for change in changes {
        let common = &change.common;
        // What holds an image takes what that has to write when it is put away.
        let is_image = matches!(change.data, Data::Image(_));
        let read_only = common.read_only && (is_image || change.node.is_read_only());
        change.node.set_options(read_only, common.unmap);
        let told = Told {
            detect_zeroes: common.detect_zeroes,
            direct: common.direct,
            no_flush: common.no_flush,
            options: change.options.clone(),
        };
        tell(graph, change.node.name(), told);
    }
    Ok(applied)
}

fn exchange(graph: &mut Graph, changes: &[Change], done: &mut Vec<Exchanged>) -> Result<(), Error> {
    for change in changes {
        for (role, child, purpose) in &change.edges {
            let child = child.as_ref().map(|child| child.name());
            done.push(graph.exchange(change.node.name(), role, child, *purpose)?);
        }
    }
    let refused =
        |change: &&Change| change.common.read_only && graph.has_writers(change.node.name());
    // Parents come after the children that they spell out, and are told first.
    match changes.iter().rev().find(refused) {
        None => Ok(()),
        Some(change) => Err(Error::generic(format!(
            "Read-only block node '{}' cannot support read-write users",
            change.node.name()
        ))),
    }
}

fn tell(graph: &mut Graph, name: &str, told: Told) {
    if let Some(entry) = graph.find_mut(name) {
        entry.detect_zeroes = told.detect_zeroes;
        entry.direct = told.direct;
        entry.no_flush = told.no_flush;
        entry.options = told.options;
    }
}

// === the data path ===

/// On an error all are open as they were, or a log line says which is not.
async fn reopen_images(daemon: &Daemon, changes: &[Change]) -> Result<(), Error> {
    let mut done: Vec<(Arc<Node>, ImageChange)> = Vec::new();
    for change in changes {
        let (Data::Image(asked), Kind::Image(image)) = (&change.data, change.node.kind()) else {
            continue;
        };
        let before = ImageChange {
            writable: asked.writable.map(|_| image.is_writable()),
            file: asked.file.as_ref().and_then(|_| image.storage().next()),
            backing: asked.backing.as_ref().map(|_| match image.backing() {
                Some(node) => NewBacking::Node(node),
                None => NewBacking::None,
            }),
            options: None,
        };
        if let Err(error) = reopen_image(daemon, &change.node, asked.clone()).await {
            for (node, before) in done.into_iter().rev() {
                if let Err(error) = reopen_image(daemon, &node, before).await {
                    let name = node.name();
                    tracing::error!(node = name, %error, "the image is open in another way");
                }
            }
            return Err(error);
        }
        done.push((change.node.clone(), before));
    }
    for (node, _) in done {
        refresh_facts(daemon, &node).await;
    }
    Ok(())
}

async fn reopen_image(daemon: &Daemon, node: &Arc<Node>, change: ImageChange) -> Result<(), Error> {
    let Some(image) = node.image().cloned() else {
        return Ok(());
    };
    let iothread = daemon.default_iothread()?;
    let reopened = iothread.run(move || async move { image.reopen(change).await });
    match reopened.await {
        Some(done) => done.map_err(|error| control_error(&error)),
        None => Err(Error::generic("The iothread that opens nodes is gone")),
    }
}

/// Returns when nobody is on the old way.
async fn leave_windows(changes: &[Change]) {
    let exchanged = changes.iter().filter_map(|change| match &change.data {
        Data::Window(window) => match change.node.kind() {
            Kind::Raw(raw) => Some(raw.exchange(window.clone())),
            _ => None,
        },
        Data::Throttle(asked) => {
            let throttle = change.node.throttle()?;
            if let Some(group) = &asked.group {
                throttle.join(group.clone());
            }
            let child = asked.child.clone();
            child.map(|child| throttle.exchange(child))
        }
        _ => None,
    });
    let old: Vec<OldWindow> = exchanged.collect();
    for old in old {
        old.left().await;
    }
}
