//! QMP monitors: one task for each, one dispatcher for all.
//!
//! ```text
//! socket -> connection (parse, negotiate) -> dispatcher (one queue, FIFO) -> commands
//! socket <- output (bounded queue)        <- replies, events
//! ```
//!
//! A monitor has one client at a time and one command in flight, so the queue holds at most one
//! command of each monitor, and first come first served is fair. Invariant: what a client can make
//! the daemon hold is bounded by the constants here and by those of `outport_qmp::wire`.

mod connection;
mod dispatcher;
mod output;

pub(crate) use dispatcher::{Dispatcher, Job};
pub(crate) use output::Output;

use std::rc::Rc;

use tokio::sync::mpsc;

use crate::chardev::Source;
use crate::events::Events;

/// What every monitor is made with.
pub(crate) struct Monitor {
    /// Name of its chardev, for the log.
    pub(crate) name: String,
    pub(crate) pretty: bool,
    pub(crate) events: Rc<Events>,
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
}

impl Monitor {
    /// Task: serves one client after another for as long as the chardev can bring one.
    pub(crate) async fn run(self, mut source: Source) {
        loop {
            match source.next().await {
                Ok(Some(client)) => connection::serve(&self, client).await,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(monitor = self.name, %error, "a client could not be accepted");
                    // Out of descriptors or memory: give others time to leave.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }
}
