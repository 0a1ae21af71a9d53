//! Copying what lies in a backing node into the image, for `copy-on-read`.
//!
//! The steps of an allocating write with the present content as payload, under the same range
//! locks: a guest's write comes before or after the copy, never in between.

use std::sync::Arc;

use crate::engine::background::Finish;
use crate::engine::buffer::Buf;
use crate::{ByteRange, Errno};

use super::Image;
use super::allocate::{FILL_MAX, STARTS_MAX};
use super::map::Place;
use super::turn::Uncommitted;

impl Image {
    /// Does the map say that nothing of the range lies in a backing node?
    pub(crate) fn is_all_here(&self, range: ByteRange) -> bool {
        let end = range.end().min(self.size());
        let mut at = range.offset();
        while at < end {
            let run = self.map.run(ByteRange::between(at, end));
            if matches!(run.place, Place::Unknown | Place::Backing(_)) {
                return false;
            }
            at += run.len;
        }
        true
    }

    /// Copies what of the range lies in a backing node. Begun, it runs to its end.
    pub(crate) async fn copy_up_whole(self: &Arc<Self>, range: ByteRange) -> Result<(), Errno> {
        let image = self.clone();
        Finish::new(async move { image.with_space(|| image.copy_up(range)).await }).await
    }

    async fn copy_up(self: &Arc<Self>, range: ByteRange) -> Result<(), Errno> {
        let _pass = self.enter_writing().await?;
        let end = range.end().min(self.size());
        let mut at = range.offset();
        while at < end {
            let run = self.known_run(ByteRange::between(at, end)).await?;
            let part = ByteRange::between(at, at + run.len.min(FILL_MAX));
            at = match run.place {
                Place::Backing(_) => at + self.copy_part(part).await?,
                _ => at + run.len,
            };
        }
        Ok(())
    }

    /// Copies a front part of a range that lay in the backing node a moment ago; returns its
    /// length.
    async fn copy_part(self: &Arc<Self>, part: ByteRange) -> Result<u64, Errno> {
        let cluster = u64::from(self.geometry.cluster_size);
        let _guard = self.locks.lock(part.align_out(cluster)).await;
        for _ in 0..STARTS_MAX {
            let run = self.known_run(part).await?;
            if !matches!(run.place, Place::Backing(_)) {
                // Somebody wrote there meanwhile.
                return Ok(run.len);
            }
            let part = ByteRange::between(part.offset(), part.offset() + run.len);
            let content = Buf::zeroed(part.len() as usize);
            self.read_inside(part.offset(), content.io()).await?;
            match self.allocate_locked(part, &content.io()).await {
                Err(Uncommitted::Stale) => self.writable_now()?,
                Err(Uncommitted::Failed(e)) => return Err(e),
                Ok(done) => return Ok(done),
            }
        }
        Err(Errno::Io)
    }
}
