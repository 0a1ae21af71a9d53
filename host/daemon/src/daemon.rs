//! The daemon's state: everything that commands see and change.
//!
//! Owned by the control thread and shared by its tasks. No borrow of a `RefCell` here lives across
//! an `await`.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use outport_block::{IoThread, Node};
use outport_export::Policies;
use outport_qmp::{Error, Event};
use tokio::sync::{RwLock, RwLockReadGuard, mpsc, watch};

use crate::chardev::Chardevs;
use crate::config::Config;
use crate::descriptors::Descriptors;
use crate::events::Events;
use crate::exports::Exports;
use crate::graph::Graph;
use crate::inherited::Inherited;
use crate::jobs::Jobs;
use crate::monitor::{Job, Monitors};
use crate::nbd_server::NbdServers;
use crate::objects::Objects;
use crate::plugins::Plugins;
use crate::policy::PathPolicy;

/// Name of the iothread of everything that names none.
const DEFAULT_IOTHREAD: &str = "default";

/// The state.
pub(crate) struct Daemon {
    pub(crate) graph: RefCell<Graph>,
    pub(crate) exports: Exports,
    pub(crate) objects: RefCell<Objects>,
    pub(crate) jobs: Jobs,
    pub(crate) nbd: NbdServers,
    pub(crate) monitors: Monitors,
    pub(crate) events: Rc<Events>,
    pub(crate) plugins: Plugins,
    pub(crate) policy: RefCell<PathPolicy>,
    /// The authorization objects, as connections ask them.
    pub(crate) policies: Policies,
    pub(crate) chardevs: RefCell<Chardevs>,
    pub(crate) config: Config,
    pub(crate) inherited: RefCell<Inherited>,
    pub(crate) descriptors: RefCell<Descriptors>,
    /// Held by whoever makes nodes active or inactive: one at a time.
    pub(crate) activity: tokio::sync::Mutex<()>,
    default_iothread: RefCell<Option<IoThread>>,
    /// Names of nodes that are being closed: out of the graph already, not written back yet.
    pub(crate) closing: RefCell<Vec<String>>,
    /// Names of nodes that could not be written back when they were closed.
    pub(crate) lost: RefCell<Vec<String>>,
    /// Shared by commands whose half would do harm, and taken by the end of the daemon.
    whole: RwLock<()>,
    ending: watch::Sender<bool>,
}

impl Daemon {
    /// A daemon that serves nothing, the events that other threads will send, and the commands of
    /// its monitors.
    pub(crate) fn new() -> (
        Rc<Self>,
        mpsc::Receiver<Event>,
        mpsc::UnboundedReceiver<Job>,
    ) {
        let (events, waiting) = Events::new();
        let (commands, asked) = mpsc::unbounded_channel();
        let daemon = Self {
            graph: RefCell::default(),
            exports: Exports::default(),
            objects: RefCell::default(),
            jobs: Jobs::default(),
            nbd: NbdServers::default(),
            monitors: Monitors::new(commands),
            plugins: Plugins::new(events.sender()),
            events,
            policy: RefCell::default(),
            policies: Policies::default(),
            chardevs: RefCell::default(),
            config: Config::default(),
            inherited: RefCell::default(),
            descriptors: RefCell::default(),
            activity: tokio::sync::Mutex::default(),
            default_iothread: RefCell::default(),
            closing: RefCell::default(),
            lost: RefCell::default(),
            whole: RwLock::default(),
            ending: watch::Sender::new(false),
        };
        (Rc::new(daemon), waiting, asked)
    }

    /// The socket that an `fd` address means: a number that our parent left open, or a name given
    /// to `getfd`.
    ///
    /// # Errors
    /// QEMU's sentences: there is none, or it is no socket.
    pub(crate) fn take_socket(&self, text: &str) -> Result<OwnedFd, String> {
        let named = self.descriptors.borrow_mut().take(text);
        let Some(fd) = named else {
            return self.inherited.borrow_mut().take_socket(text);
        };
        match rustix::net::sockopt::socket_type(&fd) {
            Ok(_) => Ok(fd),
            Err(_) => Err(format!("File descriptor '{text}' is not a socket")),
        }
    }

    /// The iothread object that a node was moved to, if it is still there.
    pub(crate) fn iothread_of(&self, node: &str) -> Option<String> {
        let graph = self.graph.borrow();
        let id = graph.iothread_of(node)?;
        self.objects.borrow().iothread_id(id).ok()
    }

    /// The iothread of everything that names none; started when it is needed first.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(crate) fn default_iothread(&self) -> Result<IoThread, Error> {
        let mut slot = self.default_iothread.borrow_mut();
        if let Some(iothread) = &*slot {
            return Ok(iothread.clone());
        }
        let started = IoThread::start(DEFAULT_IOTHREAD);
        let started = started
            .map_err(|error| Error::generic(format!("Could not start an iothread: {error}")))?;
        Ok(slot.insert(started).clone())
    }

    /// For a command that must not end half-way, because nodes would stay open or bits unwritten:
    /// while this is held the daemon does not end.
    ///
    /// # Errors
    /// It is ending already.
    pub(crate) fn whole(&self) -> Result<RwLockReadGuard<'_, ()>, Error> {
        match self.is_ending() {
            false => self.whole.try_read().map_err(|_| ends()),
            true => Err(ends()),
        }
    }

    /// What `work` comes to, unless the daemon ends before: for a wait that others may never end.
    ///
    /// # Errors
    /// The daemon ends.
    pub(crate) async fn unless_it_ends<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, Error> {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            biased;
            done = work => Ok(done),
            _ = ending.wait_for(|ending| *ending) => Err(ends()),
        }
    }

    /// Closes all exports and ends the jobs, as `quit` does before it is answered. No new exports
    /// or nodes are taken from now on.
    pub(crate) async fn wind_down(&self) {
        self.ending.send_replace(true);
        for entry in self.graph.borrow().newest_first() {
            hurry(&entry.node);
        }
        self.nbd.close(self).await;
        self.exports.close_all(self).await;
        self.jobs.end_all(self).await;
    }

    /// Whether more of the command line is to be carried out.
    ///
    /// # Errors
    /// The daemon is ending.
    pub(crate) fn goes_on(&self) -> Result<(), String> {
        match self.is_ending() {
            false => Ok(()),
            true => Err(ends().desc),
        }
    }

    /// Whether the daemon is ending.
    pub(crate) fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// Waits for the commands that must not end half-way.
    pub(crate) async fn settled(&self) {
        drop(self.whole.write().await);
    }

    /// Closes the nodes; nobody uses them any more.
    pub(crate) async fn close(&self) {
        crate::blockdev::close_all(self).await;
    }
}

/// The daemon ends: nobody will resume what is held up, and a mute server will not answer.
pub(crate) fn hurry(node: &Node) {
    node.hurry();
    if let Some(debug) = node.blkdebug() {
        debug.release();
    }
}

/// Why something is not begun any more.
pub(crate) fn ends() -> Error {
    Error::generic("The daemon is ending")
}
