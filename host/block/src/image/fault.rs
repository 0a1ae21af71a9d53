//! What happens when a plugin breaks its contract.
//!
//! Under the plugin lock. The first fault replaces the instance and the call is
//! tried once more; a second one within the window fails the node. Nothing of a
//! faulted call was applied, so a fresh instance starts from what the files and
//! the overlay hold.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Errno;
use crate::format::{Call, Fault, Format, FormatError, FormatFuture, Geometry, TxnOp};

use super::overlay::Bytes;
use super::{Image, ImageEvent, ImageState, Plugin, verify};

/// Two faults within this time fail the node.
const WINDOW: Duration = Duration::from_secs(60);

/// When the last fault was.
#[derive(Debug, Default)]
pub(super) struct Window(Option<Instant>);

impl Image {
    /// Call the plugin, with a fresh instance after a first fault.
    pub(super) async fn call<T, F>(&self, plugin: &mut Plugin, call: F) -> Result<T, FormatError>
    where
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, T>,
    {
        match self.call_once(plugin, &call).await {
            Err(FormatError::Fault(_)) if self.state() != ImageState::Failed => {
                self.call_once(plugin, &call).await
            }
            other => other,
        }
    }

    /// Call the plugin; a fault is final for this call.
    pub(super) async fn call_once<T, F>(
        &self,
        plugin: &mut Plugin,
        call: F,
    ) -> Result<T, FormatError>
    where
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, T>,
    {
        if self.state() == ImageState::Failed {
            return Err(FormatError::Refused {
                code: Errno::Io,
                message: "The node failed after plugin faults; remove and add it again".to_owned(),
            });
        }
        self.ensure_instance(plugin).await?;
        let Some(instance) = plugin.instance.as_mut() else {
            return Err(FormatError::Refused {
                code: Errno::Io,
                message: String::new(),
            });
        };
        let result = call(instance.as_mut()).await;
        if let Err(FormatError::Fault(fault)) = &result {
            self.faulted(plugin, fault);
        }
        result
    }

    /// The plugin's answer cannot be true, or the call trapped: the instance
    /// goes, and so do its reservations (their space leaks at worst).
    pub(super) fn faulted(&self, plugin: &mut Plugin, fault: &Fault) {
        let now = Instant::now();
        plugin.instance = None;
        plugin.generation += 1;
        plugin.reserved.clear();
        self.factory
            .report_fault(crate::format::FormatFiles::node_name(&*self.files), fault);
        let again = plugin
            .faults
            .0
            .is_some_and(|last| now.duration_since(last) < WINDOW);
        plugin.faults.0 = Some(now);
        if again {
            self.set_state(ImageState::Failed);
        }
    }

    /// A fault found by the host's own checks.
    pub(super) fn lie(&self, plugin: &mut Plugin, fault: Fault) -> FormatError {
        self.faulted(plugin, &fault);
        FormatError::Fault(fault)
    }

    /// States only get worse.
    pub(super) fn set_state(&self, state: ImageState) {
        let number = match state {
            ImageState::Healthy => 0,
            ImageState::WritesRefused => 1,
            ImageState::Failed => 2,
        };
        if self.state.fetch_max(number, Ordering::AcqRel) < number {
            self.files
                .announce(|node_name| ImageEvent::State { node_name, state });
        }
    }

    async fn ensure_instance(&self, plugin: &mut Plugin) -> Result<(), FormatError> {
        if plugin.instance.is_some() {
            return Ok(());
        }
        let mut instance = self.factory.instantiate(self.files.clone()).await?;
        instance.open(&self.options, self.writable).await?;
        let call = instance.activate(self.grants.clone()).await?;
        let expected = Geometry {
            size: self.size(),
            ..self.geometry
        };
        if call.value != expected {
            let message = format!("a fresh instance sees {:?}, not {expected:?}", call.value);
            let fault = Fault {
                kind: crate::format::FaultKind::BadAnswer,
                message,
            };
            return Err(self.lie(plugin, fault));
        }
        self.apply(plugin, call).await?;
        plugin.instance = Some(instance);
        Ok(())
    }

    /// Verify and apply what a call queued; gives its value.
    pub(super) async fn apply<T>(
        &self,
        plugin: &mut Plugin,
        call: Call<T>,
    ) -> Result<T, FormatError> {
        for op in &call.txn {
            if let Err(error) = self.apply_op(plugin, op).await {
                // Some of it is queued, some is not: an instance that believes
                // all of it was must not go on.
                let fault = match error {
                    FormatError::Fault(fault) => fault,
                    FormatError::Refused { message, .. } => Fault {
                        kind: crate::format::FaultKind::BadAnswer,
                        message: format!("its metadata writes could not be queued: {message}"),
                    },
                };
                return Err(self.lie(plugin, fault));
            }
        }
        Ok(call.value)
    }

    async fn apply_op(&self, plugin: &mut Plugin, op: &TxnOp) -> Result<(), FormatError> {
        let io = |e: Errno| FormatError::Refused {
            code: e,
            message: e.to_string(),
        };
        match op {
            TxnOp::Write {
                slot,
                stage,
                offset,
                data,
            } => {
                self.note_metadata(plugin, *slot, *offset, data.len() as u64)?;
                self.files
                    .queue(*slot, *stage, *offset, Bytes::Given(data))
                    .await
                    .map_err(io)
            }
            TxnOp::Zero { slot, stage, range } => {
                self.note_metadata(plugin, *slot, range.offset(), range.len())?;
                let zeroes = Bytes::Zeroes(range.len());
                self.files
                    .queue(*slot, *stage, range.offset(), zeroes)
                    .await
                    .map_err(io)
            }
            TxnOp::Grow { slot, size } => {
                let node = self.files.node(*slot).map_err(io)?;
                node.grow_to(*size).map_err(io)
            }
            TxnOp::Free(freed) => {
                plugin.freed.push(*freed);
                Ok(())
            }
            TxnOp::Truncate { slot, size } => {
                plugin.truncated.push((*slot, *size));
                Ok(())
            }
        }
    }

    fn note_metadata(
        &self,
        plugin: &mut Plugin,
        slot: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), FormatError> {
        let range = crate::ByteRange::new(offset, len).ok_or_else(|| {
            FormatError::Fault(Fault {
                kind: crate::format::FaultKind::BadAnswer,
                message: format!("a metadata write at {offset:#x} overflows"),
            })
        })?;
        match &mut plugin.verifier {
            Some(verifier) => verifier.metadata(slot, range).map_err(FormatError::Fault),
            None => Ok(()),
        }
    }

    /// Check a geometry that a call returned.
    pub(super) fn check_geometry(geometry: &Geometry) -> Result<(), FormatError> {
        verify::geometry(geometry).map_err(FormatError::Fault)
    }
}
