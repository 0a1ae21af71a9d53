//! How long a node is made: by an image that grows in it, and by `block_resize`.
//!
//! On an iothread; whoever resizes holds the node's other users off.

use std::sync::atomic::Ordering;

use super::{Kind, Node, NodeFuture, refused};
use crate::engine::background::Finish;
use crate::file::HostFile;
use crate::{Errno, Error, ErrorKind, Result};

/// What images are made of, to those who see them as disks.
const SECTOR: u64 = 512;

impl Node {
    /// The node is at least `len` bytes long.
    pub(crate) fn grow_to(&self, len: u64) -> NodeFuture<'_, ()> {
        if len <= self.len_bytes() {
            return Box::pin(std::future::ready(Ok(())));
        }
        let work = self.grow(len);
        Box::pin(async move {
            work.await?;
            self.bitmaps.resize(self.size());
            Ok(())
        })
    }

    fn grow(&self, len: u64) -> NodeFuture<'_, ()> {
        match &self.kind {
            Kind::File(file) => Box::pin(file.grow(len)),
            Kind::Raw(raw) if raw.now().size.is_none() => {
                let window = raw.get();
                Box::pin(async move {
                    let len = len.checked_add(window.offset).ok_or(Errno::Inval)?;
                    window.child.grow_to(len).await
                })
            }
            Kind::Null { size, .. } => {
                size.fetch_max(len, Ordering::AcqRel);
                Box::pin(std::future::ready(Ok(())))
            }
            Kind::Filter(filter) => Box::pin(async move { filter.child().1.grow_to(len).await }),
            Kind::Raw(_) | Kind::Image(_) | Kind::Remote(_) => refused(Errno::NotSup),
        }
    }

    /// Change the length of what holds an image.
    pub(crate) fn resize_storage(&self, len: u64) -> NodeFuture<'_, ()> {
        let work = self.set_storage(len);
        Box::pin(async move {
            work.await?;
            self.bitmaps.resize(self.size());
            Ok(())
        })
    }

    fn set_storage(&self, len: u64) -> NodeFuture<'_, ()> {
        match &self.kind {
            Kind::File(file) => Box::pin(file.set_len(len)),
            Kind::Raw(raw) if raw.now().size.is_none() => {
                let window = raw.get();
                Box::pin(async move {
                    let len = len.checked_add(window.offset).ok_or(Errno::Inval)?;
                    window.child.resize_storage(len).await
                })
            }
            Kind::Null { size, .. } => {
                size.store(len, Ordering::Release);
                Box::pin(std::future::ready(Ok(())))
            }
            Kind::Filter(filter) => {
                Box::pin(async move { filter.child().1.resize_storage(len).await })
            }
            Kind::Raw(_) | Kind::Image(_) | Kind::Remote(_) => refused(Errno::NotSup),
        }
    }

    /// Whether it can have bytes up to `end`; a device is asked again before the answer is no.
    pub(crate) fn holds(&self, end: u64) -> bool {
        let fits = || self.len_max().is_none_or(|max| end <= max);
        fits() || {
            self.with_file(HostFile::ask_device);
            fits()
        }
    }

    /// Does this to the file that the node shows, if it shows one.
    pub(super) fn with_file(&self, work: fn(&HostFile)) {
        match &self.kind {
            Kind::File(file) => work(file),
            Kind::Raw(raw) => raw.now().child.with_file(work),
            Kind::Filter(filter) => filter.child().1.with_file(work),
            Kind::Null { .. } | Kind::Image(_) | Kind::Remote(_) => {}
        }
    }

    /// How long the node can become by what is written to it and by growing; `None`: as long as
    /// its file system has it.
    pub(crate) fn len_max(&self) -> Option<u64> {
        match &self.kind {
            Kind::File(file) => file.is_device().then(|| file.len()),
            Kind::Raw(raw) => {
                let window = raw.now();
                let child = window.child.len_max();
                let rest = child.map(|max| max.saturating_sub(window.offset));
                match (window.size, rest) {
                    (Some(size), Some(rest)) => Some(size.min(rest)),
                    (size, rest) => size.or(rest),
                }
            }
            Kind::Null { .. } => None,
            Kind::Filter(filter) => filter.child().1.len_max(),
            Kind::Image(_) | Kind::Remote(_) => Some(self.size()),
        }
    }

    /// Does a write past the end make the node longer? True of files, and of what shows all of one.
    #[must_use]
    pub fn grows_by_writing(&self) -> bool {
        match &self.kind {
            Kind::File(file) => !file.is_device(),
            Kind::Raw(raw) => {
                let window = raw.now();
                window.size.is_none() && window.child.grows_by_writing()
            }
            Kind::Filter(_) | Kind::Null { .. } | Kind::Image(_) | Kind::Remote(_) => false,
        }
    }

    /// Any length, for clients to whom the node is a file; images take whole sectors and round up.
    ///
    /// # Errors
    /// `Perm` on a read-only node, `NotSup` where the length is given, `FBig` if a bitmap cannot
    /// follow, what file or format say.
    pub async fn set_len(&self, len: u64) -> std::result::Result<(), Errno> {
        if self.bitmaps.too_small_for(len).is_some() {
            return Err(Errno::FBig);
        }
        self.set_any_len(len).await?;
        self.bitmaps.resize(self.size());
        Ok(())
    }

    async fn set_any_len(&self, len: u64) -> std::result::Result<(), Errno> {
        match &self.kind {
            _ if self.refuses_writes() => Err(Errno::Perm),
            Kind::Image(image) => {
                let image = image.clone();
                let len = len.checked_next_multiple_of(SECTOR).ok_or(Errno::FBig)?;
                Finish::new(async move { image.resize(len).await })
                    .await
                    .map_err(|error| error.errno())
            }
            Kind::Filter(filter) => Box::pin(filter.child().1.set_len(len)).await,
            _ if self.ends_in_nothing() => Err(Errno::NotSup),
            _ => self.resize_storage(len).await,
        }
    }

    /// At least this length: nobody who grows it too is undone. The caller keeps others from
    /// making it shorter meanwhile.
    ///
    /// # Errors
    /// As [`Node::set_len`].
    pub async fn extend(&self, len: u64) -> std::result::Result<(), Errno> {
        if self.bitmaps.too_small_for(len).is_some() {
            return Err(Errno::FBig);
        }
        self.extend_any(len).await?;
        self.bitmaps.resize(self.size());
        Ok(())
    }

    async fn extend_any(&self, len: u64) -> std::result::Result<(), Errno> {
        match &self.kind {
            _ if self.refuses_writes() => Err(Errno::Perm),
            Kind::Image(image) => {
                let image = image.clone();
                let len = len.checked_next_multiple_of(SECTOR).ok_or(Errno::FBig)?;
                Finish::new(async move { image.extend(len).await })
                    .await
                    .map_err(|error| error.errno())
            }
            Kind::Filter(filter) => Box::pin(filter.child().1.extend(len)).await,
            _ if self.ends_in_nothing() => Err(Errno::NotSup),
            _ => self.grow_to(len).await,
        }
    }

    /// `block_resize`.
    ///
    /// # Errors
    /// Read-only, a fixed window, a bitmap that cannot follow, or what file or format say.
    pub async fn resize(&self, len: u64) -> Result<()> {
        if let Some(bitmap) = self.bitmaps.too_small_for(len) {
            let name = bitmap.name();
            let message = format!("Bitmap '{name}' would have too many granules; remove it first");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.resize_in_words(len).await?;
        self.bitmaps.resize(self.size());
        Ok(())
    }

    async fn resize_in_words(&self, len: u64) -> Result<()> {
        if self.refuses_writes() {
            return Err(Error::new(ErrorKind::Invalid, "Image is read-only"));
        }
        match &self.kind {
            Kind::Image(image) => {
                let image = image.clone();
                Finish::new(async move { image.resize(len).await })
                    .await
                    .map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()))
            }
            Kind::Filter(filter) => Box::pin(filter.child().1.resize(len)).await,
            // A server's length is the server's; like QEMU, do not insist on less.
            Kind::Remote(remote) if len > remote.len() => {
                Err(Error::new(ErrorKind::Unsupported, "Cannot grow NBD nodes"))
            }
            Kind::Remote(_) => Ok(()),
            Kind::Raw(raw) if raw.now().size.is_some() => Err(Error::new(
                ErrorKind::Unsupported,
                "Cannot resize a raw node with a fixed 'size'",
            )),
            _ if self.ends_in_nothing() => Err(Error::new(
                ErrorKind::Unsupported,
                "Image format driver does not support resize",
            )),
            _ => self
                .resize_storage(len)
                .await
                .map_err(|e| Error::new(ErrorKind::Io, format!("Failed to resize the image: {e}"))),
        }
    }

    /// Whether it is a null node, or a window of one: those keep the length they were given.
    fn ends_in_nothing(&self) -> bool {
        match &self.kind {
            Kind::Null { .. } => true,
            Kind::Raw(raw) => raw.now().child.ends_in_nothing(),
            _ => false,
        }
    }
}
