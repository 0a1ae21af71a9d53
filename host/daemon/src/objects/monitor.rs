//! Monitors that are made at run time (`monitor-qmp`).
//!
//! The object holds its character device for as long as it lives; the task that serves the
//! monitor's clients ends with it.

use std::cell::RefCell;
use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::types::qom::MonitorQmpProperties;
use tokio::task::AbortHandle;

use crate::chardev::{Device, Frontend};
use crate::daemon::Daemon;
use crate::monitor::Monitor;

/// A monitor's hold on its device, and its task.
#[derive(Debug)]
pub(crate) struct MonitorObject {
    /// Given back with the object.
    _frontend: Frontend,
    task: RefCell<Option<AbortHandle>>,
}

impl MonitorObject {
    /// Lets the client go.
    pub(super) fn stop(&self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// Takes the device and serves its clients, once startup is over.
///
/// # Errors
/// There is no such device, or it is in use.
pub(super) fn start(
    daemon: &Rc<Daemon>,
    id: &str,
    properties: &MonitorQmpProperties,
) -> Result<Rc<MonitorObject>, Error> {
    let device = daemon.chardevs.borrow().find(&properties.chardev)?;
    let frontend = Device::attach(&device)?;
    let task = Monitor::start(daemon, id, device, properties);
    Ok(Rc::new(MonitorObject {
        _frontend: frontend,
        task: RefCell::new(Some(task)),
    }))
}
