//! Space for writes to come.

use super::{Kind, Node, NodeFuture};
use crate::{ByteRange, Errno};

impl Node {
    /// Takes space for the whole range now, so that writing there later needs none; content and
    /// length stay as they are.
    ///
    /// # Errors
    /// `NoSpc`, or `NotSup` where the storage has no such request: only writing tells there.
    pub fn reserve(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        match &self.kind {
            Kind::File(file) => Box::pin(file.reserve(range)),
            Kind::Raw(raw) => {
                let window = raw.get();
                Box::pin(async move {
                    let range = window.place(range)?;
                    window.child.reserve(range).await
                })
            }
            Kind::Null { .. } => Box::pin(std::future::ready(Ok(()))),
            Kind::Filter(filter) => Box::pin(async move { filter.child().1.reserve(range).await }),
            Kind::Image(_) | Kind::Remote(_) => super::refused(Errno::NotSup),
        }
    }
}
