//! What happens when a plugin breaks its contract.
//!
//! Under the plugin lock. The first fault replaces the instance and the call is
//! tried once more; a second one within the window fails the node. Nothing of a
//! faulted call was applied, so a fresh instance starts from what the files and
//! the overlay hold, and it is told so: an image that is in use may look like one
//! that nobody closed, and must not be repaired under those who use it. Writers
//! whose reservations died with the old instance start over (`allocate`).

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Errno;
use crate::format::{Call, Fault, FaultKind, Format, FormatError, FormatFiles, Geometry};

use super::{Image, ImageState, Plugin};

/// Two faults within this time fail the node.
const WINDOW: Duration = Duration::from_secs(60);

/// What an instance finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// An image that nobody has.
    First,
    /// One that is in use: reservations are written to, and freed space comes back.
    TakeOver,
}

/// When the last fault was.
#[derive(Debug, Default)]
pub(super) struct Window(Option<Instant>);

impl Image {
    /// The plugin's answer cannot be true, or the call trapped: the instance
    /// goes, and so do its reservations (their space leaks at worst).
    fn faulted(&self, plugin: &mut Plugin, fault: &Fault) {
        let now = Instant::now();
        self.drop_instance(plugin);
        if plugin.inactive {
            // It saw an image that somebody else is in the middle of changing.
            return;
        }
        self.factory.report_fault(self.files.node_name(), fault);
        let again = plugin
            .faults
            .0
            .is_some_and(|last| now.duration_since(last) < WINDOW);
        plugin.faults.0 = Some(now);
        if again {
            self.files.set_state(ImageState::Failed);
        }
    }

    /// A fault, of the call or found by the host's own checks.
    pub(super) fn lie(&self, plugin: &mut Plugin, fault: Fault) -> FormatError {
        self.faulted(plugin, &fault);
        FormatError::Fault(fault)
    }

    /// The instance must not go on: it believes what did not happen. What it
    /// reserved stays owned in the verifier until its writers have noticed
    /// ([`Image::let_go`]), since they may be writing there now.
    pub(super) fn drop_instance(&self, plugin: &mut Plugin) {
        plugin.instance = None;
        plugin.generation += 1;
        plugin.reserved.clear();
    }

    /// An instance to call.
    pub(super) async fn ensure_instance(&self, plugin: &mut Plugin) -> Result<(), FormatError> {
        if plugin.instance.is_some() {
            return Ok(());
        }
        if self.state() == ImageState::Failed {
            return Err(FormatError::Refused {
                code: Errno::Io,
                message: "The node failed after plugin faults; remove and add it again".to_owned(),
            });
        }
        // Also where the last one was dropped in the middle of a call.
        self.drop_instance(plugin);
        match self.fresh_instance(plugin).await {
            Err(FormatError::Fault(fault)) => Err(self.lie(plugin, fault)),
            other => other,
        }
    }

    async fn fresh_instance(&self, plugin: &mut Plugin) -> Result<(), FormatError> {
        let (instance, call) = self.instantiate(plugin, Opening::TakeOver).await?;
        let expected = self.expected();
        if call.value != expected {
            return Err(FormatError::Fault(Fault {
                kind: FaultKind::BadAnswer,
                message: format!("a fresh instance sees {:?}, not {expected:?}", call.value),
            }));
        }
        self.adopt(plugin, instance, &call).await
    }

    /// A fresh instance, and what it says of the image.
    pub(super) async fn instantiate(
        &self,
        plugin: &mut Plugin,
        opening: Opening,
    ) -> Result<(Box<dyn Format>, Call<Geometry>), FormatError> {
        let mut instance = self.factory.instantiate(self.files.clone()).await?;
        instance.open(&plugin.options, self.is_writable()).await?;
        if opening == Opening::TakeOver {
            instance.take_over().await?;
        }
        let call = instance.activate(plugin.grants.clone()).await?;
        Ok((instance, call))
    }

    /// What the plugin says of the image as a whole, as far as anybody knows.
    pub(super) fn expected(&self) -> Geometry {
        Geometry {
            size: self.size(),
            zero_granularity: self.zero_granularity.load(Ordering::Relaxed),
            discard_granularity: self.discard_granularity.load(Ordering::Relaxed),
            ..self.geometry
        }
    }

    /// Believes a fresh instance whose geometry was looked at.
    pub(super) async fn adopt(
        &self,
        plugin: &mut Plugin,
        instance: Box<dyn Format>,
        call: &Call<Geometry>,
    ) -> Result<(), FormatError> {
        let pending = self
            .check_txn(plugin, &call.txn)
            .map_err(FormatError::Fault)?;
        self.apply(plugin, &call.txn, &pending).await?;
        plugin.instance = Some(instance);
        Ok(())
    }
}
