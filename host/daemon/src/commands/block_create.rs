//! Creating images (`blockdev-create`).

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use outport_block::format::FormatFactory;
use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::Empty;
use outport_qmp::types::block_core::BlockdevRef;
use outport_qmp::types::block_create::{BlockdevCreate, BlockdevCreateBranch};
use outport_qmp::types::job::JobType;
use serde_json::{Map, Value};

use crate::blockdev;
use crate::daemon::Daemon;
use crate::graph::{Claim, EdgeId, Permissions, Use, User};
use crate::jobs::{Handle, JobOptions};

/// Whoever makes an image has its file alone.
const ALONE: Use = Use::Direct(Claim {
    required: Permissions::CONSISTENT_READ
        .or(Permissions::WRITE)
        .or(Permissions::RESIZE),
    shared: Permissions::NONE,
});

/// `blockdev-create`: answers when the job has started.
pub(super) fn create(daemon: &Rc<Daemon>, arguments: BlockdevCreate) -> Result<Empty, Error> {
    let BlockdevCreate { job_id, options } = arguments;
    // A job that is begun from now on would not be ended.
    let _whole = daemon.whole()?;
    match options.branch {
        BlockdevCreateBranch::File(file) => {
            start(daemon, job_id, |_| async move {
                let made = tokio::task::spawn_blocking(move || blockdev::create_file(&file)).await;
                made.unwrap_or_else(|error| Err(Error::generic(error.to_string())))
            })?;
        }
        BlockdevCreateBranch::Qcow2(qcow2) => {
            let members = match serde_json::to_value(&qcow2) {
                Ok(Value::Object(members)) => members,
                _ => Map::default(),
            };
            let daemon_too = daemon.clone();
            let make = |handle| image(daemon_too, "qcow2".into(), members, handle);
            start(daemon, job_id, make)?;
        }
        BlockdevCreateBranch::Plugin(plugin) => {
            if !daemon.plugins.has_format(&plugin.driver)? {
                return Err(Error::bad_enum("driver", &plugin.driver));
            }
            let daemon_too = daemon.clone();
            let make = |handle| image(daemon_too, plugin.driver, plugin.options, handle);
            start(daemon, job_id, make)?;
        }
        BlockdevCreateBranch::HostDevice(_)
        | BlockdevCreateBranch::Blkdebug(_)
        | BlockdevCreateBranch::Compress(_)
        | BlockdevCreateBranch::CopyOnRead(_)
        | BlockdevCreateBranch::Throttle(_)
        | BlockdevCreateBranch::Nbd(_)
        | BlockdevCreateBranch::NullAio(_)
        | BlockdevCreateBranch::NullCo(_)
        | BlockdevCreateBranch::Raw(_) => {
            return Err(Error::generic("Driver does not support blockdev-create"));
        }
    }
    Ok(Empty {})
}

/// Starts a job that creates something: one step, and it stays until it is dismissed.
fn start<F>(
    daemon: &Rc<Daemon>,
    id: String,
    make: impl FnOnce(Handle) -> F + 'static,
) -> Result<(), Error>
where
    F: Future<Output = Result<(), Error>> + 'static,
{
    let options = JobOptions {
        id,
        kind: JobType::Create,
        auto_finalize: true,
        auto_dismiss: false,
    };
    daemon.jobs.start(daemon, options, |handle| async move {
        handle.set_progress(0, 1);
        let made = make(handle.clone()).await;
        handle.set_progress(1, 1);
        made
    })
}

/// Makes an image of a plugin's format. Members that name nodes are the host's affair, the rest is
/// the plugin's.
async fn image(
    daemon: Rc<Daemon>,
    driver: String,
    mut options: Map<String, Value>,
    handle: Handle,
) -> Result<(), Error> {
    let child = |options: &Map<String, Value>, name| {
        outport_qmp::de::from_member::<BlockdevRef>(options, name, Mode::Typed)
    };
    let file = child(&options, "file")?.ok_or_else(|| Error::missing("file"))?;
    let data_file = child(&options, "data-file")?;
    options.remove("file");
    options.remove("data-file");
    let registry = daemon.plugins.registry()?;
    let factory = registry
        .format(&driver)
        .map_err(|error| Error::generic(error.to_string()))?;

    let mut held = Held {
        daemon: daemon.clone(),
        edges: Vec::new(),
    };
    let primary = held.hold(file)?;
    let mut storage = Vec::new();
    if let Some(data_file) = data_file {
        let node = held.hold(data_file)?;
        let name = node
            .host_file()
            .map(|file| file.path().display().to_string());
        options.insert("data-file".into(), Value::String(name.unwrap_or_default()));
        storage.push(node);
    }
    let options = Value::Object(options).to_string();
    let factory: Arc<dyn FormatFactory> = factory;
    let iothread = daemon.default_iothread()?;
    let cancelled = handle.cancelled();
    let made = iothread.run(move || async move {
        outport_block::image::create(&factory, &options, primary, storage, &cancelled).await
    });
    match made.await {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) => Err(blockdev::control_error(&error)),
        None => Err(Error::generic("The iothread that makes images is gone")),
    }
}

/// Nodes that are being written; let go on drop.
struct Held {
    daemon: Rc<Daemon>,
    edges: Vec<EdgeId>,
}

impl Held {
    fn hold(&mut self, node: BlockdevRef) -> Result<Arc<outport_block::Node>, Error> {
        let BlockdevRef::Reference(name) = node else {
            return Err(Error::generic(
                "Add the node with blockdev-add first, and name it in 'file'",
            ));
        };
        let mut graph = self.daemon.graph.borrow_mut();
        let node = graph.lookup(&name, &name)?;
        self.edges
            .push(graph.attach(User::Block, &name, "root", ALONE)?);
        Ok(node)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut graph = self.daemon.graph.borrow_mut();
        for edge in self.edges.drain(..) {
            graph.detach(edge);
        }
    }
}
