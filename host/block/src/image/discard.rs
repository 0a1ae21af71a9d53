//! Discarding and zeroing what the format can.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::bitmap::Mark;
use crate::format::{DiscardKind, Extent};
use crate::{ByteRange, Errno};

use super::ask::Tries;
use super::verify::Pending;
use super::{Image, Plugin};

/// Guest bytes per plugin call: others wait for the range only so long, and the
/// overlay is looked at in between.
const STEP_MAX: u64 = 1 << 30;

impl Image {
    /// Discard or zero what the format can of `range`; returns the part that it
    /// could not (unaligned head and tail), which for zeroes the caller writes.
    pub(crate) async fn discard(
        self: &Arc<Self>,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<[ByteRange; 2], Errno> {
        self.writable_now()?;
        let granularity = u64::from(match kind {
            DiscardKind::Discard => self.discard_granularity.load(Ordering::Relaxed),
            DiscardKind::ZeroUnmap | DiscardKind::ZeroKeep => {
                self.zero_granularity.load(Ordering::Relaxed)
            }
        });
        let Some(inner) = self.granules(range, granularity) else {
            return Ok([range, ByteRange::between(range.end(), range.end())]);
        };
        let mut at = inner.offset();
        while at < inner.end() {
            at = self
                .with_space(|| self.discard_some(ByteRange::between(at, inner.end()), kind))
                .await?;
        }
        Ok([
            ByteRange::between(range.offset(), inner.offset()),
            ByteRange::between(inner.end(), range.end()),
        ])
    }

    fn granules(&self, range: ByteRange, granularity: u64) -> Option<ByteRange> {
        if granularity == 0 {
            return None;
        }
        let start = range.offset().checked_next_multiple_of(granularity)?;
        // The last granule may be cut by the end of the image.
        let end = if range.end() >= self.size() {
            self.size()
        } else {
            range.end() / granularity * granularity
        };
        (start < end).then(|| ByteRange::between(start, end))
    }

    /// One step; returns where it got to.
    async fn discard_some(
        self: &Arc<Self>,
        rest: ByteRange,
        kind: DiscardKind,
    ) -> Result<u64, Errno> {
        let _pass = self.enter_writing().await?;
        let end = rest.end().min(rest.offset().saturating_add(STEP_MAX));
        let rest = ByteRange::between(rest.offset(), end);
        let _mark = Mark::new(&self.bitmaps, rest);
        let cluster = u64::from(self.geometry.cluster_size);
        let _guard = self.locks.lock(rest.align_out(cluster)).await;
        let mut plugin = self.plugin.lock().await;
        let near = self.map.near(rest);
        let discard = self.ask(
            &mut plugin,
            Tries::Twice,
            |f| f.discard(rest, kind),
            |plugin: &Plugin, extents: &Vec<Extent>, pending: &Pending| {
                let reach = |slot| self.files.reach(slot);
                plugin
                    .verifier
                    .extents(rest, extents, near, pending, &reach)
            },
        );
        let extents = discard.await.map_err(|e| e.errno())?;
        let end = extents.last().map_or(rest.end(), |e| e.range.end());
        let done = ByteRange::between(rest.offset(), end.min(rest.end()));
        self.map.invalidate(done);
        self.remember(&mut plugin, rest, &extents);
        Ok(done.end())
    }
}
