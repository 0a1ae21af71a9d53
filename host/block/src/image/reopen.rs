//! Changing how an image is open while it is used: written or only read, in which file, over which
//! backing node, with which options, or left to somebody else for a while.
//!
//! On an iothread that the control plane asks. The node is drained, the image put away as at its
//! end, and opened again by a fresh instance: what was known of it is forgotten. Invariant: on an
//! error the image is open as it was, and the next request makes an instance for that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{FormatError, FormatFiles, Geometry, Grant, Granted};
use crate::node::Node;
use crate::{ByteRange, Errno};

use super::fault::Opening;
use super::open::control_error;
use super::{Image, ImageState, Plugin, verify};

/// Another backing node.
#[derive(Clone, Debug)]
pub enum NewBacking {
    /// None: what the image does not hold reads as zeroes.
    None,
    /// This one.
    Node(Arc<Node>),
}

/// What changes; the rest stays.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// Whether it can be written.
    pub writable: Option<bool>,
    /// The image file.
    pub file: Option<Arc<Node>>,
    /// The backing node.
    pub backing: Option<NewBacking>,
    /// The format's options: a JSON object.
    pub options: Option<String>,
}

/// An image that is closed stays so: nobody would close it again.
fn check_open(plugin: &Plugin, node_name: &str) -> Result<()> {
    match plugin.closed {
        false => Ok(()),
        true => Err(Error::new(
            ErrorKind::Invalid,
            format!("Node '{node_name}' is closed"),
        )),
    }
}

/// How the image was open before.
struct Before {
    writable: bool,
    file: Option<Arc<Node>>,
    backing: Option<Arc<Node>>,
    grants: Vec<Grant>,
    options: String,
}

impl Image {
    /// Open it in another way. Requests wait until those before them have ended and it is done;
    /// the limits of throttles below do not hold them up.
    ///
    /// # Errors
    /// What could not be written back, the format's own sentence, or that the image is closed;
    /// nothing changed then.
    pub async fn reopen(&self, change: Change) -> Result<()> {
        let name = self.files.node_name().to_owned();
        let backing = self.backing();
        let below: Vec<_> = self.storage().chain(backing).collect();
        let _passing: Vec<_> = below.iter().map(|it| it.drain_throttles()).collect();
        let _drained = self.gate.drain().await;
        check_open(&*self.plugin.lock().await, &name)?;
        if self.is_writable() {
            self.put_away(&name).await?;
        }
        let mut plugin = self.plugin.lock().await;
        check_open(&plugin, &name)?;
        let before = self.apply_change(&mut plugin, change)?;
        let opened = self.open_again(&mut plugin).await;
        if opened.is_err() {
            self.writable.store(before.writable, Ordering::Release);
            if let Some(file) = before.file {
                self.exchange_file(file)?;
            }
            self.backing.store(before.backing);
            plugin.grants = before.grants;
            plugin.options = before.options;
            self.forget(&mut plugin);
            if before.writable && self.ensure_instance(&mut plugin).await.is_err() {
                // What it marks as in use was put away, and would not say so.
                self.files.set_state(ImageState::WritesRefused);
            }
        }
        drop(plugin);
        self.forget_freed().await;
        if self.make_marks_durable().await.is_err() {
            self.files.set_state(ImageState::WritesRefused);
        }
        opened.map_err(|e| control_error(&name, e))
    }

    /// Writes everything back and leaves the image to somebody else: from now on it is only read,
    /// as far as it makes sense to whoever looks.
    ///
    /// # Errors
    /// What could not be written back; the image is as it was.
    pub async fn inactivate(&self) -> Result<()> {
        let name = self.files.node_name().to_owned();
        let _drained = self.gate.drain().await;
        check_open(&*self.plugin.lock().await, &name)?;
        if self.is_writable() {
            self.put_away(&name).await?;
        }
        let mut plugin = self.plugin.lock().await;
        self.writable.store(false, Ordering::Release);
        plugin.inactive = true;
        self.drop_instance(&mut plugin);
        drop(plugin);
        self.forget_freed().await;
        self.drop_loaded_bitmaps();
        Ok(())
    }

    /// Takes the image back: looks at what somebody else may have made of it.
    ///
    /// # Errors
    /// The format's own sentence; the image stays inactive.
    pub async fn activate(&self, writable: bool) -> Result<()> {
        let name = self.files.node_name().to_owned();
        let _drained = self.gate.drain().await;
        let mut plugin = self.plugin.lock().await;
        check_open(&plugin, &name)?;
        self.files.look_again();
        self.writable.store(writable, Ordering::Release);
        plugin.inactive = false;
        let mut opened = self.open_again(&mut plugin).await;
        if opened.is_ok() {
            opened = self.load_bitmaps(&mut plugin).await;
        }
        if opened.is_err() {
            self.writable.store(false, Ordering::Release);
            plugin.inactive = true;
            self.forget(&mut plugin);
        }
        drop(plugin);
        if self.make_marks_durable().await.is_err() {
            self.files.set_state(ImageState::WritesRefused);
        }
        opened.map_err(|e| control_error(&name, e))
    }

    fn exchange_file(&self, file: Arc<Node>) -> Result<Arc<Node>> {
        let exchanged = self.files.exchange_primary(file);
        exchanged.map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()))
    }

    fn apply_change(&self, plugin: &mut Plugin, change: Change) -> Result<Before> {
        let file = change.file.map(|it| self.exchange_file(it)).transpose()?;
        let before = Before {
            writable: self.is_writable(),
            file,
            backing: self.backing(),
            grants: plugin.grants.clone(),
            options: plugin.options.clone(),
        };
        if let Some(writable) = change.writable {
            self.writable.store(writable, Ordering::Release);
        }
        if let Some(options) = change.options {
            plugin.options = options;
        }
        if let Some(backing) = change.backing {
            let (node, what) = match backing {
                NewBacking::None => (None, Granted::None),
                NewBacking::Node(node) => {
                    let size = node.size();
                    (Some(node), Granted::Backing(size))
                }
            };
            self.backing.store(node);
            // Every format with backing nodes calls the child so: `blockdev-add` knows no other.
            for grant in plugin.grants.iter_mut().filter(|it| it.id == "backing") {
                grant.what = what;
            }
        }
        Ok(before)
    }

    async fn open_again(&self, plugin: &mut Plugin) -> std::result::Result<(), FormatError> {
        self.forget(plugin);
        let (instance, call) = self.instantiate(plugin, Opening::First).await?;
        let geometry = call.value;
        verify::geometry(&geometry).map_err(FormatError::Fault)?;
        let same = Geometry {
            unit: geometry.unit,
            cluster_size: geometry.cluster_size,
            ..self.geometry
        };
        if same != self.geometry {
            return Err(FormatError::Refused {
                code: Errno::Inval,
                message: "The image has another cluster size now".to_owned(),
            });
        }
        self.size.store(geometry.size, Ordering::Release);
        let granularity = geometry.zero_granularity;
        self.zero_granularity.store(granularity, Ordering::Relaxed);
        let granularity = geometry.discard_granularity;
        self.discard_granularity
            .store(granularity, Ordering::Relaxed);
        plugin.verifier = verify::Verifier::new(self.files.count(), &geometry);
        self.adopt(plugin, instance, &call).await
    }

    /// Nothing is known of the image any more; nobody is inside.
    fn forget(&self, plugin: &mut Plugin) {
        self.bitmaps.changed();
        self.drop_instance(plugin);
        plugin.freed.clear();
        plugin.cuts.clear();
        plugin.verifier = verify::Verifier::new(self.files.count(), &self.expected());
        self.map
            .invalidate(ByteRange::between(0, ByteRange::END_MAX));
        self.decoded.clear();
    }
}
