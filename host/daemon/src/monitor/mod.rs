//! QMP monitors: one task for each, one dispatcher for all.
//!
//! ```text
//! socket -> connection (parse, negotiate) -> dispatcher (one queue, FIFO) -> commands
//! socket <- output (bounded queue)        <- replies, events
//! ```
//!
//! A monitor has one client at a time and one command in flight (what more it may have sent waits
//! in `ahead`), so the queue holds at most one
//! command of each monitor, and first come first served is fair. Invariant: what a client can make
//! the daemon hold is bounded by the constants here and by those of `outport_qmp::wire`.

mod ahead;
mod connection;
mod dispatcher;
mod output;

pub(crate) use dispatcher::{Dispatcher, Job};
pub(crate) use output::Output;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use outport_qmp::types::qom::{MonitorCloseAction, MonitorQmpProperties};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use crate::chardev::Device;
use crate::daemon::Daemon;
use crate::events::Events;
use crate::objects;

/// Out of descriptors or memory: time for others to leave before a client is accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What all monitors share.
pub(crate) struct Monitors {
    jobs: mpsc::UnboundedSender<Job>,
    open: Cell<bool>,
    opened: Notify,
}

impl Monitors {
    pub(crate) fn new(jobs: mpsc::UnboundedSender<Job>) -> Self {
        Self {
            jobs,
            open: Cell::new(false),
            opened: Notify::new(),
        }
    }

    /// Startup is over: from now on clients are served.
    pub(crate) fn open(&self) {
        self.open.set(true);
        self.opened.notify_waiters();
    }

    async fn are_open(&self) {
        while !self.open.get() {
            self.opened.notified().await;
        }
    }
}

/// What every monitor is made with.
pub(crate) struct Monitor {
    /// Id of its object.
    pub(crate) id: Rc<str>,
    /// Name of its chardev, for the log.
    pub(crate) name: String,
    pub(crate) pretty: bool,
    pub(crate) events: Rc<Events>,
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
}

impl Monitor {
    /// Starts the task that serves the clients of `device`.
    pub(crate) fn start(
        daemon: &Rc<Daemon>,
        id: &str,
        device: Rc<Device>,
        properties: &MonitorQmpProperties,
    ) -> AbortHandle {
        let monitor = Self {
            id: id.into(),
            name: device.id().to_owned(),
            pretty: properties.pretty.unwrap_or(false),
            events: daemon.events.clone(),
            jobs: daemon.monitors.jobs.clone(),
        };
        let daemon = daemon.clone();
        let deletes = properties.close_action == Some(MonitorCloseAction::Delete);
        let task = tokio::task::spawn_local(async move {
            daemon.monitors.are_open().await;
            monitor.run(&device, deletes).await;
            if deletes {
                monitor.delete(&daemon, &device);
            }
        });
        task.abort_handle()
    }

    /// Serves one client after another for as long as the device can bring one, or only the first.
    async fn run(&self, device: &Device, only_one: bool) {
        loop {
            match device.next().await {
                Ok(Some(client)) => {
                    device.set_connected(true);
                    connection::serve(self, client).await;
                    device.set_connected(false);
                    if only_one {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(monitor = self.name, %error, "a client could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// The client of a monitor with `close-action=delete` has left.
    fn delete(&self, daemon: &Daemon, device: &Device) {
        let deleted = objects::delete(daemon, &self.id, None);
        let removed = deleted.and_then(|()| daemon.chardevs.borrow_mut().remove(device.id()));
        if let Err(error) = removed {
            tracing::warn!(monitor = self.name, %error, "the monitor could not be deleted");
        }
    }
}
