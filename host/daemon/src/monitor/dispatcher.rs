//! The dispatcher: all commands of all monitors go through this one task.
//!
//! A command starts in its turn and runs until it has to wait for something slow; then others may
//! start. A monitor's commands never overlap each other, so each client sees strict order, and a
//! slow node holds up only who asked about it. Invariants: between two waits a command has the
//! whole state for itself; what was begun is not dropped before the daemon says that it may be.

use std::rc::Rc;

use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use outport_qmp::Command;
use outport_qmp::envelope::{self, Request};
use tokio::sync::{mpsc, oneshot};

use super::Output;
use crate::commands::Control;
use crate::descriptors::Arrived;

/// A command to run.
pub(crate) struct Job {
    pub(crate) request: Request,
    /// Descriptors that came over its monitor.
    pub(crate) arrived: Arrived,
    /// Id of the monitor that asks.
    pub(crate) monitor: Rc<str>,
    /// Where its answer goes.
    pub(crate) output: Rc<Output>,
    /// Told when the answer was queued; dropped if there will be none.
    pub(crate) done: oneshot::Sender<()>,
}

/// The task.
pub(crate) struct Dispatcher {
    control: Rc<Control>,
    jobs: mpsc::UnboundedReceiver<Job>,
    running: FuturesUnordered<LocalBoxFuture<'static, ()>>,
}

impl Dispatcher {
    /// The dispatcher of the commands that come through `jobs`. The queue is unbounded, but it
    /// never holds more than one command of each monitor.
    pub(crate) fn new(control: Rc<Control>, jobs: mpsc::UnboundedReceiver<Job>) -> Self {
        Self {
            control,
            jobs,
            running: FuturesUnordered::new(),
        }
    }

    /// Runs commands until one of them was `quit`, whose answer is queued then. Nothing is lost if
    /// this is dropped and called again.
    pub(crate) async fn run(&mut self) {
        while !self.control.has_quit() {
            tokio::select! {
                biased;
                Some(()) = self.running.next(), if !self.running.is_empty() => {}
                job = self.jobs.recv() => match job {
                    Some(job) => {
                        let control = self.control.clone();
                        self.running.push(Box::pin(execute(control, job)));
                    }
                    // No monitor is left: signals still end the daemon.
                    None if self.running.is_empty() => return std::future::pending().await,
                    None => {}
                },
            }
        }
    }

    /// Goes on with the commands that were begun, and begins no other.
    pub(crate) async fn go_on(&mut self) {
        while self.running.next().await.is_some() {}
    }
}

async fn execute(control: Rc<Control>, job: Job) {
    let Request {
        id,
        name,
        arguments,
        ..
    } = job.request;
    let outcome = match Command::from_request(&name, &arguments) {
        Ok(command) => {
            // What nobody takes of the descriptors goes with the client, not with the next command.
            let control = control.for_command(job.monitor, job.arrived);
            command.run(&control).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        tracing::debug!(command = name, %error, "command failed");
    }
    job.output.push(&envelope::reply(id, outcome));
    let _monitor_left = job.done.send(());
}
