//! An export: a node as clients may use it, whatever the protocol.
//!
//! Made by the control plane, shared by all its connections. Invariant: the
//! node outlives every [`ExportUser`], and [`Export::gone`] resolves once, when
//! the export was shut down and the last of them (with the requests that they
//! still have in flight) has left.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outport_block::metacontext::ContextProvider;
use outport_block::{IoThread, Node};
use tokio::sync::Notify;

use crate::access::Access;
use crate::reads::Reads;
use crate::stats::{ExportStats, ExportTotals, Shards};

/// What `block-export-add` says of any export.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The export's id, in QMP's one namespace.
    pub id: String,
    /// The name that clients use.
    pub name: String,
    /// For humans.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Every write is durable before it is answered.
    pub writethrough: bool,
    /// Several connections may rely on one another's flushes.
    pub multi_conn: bool,
    /// Clients at a time; 0: as many as the server takes.
    pub clients_max: u32,
    /// What clients may ask of ranges beside `base:allocation`, which has id 0.
    pub contexts: Vec<ExportContext>,
    /// Who is asked about clients.
    pub access: Access,
    /// What clients may read.
    pub reads: Reads,
}

/// A metadata context on offer.
#[derive(Clone, Debug)]
pub struct ExportContext {
    /// Its id on the wire, unique within the export.
    pub id: u32,
    /// Who knows.
    pub provider: Arc<dyn ContextProvider>,
}

/// Why a client may not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEntry {
    /// The export was shut down.
    ShutDown,
    /// It has as many clients as it takes.
    Full,
}

/// One export.
#[derive(Debug)]
pub struct Export {
    options: ExportOptions,
    node: Arc<Node>,
    iothreads: Vec<IoThread>,
    next_iothread: AtomicUsize,
    users: AtomicUsize,
    holds: AtomicUsize,
    shutting_down: AtomicBool,
    cut: Notify,
    left: Notify,
    resized: Notify,
    at_shut_down: Hooks,
    stats: Shards,
}

type Hook = Box<dyn FnOnce() + Send>;

/// What is done when the export is shut down.
#[derive(Default)]
struct Hooks(Mutex<Vec<Hook>>);

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooks")
    }
}

impl Export {
    /// An export of `node`, whose connections are spread over `iothreads` (at
    /// least one).
    #[must_use]
    pub fn new(node: Arc<Node>, options: ExportOptions, iothreads: Vec<IoThread>) -> Arc<Self> {
        assert!(!iothreads.is_empty(), "an export has an iothread");
        Arc::new(Self {
            options,
            node,
            iothreads,
            next_iothread: AtomicUsize::new(0),
            users: AtomicUsize::new(0),
            holds: AtomicUsize::new(0),
            shutting_down: AtomicBool::new(false),
            cut: Notify::new(),
            left: Notify::new(),
            resized: Notify::new(),
            at_shut_down: Hooks::default(),
            stats: Shards::default(),
        })
    }

    /// The id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// The name that clients use.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// What it was added with.
    #[must_use]
    pub const fn options(&self) -> &ExportOptions {
        &self.options
    }

    /// The node behind it.
    #[must_use]
    pub const fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// May clients write?
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.options.writable
    }

    /// Clients that entered and have not left, with their requests.
    #[must_use]
    pub fn users(&self) -> usize {
        self.users.load(Ordering::Acquire)
    }

    /// Was it shut down?
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }

    /// The calling thread's counters.
    #[must_use]
    pub fn stats(&self) -> &ExportStats {
        self.stats.mine()
    }

    /// What all threads counted.
    #[must_use]
    pub fn totals(&self) -> ExportTotals {
        self.stats.totals()
    }

    /// The iothreads; at least one.
    #[must_use]
    pub fn iothreads(&self) -> &[IoThread] {
        &self.iothreads
    }

    /// The iothread for the next connection, in turn.
    #[must_use]
    pub fn next_iothread(&self) -> &IoThread {
        let turn = self.next_iothread.fetch_add(1, Ordering::Relaxed);
        &self.iothreads[turn % self.iothreads.len()]
    }

    /// Do this when the export is shut down, before [`Export::gone`] can resolve.
    pub fn at_shut_down(&self, hook: Box<dyn FnOnce() + Send>) {
        self.hooks().push(hook);
    }

    /// No client enters any more, and those inside are cut off. Their requests
    /// in flight finish; [`Export::gone`] waits for them.
    pub fn shut_down(&self) {
        self.shutting_down.store(true, Ordering::SeqCst);
        let hooks = std::mem::take(&mut *self.hooks());
        for hook in hooks {
            hook();
        }
        self.cut.notify_waiters();
        self.left.notify_waiters();
    }

    fn hooks(&self) -> MutexGuard<'_, Vec<Hook>> {
        let hooks = self.at_shut_down.0.lock();
        hooks.unwrap_or_else(PoisonError::into_inner)
    }

    /// Was it shut down, and has everyone left?
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let held = self.holds.load(Ordering::SeqCst) > 0;
        self.is_shutting_down() && self.users() == 0 && !held
    }

    /// The node has another length now.
    pub fn tell_resized(&self) {
        self.resized.notify_one();
    }

    /// Resolves when the node got another length since the last time; for one who waits.
    pub async fn resized(&self) {
        self.resized.notified().await;
    }

    /// Until the answer is dropped the export is not gone, though nobody is inside: what serves it
    /// has something to take away first.
    #[must_use]
    pub fn hold(self: &Arc<Self>) -> ExportHold {
        self.holds.fetch_add(1, Ordering::SeqCst);
        ExportHold(self.clone())
    }

    /// Resolves when nobody is inside.
    pub async fn unused(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.users() == 0 {
                return;
            }
            left.await;
        }
    }

    /// Resolves when the export was shut down and everyone has left.
    pub async fn gone(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.is_gone() {
                return;
            }
            left.await;
        }
    }

    /// Resolves when the export is shut down.
    pub async fn cut(&self) {
        loop {
            let cut = self.cut.notified();
            tokio::pin!(cut);
            cut.as_mut().enable();
            if self.is_shutting_down() {
                return;
            }
            cut.await;
        }
    }

    /// A client enters. Its place is given back when the [`ExportUser`] is dropped.
    ///
    /// # Errors
    /// The export was shut down, or is full.
    pub fn enter(self: &Arc<Self>) -> Result<ExportUser, NoEntry> {
        // Counted before looking: `gone` must not miss a client that enters
        // while the export is being shut down.
        let before = self.users.fetch_add(1, Ordering::SeqCst);
        let user = ExportUser(self.clone());
        if self.is_shutting_down() {
            return Err(NoEntry::ShutDown);
        }
        let max = self.options.clients_max as usize;
        if max > 0 && before >= max {
            return Err(NoEntry::Full);
        }
        self.stats().connections.fetch_add(1, Ordering::Relaxed);
        Ok(user)
    }
}

/// Proof that a client is inside; the export is in use until it is dropped.
#[derive(Debug)]
pub struct ExportUser(Arc<Export>);

impl ExportUser {
    /// The export.
    #[must_use]
    pub const fn export(&self) -> &Arc<Export> {
        &self.0
    }
}

impl Drop for ExportUser {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.left.notify_waiters();
        }
    }
}

/// Keeps an export from being gone; no user of it.
#[derive(Debug)]
pub struct ExportHold(Arc<Export>);

impl Drop for ExportHold {
    fn drop(&mut self) {
        if self.0.holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use outport_block::node::Kind;

    use super::*;

    fn export() -> Arc<Export> {
        let null = Kind::Null {
            size: AtomicU64::new(1 << 20),
            zeroes: true,
        };
        let options = ExportOptions {
            id: "e".to_owned(),
            name: "e".to_owned(),
            description: None,
            writable: true,
            writethrough: false,
            multi_conn: true,
            clients_max: 2,
            contexts: Vec::new(),
            access: Access::default(),
            reads: Reads::default(),
        };
        let iothread = IoThread::start("t").unwrap();
        Export::new(
            Node::new("n", "null-co", false, null),
            options,
            vec![iothread],
        )
    }

    #[test]
    fn a_place_is_given_back() {
        let export = export();
        let first = export.enter().unwrap();
        let _second = export.enter().unwrap();
        assert_eq!(export.enter().unwrap_err(), NoEntry::Full);
        assert_eq!(export.users(), 2, "the refused one does not count");
        drop(first);
        assert!(export.enter().is_ok());
        assert_eq!(export.totals().connections, 3);
    }

    #[tokio::test]
    async fn gone_waits_for_the_last_user() {
        let export = export();
        let user = export.enter().unwrap();
        export.shut_down();
        assert_eq!(export.enter().unwrap_err(), NoEntry::ShutDown);
        let waiting = tokio::spawn({
            let export = export.clone();
            async move { export.gone().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(user);
        waiting.await.unwrap();
    }
}
