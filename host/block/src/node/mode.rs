//! What may be done to a node: written or only read, discarded, or nothing, because another daemon
//! has the image for now (`blockdev-set-active`).
//!
//! Read by every write, one relaxed load; changed by the control plane, which lets go of the node's
//! users or drains it.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{Kind, Node};
use crate::error::{Error, ErrorKind, Result};
use crate::file::HostFile;

const READ_ONLY: u8 = 1;
const UNMAP: u8 = 2;
const INACTIVE: u8 = 4;

/// The bits of one node.
#[derive(Debug)]
pub(super) struct Mode(AtomicU8);

impl Mode {
    pub(super) fn new(read_only: bool, unmap: bool) -> Self {
        let mode = Self(AtomicU8::new(0));
        mode.set(READ_ONLY, read_only);
        mode.set(UNMAP, unmap);
        mode
    }

    fn set(&self, bit: u8, on: bool) {
        if on {
            self.0.fetch_or(bit, Ordering::AcqRel);
        } else {
            self.0.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    fn has(&self, bits: u8) -> bool {
        self.0.load(Ordering::Relaxed) & bits != 0
    }
}

impl Node {
    /// Refuses writes for good?
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.mode.has(READ_ONLY)
    }

    /// Do discards reach it?
    #[must_use]
    pub fn unmaps(&self) -> bool {
        self.mode.has(UNMAP)
    }

    /// Is it ours to write, or has somebody else the image?
    #[must_use]
    pub fn is_active(&self) -> bool {
        !self.mode.has(INACTIVE)
    }

    /// Does a write fail now?
    pub(crate) fn refuses_writes(&self) -> bool {
        self.mode.has(READ_ONLY | INACTIVE)
    }

    /// From now on writes are refused, or not; discards reach it, or not. Files and images have to
    /// be told too; the caller knows that nobody who may write is left.
    pub fn set_options(&self, read_only: bool, unmap: bool) {
        self.mode.set(READ_ONLY, read_only);
        self.mode.set(UNMAP, unmap);
    }

    /// Leaves the node to somebody else: writes are refused from now on. Those before have ended
    /// and are in the files when this returns. Children come after, by the caller.
    ///
    /// # Errors
    /// What could not be written back; the node is active then.
    pub async fn inactivate(&self) -> Result<()> {
        self.mode.set(INACTIVE, true);
        let done = match &self.kind {
            Kind::Image(image) => image.inactivate().await,
            Kind::File(file) => {
                file.freeze().await;
                let flushed = file.flush().await;
                flushed.map_err(|e| Error::new(ErrorKind::Io, e.to_string()))
            }
            Kind::Remote(remote) => {
                let flushed = remote.flush().await;
                flushed.map_err(|e| Error::new(ErrorKind::Io, e.to_string()))
            }
            Kind::Raw(_) | Kind::Null { .. } | Kind::Filter(_) => Ok(()),
        };
        if done.is_err() {
            if let Kind::File(file) = &self.kind {
                file.thaw();
            }
            self.mode.set(INACTIVE, false);
        }
        done
    }

    /// Files below may be longer than they were, also those that were active all the time: their
    /// owner has made them so.
    pub(crate) fn look_again(&self) {
        self.with_file(HostFile::look_again);
    }

    /// Takes it back. Children come before, by the caller.
    ///
    /// # Errors
    /// The image is not what it was; the node stays inactive.
    pub async fn activate(&self) -> Result<()> {
        match &self.kind {
            Kind::File(file) => file.thaw(),
            Kind::Image(image) => {
                let opened = image.activate(!self.is_read_only()).await;
                opened.map_err(|e| {
                    let message = format!("Could not reopen {} layer: {e}", self.driver);
                    Error::new(ErrorKind::Invalid, message)
                })?;
            }
            Kind::Raw(_) | Kind::Filter(_) => self.look_again(),
            Kind::Null { .. } | Kind::Remote(_) => {}
        }
        // Somebody else may have changed its length.
        self.bitmaps.resize(self.size());
        self.mode.set(INACTIVE, false);
        Ok(())
    }
}
