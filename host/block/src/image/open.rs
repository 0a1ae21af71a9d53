//! Opening, closing and creating images.
//!
//! Runs on whatever thread the control plane asks; the image is not shared yet.
//! Invariant: a child that the image names is never opened here. The caller's
//! [`ChildSource`] grants or refuses it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex as AsyncMutex;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Child, ChildKind, FormatError, FormatFactory, Geometry, Grant, Granted, Stage,
};
use crate::gate::Gate;
use crate::node::Node;

use super::ask::Tries;
use super::codec::DecodedCache;
use super::files::{EventSink, ImageFiles};
use super::flush::Flusher;
use super::locks::RangeLocks;
use super::map::ExtentMap;
use super::persist::Stored;
use super::turn::Turn;
use super::verify::Claims;
use super::{Image, ImageState, Plugin, fault, verify};

/// Who decides about the files that an image names.
pub trait ChildSource {
    /// The node for this child; `None`: there is none (`"backing": null`, or
    /// optional and not given).
    ///
    /// # Errors
    /// The operator did not grant it: the sentence says what to do.
    fn child(&mut self, child: &Child) -> Result<Option<Arc<Node>>>;
}

pub(super) fn control_error(node_name: &str, e: FormatError) -> Error {
    match e {
        FormatError::Refused { message, .. } => Error::new(ErrorKind::Invalid, message),
        FormatError::Fault(fault) => {
            Error::new(ErrorKind::Plugin, format!("Node '{node_name}': {fault}"))
        }
    }
}

impl Image {
    /// Open the image in `primary`.
    ///
    /// # Errors
    /// The format's own sentence, a refused child, or a plugin fault.
    pub async fn open(
        node_name: &str,
        factory: Arc<dyn FormatFactory>,
        options: String,
        writable: bool,
        primary: Arc<Node>,
        children: &mut dyn ChildSource,
        events: EventSink,
    ) -> Result<Self> {
        if writable && !factory.writable() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "Format '{}' is read-only: add 'read-only': true to node '{node_name}'",
                    factory.name()
                ),
            ));
        }
        let fail = |e| control_error(node_name, e);
        let files = Arc::new(ImageFiles::new(node_name, primary, events));
        let mut instance = factory.instantiate(files.clone()).await.map_err(fail)?;
        let asked = instance.open(&options, writable).await.map_err(fail)?;
        verify::children(&asked).map_err(|f| fail(FormatError::Fault(f)))?;
        let mut grants = Vec::new();
        let mut backing = None;
        for child in asked {
            let node = children.child(&child)?;
            let what = match (child.kind, node) {
                // Without a backing image the rest reads as zeroes: the
                // operator may want that (`"backing": null`).
                (ChildKind::Storage, None) if child.required => {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("Node '{node_name}': the image needs '{}'", child.id),
                    ));
                }
                (_, None) => Granted::None,
                (ChildKind::Storage, Some(node)) => Granted::Slot(files.grant(node)?),
                (ChildKind::Backing, Some(node)) => {
                    let size = node.size();
                    backing = Some(node);
                    Granted::Backing(size)
                }
            };
            grants.push(Grant { id: child.id, what });
        }
        let call = instance.activate(grants.clone()).await.map_err(fail)?;
        let geometry: Geometry = call.value;
        verify::geometry(&geometry).map_err(|f| fail(FormatError::Fault(f)))?;
        let plugin = Plugin {
            instance: Some(instance),
            verifier: verify::Verifier::new(files.count(), &geometry),
            generation: 0,
            reserved: HashMap::new(),
            freed: Vec::new(),
            cuts: Vec::new(),
            faults: fault::Window::default(),
            closed: false,
            inactive: false,
            options,
            grants,
        };
        let image = Self {
            factory,
            writable: AtomicBool::new(writable),
            files,
            backing: ArcSwapOption::new(backing),
            geometry,
            size: AtomicU64::new(geometry.size),
            zero_granularity: AtomicU32::new(geometry.zero_granularity),
            discard_granularity: AtomicU32::new(geometry.discard_granularity),
            map: ExtentMap::new(geometry.unit),
            plugin: AsyncMutex::new(plugin),
            turn: Turn::default(),
            locks: RangeLocks::default(),
            decoded: DecodedCache::default(),
            decoding: RangeLocks::default(),
            gate: Gate::default(),
            flusher: Flusher::default(),
            bitmaps: Arc::default(),
            has_stored: AtomicBool::new(false),
        };
        {
            let mut plugin = image.plugin.lock().await;
            let pending = image
                .check_txn(&plugin, &call.txn)
                .map_err(|f| fail(FormatError::Fault(f)))?;
            image
                .apply(&mut plugin, &call.txn, &pending)
                .await
                .map_err(fail)?;
            image.load_bitmaps(&mut plugin).await.map_err(fail)?;
        }
        image.make_marks_durable().await.map_err(|e| {
            let message = format!("Node '{node_name}' could not be opened: {e}");
            Error::new(ErrorKind::Io, message)
        })?;
        Ok(image)
    }

    /// Write everything back and mark the image clean. It is not opened again.
    ///
    /// # Errors
    /// What the files or the plugin said; the image may then need a repair.
    pub async fn close(&self, node_name: &str) -> Result<()> {
        if !self.is_writable() {
            self.plugin.lock().await.closed = true;
            return Ok(());
        }
        // Also what clients abandoned has ended when the node is drained.
        let _drained = self.gate.drain().await;
        let lost = self.put_away(node_name).await?;
        self.plugin.lock().await.closed = true;
        match lost {
            None => Ok(()),
            Some(error) => Err(Error::new(
                ErrorKind::Io,
                format!("Node '{node_name}' has lost its persistent bitmaps: {error}"),
            )),
        }
    }

    /// Writes everything back and marks the image clean; nobody is inside. The next call is one of
    /// a fresh instance.
    ///
    /// On an error the image is in use as before, and its bitmaps say so again, or nobody writes.
    /// `Some`: everything but the persistent bitmaps is written back.
    pub(super) async fn put_away(&self, node_name: &str) -> Result<Option<FormatError>> {
        let mut changed = false;
        let put = self.put_all_away(node_name, &mut changed).await;
        if put.is_err() && changed {
            let mut plugin = self.plugin.lock().await;
            self.drop_instance(&mut plugin);
            let marked = self.ensure_instance(&mut plugin).await.is_ok();
            drop(plugin);
            if !marked || self.make_marks_durable().await.is_err() {
                self.files.set_state(ImageState::WritesRefused);
            }
        }
        put
    }

    async fn put_all_away(
        &self,
        node_name: &str,
        changed: &mut bool,
    ) -> Result<Option<FormatError>> {
        let io = |e: crate::Errno| {
            Error::new(
                ErrorKind::Io,
                format!(
                    "Node '{node_name}' could not be closed: {e}; what it acknowledged since its \
                     last flush is lost"
                ),
            )
        };
        self.settle().await.map_err(io)?;
        let stored = self.put_bitmaps_away().await;
        *changed = !matches!(stored, Stored::Nothing);
        if *changed {
            self.settle().await.map_err(io)?;
        }
        let mut plugin = self.plugin.lock().await;
        // A damaged image stays marked as not closed.
        if plugin.instance.is_some() && self.state() == ImageState::Healthy {
            let close = self.ask(
                &mut plugin,
                Tries::Once,
                |f| f.close(),
                |_, (), _| Ok(Claims::default()),
            );
            close.await.map_err(|e| control_error(node_name, e))?;
        }
        plugin.instance = None;
        drop(plugin);
        self.write_back().await.map_err(io)?;
        Ok(match stored {
            Stored::Lost(error) => Some(error),
            Stored::All | Stored::Nothing => None,
        })
    }
}

/// Make a new image of this format in `primary`, which is emptied first. Setting `cancelled` ends
/// it before its next step, with nothing in flight.
///
/// # Errors
/// The format's own sentence, what the file said, or that it was cancelled.
pub async fn create(
    factory: &Arc<dyn FormatFactory>,
    options: &str,
    primary: Arc<Node>,
    storage: Vec<Arc<Node>>,
    cancelled: &AtomicBool,
) -> Result<()> {
    let name = primary.name().to_owned();
    let go_on = || match cancelled.load(Ordering::Relaxed) {
        true => Err(Error::new(ErrorKind::Io, "Operation canceled")),
        false => Ok(()),
    };
    let fail = |e| control_error(&name, e);
    let io = |e: crate::Errno| Error::new(ErrorKind::Io, format!("Node '{name}': {e}"));
    primary.resize_storage(0).await.map_err(io)?;
    let files = Arc::new(ImageFiles::new(&name, primary, Arc::new(|_| {})));
    for node in storage {
        files.grant(node)?;
    }
    go_on()?;
    let mut instance = factory.instantiate(files.clone()).await.map_err(fail)?;
    let call = instance.create(options).await.map_err(fail)?;
    // Nothing is mapped yet; this bounds what it queues.
    let geometry = Geometry {
        size: 0,
        unit: 512,
        cluster_size: 512,
        zero_granularity: 0,
        discard_granularity: 0,
    };
    let verifier = verify::Verifier::new(files.count(), &geometry);
    verifier
        .transaction(&call.txn)
        .map_err(|f| fail(FormatError::Fault(f)))?;
    files.queue(&call.txn).await.map_err(io)?;
    files.overlay().seal();
    for stage in [Stage::Prepare, Stage::Mapping] {
        go_on()?;
        files.write_out(stage).await.map_err(io)?;
        for node in files.nodes() {
            go_on()?;
            node.flush().await.map_err(io)?;
        }
    }
    files.overlay().retire();
    Ok(())
}
