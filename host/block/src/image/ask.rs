//! Asking the plugin: call, check, queue, believe.
//!
//! Under the plugin lock. An answer and its transaction are checked as a whole
//! before anything of them is applied; what fails a check leaves no trace.
//!
//! ```text
//!   call_once -> check_txn + the caller's check -> apply -> claims adopted
//!       | trap           | lie                        | the host's own failure
//!       +--> fault       +--> fault                   +--> instance dropped, errno
//! ```

use crate::Errno;
use crate::format::{Call, Fault, FaultKind, Format, FormatError, FormatFuture, SlotRange, TxnOp};

use super::verify::{Claims, Pending};
use super::{Cut, Image, ImageState, Plugin};

/// How often a call is made if the plugin faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tries {
    Once,
    Twice,
}

fn refused(code: Errno) -> FormatError {
    FormatError::Refused {
        code,
        message: code.to_string(),
    }
}

impl Image {
    /// A call that changes something. `check` looks at its value.
    pub(super) async fn ask<T, F, C>(
        &self,
        plugin: &mut Plugin,
        tries: Tries,
        call: F,
        check: C,
    ) -> Result<T, FormatError>
    where
        T: Send,
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, Call<T>> + Sync,
        C: Fn(&Plugin, &T, &Pending) -> Result<Claims, Fault> + Sync,
    {
        match self.ask_once(plugin, &call, &check).await {
            Err(FormatError::Fault(_)) if tries == Tries::Twice => {
                self.ask_once(plugin, &call, &check).await
            }
            other => other,
        }
    }

    async fn ask_once<T, F, C>(
        &self,
        plugin: &mut Plugin,
        call: &F,
        check: &C,
    ) -> Result<T, FormatError>
    where
        T: Send,
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, Call<T>> + Sync,
        C: Fn(&Plugin, &T, &Pending) -> Result<Claims, Fault> + Sync,
    {
        let Call { value, txn } = self.call_once(plugin, call).await?;
        if let Err(e) = self.files.room(&txn) {
            // No lie: the format cannot know where a window or a device ends.
            return Err(self.undone(plugin, e));
        }
        let checked = self
            .check_txn(plugin, &txn)
            .and_then(|pending| Ok((check(plugin, &value, &pending)?, pending)));
        let (claims, pending) = match checked {
            Ok(checked) => checked,
            Err(fault) => return Err(self.lie(plugin, fault)),
        };
        self.apply(plugin, &txn, &pending).await?;
        plugin.verifier.adopt(&Pending::default(), claims);
        Ok(value)
    }

    /// A call that changes nothing, with a fresh instance after a first fault.
    pub(super) async fn call<T, F>(&self, plugin: &mut Plugin, call: F) -> Result<T, FormatError>
    where
        T: Send,
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, T> + Sync,
    {
        match self.call_once(plugin, &call).await {
            Err(FormatError::Fault(_)) => self.call_once(plugin, &call).await,
            other => other,
        }
    }

    /// Call the plugin; a fault is final for this call.
    pub(super) async fn call_once<T, F>(
        &self,
        plugin: &mut Plugin,
        call: &F,
    ) -> Result<T, FormatError>
    where
        T: Send,
        F: for<'a> Fn(&'a mut dyn Format) -> FormatFuture<'a, T> + Sync,
    {
        if plugin.closed {
            return Err(refused(Errno::Shutdown));
        }
        if self.state() == ImageState::Failed {
            plugin.instance = None;
        }
        self.ensure_instance(plugin).await?;
        // Out of its place: if this future is dropped, the instance goes too,
        // since a call that did not return must not be followed by another.
        let Some(mut instance) = plugin.instance.take() else {
            return Err(refused(Errno::Io));
        };
        match call(instance.as_mut()).await {
            Err(FormatError::Fault(fault)) => Err(self.lie(plugin, fault)),
            result => {
                plugin.instance = Some(instance);
                result
            }
        }
    }

    /// Check what a call queued.
    pub(super) fn check_txn(&self, plugin: &Plugin, txn: &[TxnOp]) -> Result<Pending, Fault> {
        if !self.is_writable() && !txn.is_empty() {
            return Err(Fault {
                kind: FaultKind::BadAnswer,
                message: "it wrote metadata of an image that was opened for reading".to_owned(),
            });
        }
        plugin.verifier.transaction(txn)
    }

    /// Queue what was checked. If the host cannot, nothing of it happened, and
    /// an instance that believes it did must not go on.
    pub(super) async fn apply(
        &self,
        plugin: &mut Plugin,
        txn: &[TxnOp],
        pending: &Pending,
    ) -> Result<(), FormatError> {
        if let Err(e) = self.files.queue(txn).await {
            return Err(self.undone(plugin, e));
        }
        plugin.verifier.adopt(pending, Claims::default());
        for op in txn {
            match op {
                TxnOp::Write {
                    slot, offset, data, ..
                } => plugin.spare(*slot, offset + data.len() as u64),
                TxnOp::Zero { slot, range, .. } => plugin.spare(*slot, range.end()),
                TxnOp::Grow { slot, size } => plugin.spare(*slot, *size),
                TxnOp::Free(freed) => self.note_freed(plugin, *freed),
                TxnOp::Truncate { slot, size } => plugin.cut(*slot, *size),
            }
        }
        self.flusher.changed();
        Ok(())
    }

    /// The host could not do what the call asked for: the instance believes that it did.
    fn undone(&self, plugin: &mut Plugin, errno: Errno) -> FormatError {
        if errno == Errno::NoSpc {
            self.files.note_short(true);
        }
        self.drop_instance(plugin);
        refused(errno)
    }

    fn note_freed(&self, plugin: &mut Plugin, freed: SlotRange) {
        plugin.verifier.freed(freed);
        plugin.freed.push(freed);
        self.flusher.freed();
    }
}

impl Plugin {
    fn cut(&mut self, slot: u32, len: u64) {
        let reserved = self.reserved.values().filter(|p| p.slot == slot);
        let used = reserved.map(|p| p.offset + p.covers.len()).max();
        self.cuts.push(Cut {
            slot,
            len: len.max(used.unwrap_or(0)),
            sealed: false,
        });
    }

    /// The file is used up to `end`: a cut that was asked for before must not
    /// go below.
    pub(super) fn spare(&mut self, slot: u32, end: u64) {
        for cut in self.cuts.iter_mut().filter(|c| c.slot == slot) {
            cut.len = cut.len.max(end);
        }
    }
}
