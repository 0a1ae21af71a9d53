//! Changing the length, and checking: the node is drained for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::engine::buffer::Buf;
use crate::format::{CheckReport, Fault, FaultKind, FormatError, Geometry, Repair};
use crate::{ByteRange, Errno};

use super::ask::Tries;
use super::verify::{self, Claims};
use super::{Image, Plugin};

/// Slices of one check: of 16 MiB of metadata each, more than any image has.
const CHECK_SLICES_MAX: usize = 1 << 24;

impl Image {
    /// Change the length, durably: whoever asked for it goes on with the new one. What a growth
    /// adds reads as zeroes, or as the backing file where the format has it so.
    ///
    /// The new length and the zeroes that hide what lies behind it (a backing file, a compressed
    /// cluster that an earlier shrink cut) are of one stage: after a power cut before the answer
    /// the former may be there without the latter.
    pub(crate) async fn resize(self: &Arc<Self>, size: u64) -> Result<(), FormatError> {
        self.resize_unless(size, |_| false).await
    }

    /// Make it at least so long, whoever else is making it longer.
    pub(crate) async fn extend(self: &Arc<Self>, size: u64) -> Result<(), FormatError> {
        self.resize_unless(size, |old| old >= size).await
    }

    async fn resize_unless(
        self: &Arc<Self>,
        size: u64,
        is_enough: impl FnOnce(u64) -> bool,
    ) -> Result<(), FormatError> {
        let refused = |code: Errno| FormatError::Refused {
            code,
            message: code.to_string(),
        };
        self.writable_now().map_err(refused)?;
        self.check_bitmaps_follow()?;
        self.make_room().await.map_err(refused)?;
        // Nobody may be using what a shrink takes away.
        let drained = self.gate.drain().await;
        self.writable_now().map_err(refused)?;
        let old = self.size();
        if is_enough(old) {
            return Ok(());
        }
        let new = {
            let mut plugin = self.plugin.lock().await;
            self.resize_locked(&mut plugin, size).await?
        };
        self.clear_tail(old, new).await.map_err(refused)?;
        drop(drained);
        self.flush().await.map_err(refused)
    }

    async fn resize_locked(&self, plugin: &mut Plugin, size: u64) -> Result<u64, FormatError> {
        let resize = self.ask(
            plugin,
            Tries::Twice,
            |f| f.resize(size),
            |_, geometry: &Geometry, _| {
                verify::geometry(geometry)?;
                let same = Geometry {
                    size: geometry.size,
                    ..self.expected()
                };
                if *geometry == same && geometry.size == size {
                    Ok(Claims::default())
                } else {
                    Err(Fault {
                        kind: FaultKind::BadAnswer,
                        message: format!("a resize to {size} bytes gave {geometry:?}"),
                    })
                }
            },
        );
        let new = resize.await?.size;
        let old = self.size.swap(new, Ordering::AcqRel);
        let changed = ByteRange::between(old.min(new), ByteRange::END_MAX);
        let changed = changed.align_out(u64::from(self.geometry.unit));
        self.map.invalidate(changed);
        plugin.verifier.set_size(new);
        plugin.verifier.evict(changed);
        Ok(new)
    }

    /// The last cluster may hold bytes from before an earlier shrink.
    async fn clear_tail(self: &Arc<Self>, old: u64, new: u64) -> Result<(), Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let tail = ByteRange::between(old, old.next_multiple_of(cluster).min(new));
        if new <= old || tail.is_empty() || self.reads_as_zero(tail).await? {
            return Ok(());
        }
        let zeroes = Buf::zeroed(tail.len() as usize);
        self.write_inside(tail.offset(), &zeroes.io(), false)
            .await
            .map(|_| ())
    }

    /// Check, and mend what `fix` allows. `progress` is told each cursor.
    ///
    /// # Errors
    /// The plugin's, or what the files said.
    pub async fn check(
        &self,
        fix: Repair,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<CheckReport, FormatError> {
        let _drained = self.gate.drain().await;
        let mut cursor = Some(0);
        let mut report = CheckReport::default();
        let mut slices = 0;
        while let Some(at) = cursor {
            slices += 1;
            let mut plugin = self.plugin.lock().await;
            let check = self.ask(
                &mut plugin,
                Tries::Once,
                |f| f.check(fix, at),
                |_, (_, next), _| match next {
                    // The gate is closed meanwhile: it must end.
                    Some(next) if *next <= at || slices >= CHECK_SLICES_MAX => Err(Fault {
                        kind: FaultKind::BadAnswer,
                        message: format!("slice {slices} of a check went from {at} to {next}"),
                    }),
                    _ => Ok(Claims::default()),
                },
            );
            (report, cursor) = check.await?;
            drop(plugin);
            progress(cursor.unwrap_or(at));
            self.write_back_if_full().await?;
        }
        if fix != Repair::default() {
            let all = ByteRange::between(0, ByteRange::END_MAX);
            let mut plugin = self.plugin.lock().await;
            self.map.invalidate(all);
            plugin.verifier.evict(all);
        }
        Ok(report)
    }

    /// A repair may write a lot. The plugin is not asked for more in between.
    pub(super) async fn write_back_if_full(&self) -> Result<(), FormatError> {
        if self.files.overlay().active_bytes() <= super::overlay::DIRTY_MAX {
            return Ok(());
        }
        self.write_back()
            .await
            .map_err(|code| FormatError::Refused {
                code,
                message: code.to_string(),
            })
    }
}
