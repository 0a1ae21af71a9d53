//! From options to nodes, and back: what `blockdev-add` and `blockdev-del` do.
//!
//! Runs on the control thread; whatever touches a file runs elsewhere and is awaited. Order:
//! names are reserved, children are opened or found, the uses of children are checked, the node is
//! opened, entered. Invariant: a node that could not be added leaves nothing behind, and no file
//! is opened whose name only an image told.

mod base;
mod blkdebug;
mod children;
mod filters;
mod format;
mod held;
mod native;
mod nbd;
mod reopen;
mod rules_file;
mod typed;

use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use outport_block::Node;
use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::block_core::{BlockdevDriverOptions, BlockdevOptions, BlockdevRef};

use crate::daemon::Daemon;
use crate::graph::{Entry, Use, User};
use base::Common;
pub(crate) use base::Inherited;
pub(crate) use held::Held;
pub(crate) use native::create_file;
pub(crate) use reopen::reopen;

/// The error of the block layer in QMP's form: it has QEMU's words already.
pub(crate) fn control_error(error: &outport_block::Error) -> Error {
    Error::generic(error.to_string())
}

/// Adds a node that an operator named.
///
/// # Errors
/// In QEMU's words; nothing was added then.
pub(crate) async fn add(
    daemon: &Daemon,
    options: BlockdevOptions,
    mode: Mode,
) -> Result<(), Error> {
    let _whole = daemon.whole()?;
    let mut opening = Opening::new(daemon, mode);
    opening.check_driver(&options)?;
    if options.node_name.is_none() {
        let message = "'node-name' must be specified for the root node";
        return Err(Error::generic(message));
    }
    let mut told = options.clone();
    let added = opening.open(options, Inherited::default(), true).await;
    match added {
        Ok(_) => {
            if mode == Mode::Keyval {
                typed::options(daemon, &mut told)?;
            }
            daemon.config.node_added(&daemon.graph.borrow(), told);
            Ok(())
        }
        Err(error) => {
            opening.undo().await;
            Err(error)
        }
    }
}

/// Deletes a node that nobody uses, and the children that it alone used.
///
/// # Errors
/// In QEMU's words.
pub(crate) async fn delete(daemon: &Daemon, name: &str) -> Result<(), Error> {
    let _whole = daemon.whole()?;
    daemon.graph.borrow().check_deletable(name)?;
    close(daemon, name.to_owned()).await;
    Ok(())
}

/// Closes all nodes, parents before children: a parent writes its metadata into its children.
pub(crate) async fn close_all(daemon: &Daemon) {
    loop {
        let mut next = daemon.graph.borrow().roots();
        if next.is_empty() {
            // Children of what was still being opened when the daemon ended.
            let graph = daemon.graph.borrow();
            next.extend(
                graph
                    .newest_first()
                    .map(|entry| entry.node.name().to_owned())
                    .take(1),
            );
        }
        if next.is_empty() {
            return;
        }
        for name in next {
            close(daemon, name).await;
        }
    }
}

/// Takes a node out of the graph and closes it, then its implicit children.
async fn close(daemon: &Daemon, name: String) {
    let mut closing = vec![name];
    while let Some(name) = closing.pop() {
        let Some(node) = daemon.graph.borrow_mut().take(&name) else {
            continue;
        };
        close_node(daemon, node).await;
        daemon.exports.forget_node(&name);
        closing.extend(daemon.graph.borrow_mut().forget(&name));
    }
}

/// Writes a node back. It is gone in any case, so a failure is for the log, and for the exit
/// status of the daemon.
async fn close_node(daemon: &Daemon, node: Arc<Node>) {
    let name = node.name().to_owned();
    daemon.closing.borrow_mut().push(name.clone());
    let closed = close_on_an_iothread(daemon, node).await;
    daemon.closing.borrow_mut().retain(|it| *it != name);
    if let Err(error) = closed {
        tracing::error!(
            node = name,
            %error,
            "the node is closed, but not everything of it could be written back"
        );
        daemon.lost.borrow_mut().push(name);
    }
}

async fn close_on_an_iothread(daemon: &Daemon, node: Arc<Node>) -> Result<(), Error> {
    let iothread = daemon.default_iothread()?;
    let closed = iothread.run(move || async move { node.close().await });
    let gone = || Error::generic("The iothread that closes nodes is gone");
    let closed = closed.await.ok_or_else(gone)?;
    closed.map_err(|error| control_error(&error))
}

/// The nodes of one `blockdev-add`, as far as they got.
pub(crate) struct Opening<'d> {
    daemon: &'d Daemon,
    mode: Mode,
    /// Reserved names, in the order of opening; entered in the graph or not.
    names: Vec<String>,
}

impl<'d> Opening<'d> {
    pub(crate) fn new(daemon: &'d Daemon, mode: Mode) -> Self {
        Self {
            daemon,
            mode,
            names: Vec::new(),
        }
    }

    /// Takes back what was opened, the last first.
    pub(crate) async fn undo(&mut self) {
        while let Some(name) = self.names.pop() {
            let node = self.daemon.graph.borrow_mut().take(&name);
            if let Some(node) = node {
                close_node(self.daemon, node).await;
            }
            // Children that became orphans stand before it in the list.
            self.daemon.graph.borrow_mut().forget(&name);
        }
    }

    /// Opens a node with its children and enters it; returns its name.
    pub(crate) fn open(
        &mut self,
        options: BlockdevOptions,
        inherited: Inherited,
        owned: bool,
    ) -> LocalBoxFuture<'_, Result<String, Error>> {
        Box::pin(async move {
            self.check_driver(&options)?;
            let common = Common::of(&options, &inherited)?;
            let name = self.reserve(options.node_name.as_deref())?;
            if !common.active {
                self.daemon.graph.borrow_mut().set_active(&name, false);
            }
            let driver = options.driver().to_owned();
            let asked = reopen::flat(&options);
            let made = match options.branch {
                BlockdevDriverOptions::Blkdebug(debug) => {
                    self.blkdebug(&name, *debug, &common).await?
                }
                BlockdevDriverOptions::Compress(compress) => {
                    self.compress(&name, compress, &common).await?
                }
                BlockdevDriverOptions::CopyOnRead(copy) => {
                    self.copy_on_read(&name, copy, &common).await?
                }
                BlockdevDriverOptions::Throttle(throttle) => {
                    self.throttle(&name, throttle, &common).await?
                }
                BlockdevDriverOptions::File(file) | BlockdevDriverOptions::HostDevice(file) => {
                    self.file(&name, &driver, file, &common).await?
                }
                BlockdevDriverOptions::Nbd(nbd) => self.nbd(&name, nbd, &common).await?,
                BlockdevDriverOptions::NullAio(null) | BlockdevDriverOptions::NullCo(null) => {
                    native::null(&name, &driver, &null, &common)?.into()
                }
                BlockdevDriverOptions::Raw(raw) => self.raw(&name, raw, &common).await?,
                BlockdevDriverOptions::Qcow2(qcow2) => self.qcow2(&name, *qcow2, &common).await?,
                BlockdevDriverOptions::Plugin(plugin) => {
                    self.plugin(&name, plugin, &common).await?
                }
            };
            if !common.active {
                crate::activity::leave(self.daemon, &made.node).await?;
            }
            if self.daemon.is_ending() {
                crate::daemon::hurry(&made.node);
            }
            self.daemon.graph.borrow_mut().insert(Entry {
                node: made.node,
                owned,
                facts: made.facts,
                options: asked,
                detect_zeroes: common.detect_zeroes,
                direct: common.direct,
                no_flush: common.no_flush,
                force_share: common.force_share,
            });
            Ok(name)
        })
    }

    fn check_driver(&self, options: &BlockdevOptions) -> Result<(), Error> {
        if let BlockdevDriverOptions::Plugin(plugin) = &options.branch
            && !self.daemon.plugins.has_format(&plugin.driver)?
        {
            return Err(plugin.unknown_driver());
        }
        Ok(())
    }

    fn reserve(&mut self, name: Option<&str>) -> Result<String, Error> {
        let mut graph = self.daemon.graph.borrow_mut();
        let name = match name {
            Some(name) => {
                graph.reserve(name)?;
                name.to_owned()
            }
            None => graph.reserve_implicit(),
        };
        self.names.push(name.clone());
        Ok(name)
    }

    /// Finds or opens a child and records what it is used for.
    async fn child(
        &mut self,
        parent: &str,
        role: &'static str,
        child: BlockdevRef,
        inherited: Inherited,
        purpose: Use,
    ) -> Result<Arc<Node>, Error> {
        let name = match child {
            BlockdevRef::Reference(name) => {
                // QEMU looks for a device and for a node of the one name.
                let graph = self.daemon.graph.borrow();
                graph
                    .find(&name)
                    .ok_or_else(|| Error::no_such_device_or_node(&name, &name))?;
                name
            }
            BlockdevRef::Definition(options) => self.open(*options, inherited, false).await?,
        };
        let mut graph = self.daemon.graph.borrow_mut();
        graph.attach(User::Node(parent.to_owned()), &name, role, purpose)?;
        graph.lookup(&name, &name)
    }
}

/// A node that was opened, and what its format says of the image.
struct Made {
    node: Arc<Node>,
    facts: serde_json::Map<String, serde_json::Value>,
}

impl From<Arc<Node>> for Made {
    fn from(node: Arc<Node>) -> Self {
        Self {
            node,
            facts: serde_json::Map::default(),
        }
    }
}
