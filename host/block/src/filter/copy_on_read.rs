//! `copy-on-read`: what is read from a backing node stays in the image.
//!
//! Any iothread. The image does the copying ([`crate::image::Image::copy_up`]), under the locks of
//! its own writes: a copy never undoes a write, also not one that comes by another way. Reads of
//! what is in the image already go straight through. A copy that fails (no space, say) does not
//! fail the read.

use std::sync::Arc;

use crate::engine::buffer::IoMem;
use crate::image::Image;
use crate::{ByteRange, Errno, Node};

use super::image_below;

/// The node.
#[derive(Debug)]
pub struct CopyOnRead {
    child: Arc<Node>,
    /// How deep below the child's own layer data may lie to be copied; `None`: anywhere.
    depth_max: Option<u32>,
}

impl CopyOnRead {
    /// A node before `child`. `depth_max`: data of so many layers is copied, the child's own
    /// being the first.
    #[must_use]
    pub const fn new(child: Arc<Node>, depth_max: Option<u32>) -> Self {
        Self { child, depth_max }
    }

    /// The node behind it.
    #[must_use]
    pub const fn child(&self) -> &Arc<Node> {
        &self.child
    }

    /// The image behind it, if it can take copies.
    fn image(&self) -> Option<Arc<Image>> {
        let image = image_below(&self.child)?;
        (image.is_writable() && image.backing().is_some()).then_some(image)
    }

    /// Is it known without waiting that nothing of the range is to be copied?
    pub(super) fn is_copied(&self, range: ByteRange) -> bool {
        self.image().is_none_or(|image| image.is_all_here(range))
    }

    pub(super) async fn read(&self, offset: u64, mem: IoMem) -> Result<(), Errno> {
        let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
        if let Some(image) = self.image()
            && !image.is_all_here(range)
            && let Err(errno) = self.copy(&image, range).await
        {
            tracing::debug!(range = ?range, %errno, "not copied on read");
        }
        self.child.read_mem(offset, mem).await
    }

    async fn copy(&self, image: &Arc<Image>, range: ByteRange) -> Result<(), Errno> {
        let end = range.end().min(image.size());
        let mut at = range.offset();
        while at < end {
            let status = self.child.status(ByteRange::between(at, end)).await?;
            let part = ByteRange::between(at, end.min(at + status.len));
            // Behind the end of the backing image there is nothing to keep.
            let past_end = image.backing().is_some_and(|below| at >= below.size());
            let deep = status.depth > 1 && !past_end;
            let wanted = deep && self.depth_max.is_none_or(|max| status.depth <= max);
            if wanted {
                image.copy_up_whole(part).await?;
            }
            at = part.end();
        }
        Ok(())
    }
}
