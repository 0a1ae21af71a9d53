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
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use outport_block::filter::throttle::Undrain;
use outport_export::Export;
use outport_qmp::events::BlockExportDeleted;
use outport_qmp::types::block_export::{BlockExportInfo, BlockExportRemoveMode, BlockExportType};
use outport_qmp::{Error, Event};

use crate::daemon::Daemon;
use crate::graph::EdgeId;

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
}

/// All exports, in the order in which they were added.
#[derive(Default)]
pub(crate) struct Exports {
    list: RefCell<Vec<Entry>>,
}

impl Exports {
    /// Whether an id is taken, also by an export that is shutting down.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.list
            .borrow()
            .iter()
            .any(|entry| entry.export.id() == id)
    }

    /// Whether an export is served by this iothread object.
    pub(crate) fn uses_iothread(&self, id: &str) -> bool {
        self.list
            .borrow()
            .iter()
            .any(|entry| entry.iothreads.iter().any(|used| used == id))
    }

    /// Adds an export.
    pub(crate) fn add(&self, daemon: &Rc<Daemon>, entry: Entry) {
        let export = entry.export.clone();
        self.list.borrow_mut().push(entry);
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
    pub(crate) fn delete(
        &self,
        daemon: &Daemon,
        id: &str,
        mode: BlockExportRemoveMode,
    ) -> Result<(), Error> {
        let export = self.find(id)?.0;
        if export.is_shutting_down() {
            return Err(Error::generic(format!(
                "Export '{id}' is already shutting down"
            )));
        }
        if mode == BlockExportRemoveMode::Safe && export.users() > 0 {
            return Err(Error::generic(format!("export '{id}' still in use")));
        }
        self.shut_down(daemon, &export);
        Ok(())
    }

    /// The export and its kind.
    ///
    /// # Errors
    /// There is no such export.
    pub(crate) fn find(&self, id: &str) -> Result<(Arc<Export>, BlockExportType), Error> {
        let list = self.list.borrow();
        let entry = list.iter().find(|entry| entry.export.id() == id);
        let found = entry.map(|entry| (entry.export.clone(), entry.kind));
        found.ok_or_else(|| Error::no_such_export(id))
    }

    /// Cuts off all exports of a kind and waits until they are gone.
    pub(crate) async fn close_kind(&self, daemon: &Daemon, kind: BlockExportType) {
        self.close_where(daemon, |entry| entry.kind == kind).await;
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
        self.list.borrow().iter().rev().map(info).collect()
    }

    async fn close_where(&self, daemon: &Daemon, wanted: impl Fn(&Entry) -> bool) {
        let closing: Vec<_> = {
            let list = self.list.borrow();
            // Newest first, as QEMU does.
            let closing = list.iter().rev().filter(|entry| wanted(entry));
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
        daemon.nbd.withdraw(export.name());
        export.shut_down();
        let drained = export.node().drain_throttles();
        let mut list = self.list.borrow_mut();
        if let Some(entry) = list
            .iter_mut()
            .find(|entry| Arc::ptr_eq(&entry.export, export))
        {
            entry.drained.extend(drained);
        }
        drop(list);
        if export.users() == 0 {
            self.finish(daemon, export.id());
        }
    }

    /// An export is gone. Called by everyone who waited for it; the first call counts.
    fn finish(&self, daemon: &Daemon, id: &str) {
        let mut list = self.list.borrow_mut();
        let gone = list.iter().position(|entry| {
            entry.export.id() == id && entry.export.is_shutting_down() && entry.export.users() == 0
        });
        let Some(at) = gone else { return };
        let entry = list.remove(at);
        drop(list);
        daemon.graph.borrow_mut().detach(entry.edge);
        tracing::info!(export = id, "export deleted");
        let deleted = BlockExportDeleted { id: id.to_owned() };
        daemon.events.emit(&Event::BlockExportDeleted(deleted));
    }
}
