//! The exports: ids, and how one goes away.
//!
//! ```text
//! active --del safe, no users--> shutting down --last user and request left--> gone, event
//!        --del hard, stop, quit--^
//! ```
//!
//! Control plane. An export stays in the list, its id and its node in use, until it is gone.
//! Invariant: `BLOCK_EXPORT_DELETED` is sent exactly once for each export that was added, when its
//! id can be used again.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hashlink::LinkedHashMap;
use outport_block::Node;
use outport_block::bitmap::Held;
use outport_block::filter::throttle::Undrain;
use outport_export::{Export, ExportTotals};
use outport_qmp::events::BlockExportDeleted;
use outport_qmp::types::block_export::{
    BlockExportInfo, BlockExportRemoveMode, BlockExportStats, BlockExportType,
};
use outport_qmp::{Error, Event};

use crate::daemon::Daemon;
use crate::graph::EdgeId;

/// The kernel tells of a file that was closed when the process that closed it is long gone on: a
/// safe removal waits so long for that.
const RELEASE_TIME: Duration = Duration::from_millis(200);

/// One export and what it holds.
pub(crate) struct Entry {
    pub(crate) export: Arc<Export>,
    pub(crate) kind: BlockExportType,
    /// Its use of the node.
    pub(crate) edge: EdgeId,
    /// Ids of the iothread objects that serve it.
    pub(crate) iothreads: Vec<String>,
    /// While it shuts down its requests pass the limits of throttles.
    pub(crate) drained: Vec<Undrain>,
    /// Who has it open reads the file below without us: the node stays as it is meanwhile.
    pub(crate) bypassed: bool,
    /// Id of the NBD server that offers it; `None` is the default one.
    pub(crate) server: Option<String>,
    /// Bitmaps that it offers: commands leave them alone.
    pub(crate) held: Vec<Held>,
}

impl Entry {
    fn is_served_by(&self, server: Option<&str>) -> bool {
        self.kind == BlockExportType::Nbd && self.server.as_deref() == server
    }
}

/// Whether a node is `name`, or one below it is.
fn holds(node: &Node, name: &str) -> bool {
    node.name() == name || node.children().iter().any(|(_, child)| holds(child, name))
}

/// An id that is taken until this is dropped.
pub(crate) struct Reserved<'a> {
    exports: &'a Exports,
    id: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.exports.reserved.borrow_mut().remove(&self.id);
    }
}

/// All exports.
#[derive(Default)]
pub(crate) struct Exports {
    /// By id, in the order in which they were added.
    list: RefCell<LinkedHashMap<String, Entry>>,
    /// Ids of exports that are being added.
    reserved: RefCell<HashSet<String>>,
    /// What exports did that are gone, by the name of their node.
    past: RefCell<BTreeMap<String, ExportTotals>>,
}

impl Exports {
    /// Takes an id for an export that is being added; `None`: it is taken.
    pub(crate) fn reserve(&self, id: &str) -> Option<Reserved<'_>> {
        let mut reserved = self.reserved.borrow_mut();
        if self.has(id) || !reserved.insert(id.to_owned()) {
            return None;
        }
        Some(Reserved {
            exports: self,
            id: id.to_owned(),
        })
    }

    /// How many exports there are.
    pub(crate) fn len(&self) -> usize {
        self.list.borrow().len()
    }

    /// Whether somebody reads this node's file without us.
    pub(crate) fn is_bypassed(&self, node: &str) -> bool {
        let list = self.list.borrow();
        let mut read = list
            .values()
            .filter(|it| it.bypassed && it.export.users() > 0);
        read.any(|entry| holds(entry.export.node(), node))
    }

    /// Some node has another length: whoever tells clients of it looks again.
    pub(crate) fn tell_resized(&self) {
        for entry in self.list.borrow().values() {
            entry.export.tell_resized();
        }
    }

    /// Whether an id is taken, also by an export that is shutting down.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.list.borrow().contains_key(id)
    }

    /// Whether an export is served by this iothread object.
    pub(crate) fn uses_iothread(&self, id: &str) -> bool {
        self.list
            .borrow()
            .values()
            .any(|entry| entry.iothreads.iter().any(|used| used == id))
    }

    /// Adds an export.
    pub(crate) fn add(&self, daemon: &Rc<Daemon>, entry: Entry) {
        let export = entry.export.clone();
        let id = export.id().to_owned();
        self.list.borrow_mut().insert(id, entry);
        let daemon = Rc::downgrade(daemon);
        tokio::task::spawn_local(async move {
            export.gone().await;
            if let Some(daemon) = daemon.upgrade() {
                daemon.exports.finish(&daemon, export.id());
            }
        });
    }

    /// `block-export-del`.
    ///
    /// # Errors
    /// There is no such export, it is going already, or it has users and `mode` is safe.
    pub(crate) async fn delete(
        &self,
        daemon: &Daemon,
        id: &str,
        mode: BlockExportRemoveMode,
    ) -> Result<(), Error> {
        let (export, kind) = self.find(id)?;
        let safe = mode == BlockExportRemoveMode::Safe;
        if safe && kind == BlockExportType::Fuse {
            let left = tokio::time::timeout(RELEASE_TIME, export.unused());
            let _still_used = left.await;
        }
        if export.is_shutting_down() {
            return Err(Error::generic(format!(
                "Export '{id}' is already shutting down"
            )));
        }
        if safe && export.users() > 0 {
            return Err(Error::generic(format!("export '{id}' still in use")));
        }
        self.shut_down(daemon, &export);
        if kind == BlockExportType::Fuse && export.users() == 0 {
            // Who is told that it is removed finds the file that it covered.
            export.gone().await;
            self.finish(daemon, id);
        }
        Ok(())
    }

    /// The export and its kind.
    ///
    /// # Errors
    /// There is no such export.
    pub(crate) fn find(&self, id: &str) -> Result<(Arc<Export>, BlockExportType), Error> {
        let list = self.list.borrow();
        let entry = list.get(id);
        let found = entry.map(|entry| (entry.export.clone(), entry.kind));
        found.ok_or_else(|| Error::no_such_export(id))
    }

    /// Cuts off all exports of an NBD server and waits until they are gone.
    pub(crate) async fn close_served(&self, daemon: &Daemon, server: Option<&str>) {
        self.close_where(daemon, |entry| entry.is_served_by(server))
            .await;
    }

    /// Ids of the exports of an NBD server, newest first.
    pub(crate) fn served_by(&self, server: Option<&str>) -> Vec<String> {
        let list = self.list.borrow();
        let served = list
            .values()
            .rev()
            .filter(|entry| entry.is_served_by(server));
        served.map(|entry| entry.export.id().to_owned()).collect()
    }

    /// What the exports did, newest first.
    pub(crate) fn query_stats(&self) -> Vec<BlockExportStats> {
        let stats = |entry: &Entry| {
            let totals = entry.export.totals();
            BlockExportStats {
                id: entry.export.id().to_owned(),
                node_name: entry.export.node().name().to_owned(),
                clients: entry.export.users() as u64,
                connections: totals.connections,
                rd_bytes: totals.read_bytes,
                wr_bytes: totals.write_bytes,
                rd_operations: totals.reads,
                wr_operations: totals.writes,
                flush_operations: totals.flushes,
                unmap_operations: totals.discards,
                errors: totals.errors,
                waited_operations: totals.waited,
                in_flight: totals.in_flight,
                waited_total_time_ns: totals.waited_ns,
            }
        };
        self.list.borrow().values().rev().map(stats).collect()
    }

    /// What all exports did, those that are gone included, by the name of their node.
    pub(crate) fn totals(&self) -> BTreeMap<String, ExportTotals> {
        let mut totals = self.past.borrow().clone();
        for entry in self.list.borrow().values() {
            let node = entry.export.node().name().to_owned();
            totals.entry(node).or_default().add(&entry.export.totals());
        }
        totals
    }

    /// A node is gone: another one of its name starts at nothing.
    pub(crate) fn forget_node(&self, node: &str) {
        self.past.borrow_mut().remove(node);
    }

    /// Cuts off all exports and waits until they are gone.
    pub(crate) async fn close_all(&self, daemon: &Daemon) {
        self.close_where(daemon, |_| true).await;
    }

    /// The exports, newest first.
    pub(crate) fn query(&self) -> Vec<BlockExportInfo> {
        let info = |entry: &Entry| BlockExportInfo {
            id: entry.export.id().to_owned(),
            r#type: entry.kind,
            node_name: entry.export.node().name().to_owned(),
            shutting_down: entry.export.is_shutting_down(),
        };
        self.list.borrow().values().rev().map(info).collect()
    }

    async fn close_where(&self, daemon: &Daemon, wanted: impl Fn(&Entry) -> bool) {
        let closing: Vec<_> = {
            let list = self.list.borrow();
            // Newest first, as QEMU does.
            let closing = list.values().rev().filter(|entry| wanted(entry));
            closing.map(|entry| entry.export.clone()).collect()
        };
        for export in &closing {
            self.shut_down(daemon, export);
        }
        join_all(closing.iter().map(|export| async move {
            export.gone().await;
            self.finish(daemon, export.id());
        }))
        .await;
    }

    /// Cuts an export off; it is gone now if nobody is inside.
    fn shut_down(&self, daemon: &Daemon, export: &Arc<Export>) {
        let (kind, server) = {
            let list = self.list.borrow();
            list.get(export.id()).map_or((None, None), |entry| {
                (Some(entry.kind), entry.server.clone())
            })
        };
        if kind == Some(BlockExportType::Nbd) {
            daemon.nbd.withdraw(server.as_deref(), export.name());
        }
        export.shut_down();
        let drained = export.node().drain_throttles();
        let mut list = self.list.borrow_mut();
        if let Some(entry) = list
            .get_mut(export.id())
            .filter(|entry| Arc::ptr_eq(&entry.export, export))
        {
            entry.drained.extend(drained);
        }
        drop(list);
        if export.is_gone() {
            self.finish(daemon, export.id());
        }
    }

    /// An export is gone. Called by everyone who waited for it; the first call counts.
    fn finish(&self, daemon: &Daemon, id: &str) {
        let mut list = self.list.borrow_mut();
        if !list.get(id).is_some_and(|entry| entry.export.is_gone()) {
            return;
        }
        let Some(entry) = list.remove(id) else { return };
        drop(list);
        daemon.graph.borrow_mut().detach(entry.edge);
        drop(entry.held);
        let mut totals = entry.export.totals();
        totals.in_flight = 0;
        let node = entry.export.node().name().to_owned();
        let mut past = self.past.borrow_mut();
        past.entry(node).or_default().add(&totals);
        drop(past);
        tracing::info!(export = id, "export deleted");
        let deleted = BlockExportDeleted { id: id.to_owned() };
        daemon.events.emit(&Event::BlockExportDeleted(deleted));
    }
}
