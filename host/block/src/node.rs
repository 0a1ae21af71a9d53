//! A node of the block graph: one thing that can be read and written.
//!
//! Shared by everyone who uses it, from any thread. `try_*` never wait and are
//! the hot path; the async forms do whatever it takes. A node is a closed enum:
//! a request goes down the graph by plain calls.

mod length;
mod mode;
mod room;
mod segment;
mod threshold;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::{Mark, NodeBitmaps};
use crate::engine::background::Finish;
use crate::engine::buffer::{Buf, IoMem, Iov, SharedMem};
use crate::file::HostFile;
use crate::filter::blkdebug::Event;
use crate::filter::throttle::Undrain;
use crate::filter::{Blkdebug, Filter, Throttle};
use crate::format::{Codec, DiscardKind};
use crate::image::Image;
use crate::remote::RemoteNode;
use crate::window::{RawWindow, Window};
use crate::{ByteRange, Errno, Result};

use mode::Mode;
pub use segment::{Ask, Front, Known, Segment, Status};
use threshold::Threshold;
pub use threshold::{Exceeded, ExceededSink};

/// A request in progress on a node.
pub type NodeFuture<'a, T> =
    Pin<Box<dyn Future<Output = std::result::Result<T, Errno>> + Send + 'a>>;

/// Zeroes are written in pieces of this size where nothing better is possible.
const ZERO_CHUNK: u64 = 2 << 20;

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// A host file or device.
    File(HostFile),
    /// A window of another node.
    Raw(RawWindow),
    /// Nothing: reads zeroes, swallows writes.
    Null {
        /// Its length.
        size: AtomicU64,
        /// Says that it reads as zeroes, so that nobody need transfer them.
        zeroes: bool,
    },
    /// Another node, with something done on the way.
    Filter(Box<Filter>),
    /// An image that a plugin understands.
    Image(Arc<Image>),
    /// Bytes that a server of some protocol keeps.
    Remote(RemoteNode),
}

/// One node.
#[derive(Debug)]
pub struct Node {
    name: String,
    driver: String,
    mode: Mode,
    threshold: Threshold,
    bitmaps: Arc<NodeBitmaps>,
    kind: Kind,
}

impl Kind {
    /// A window of `child`.
    #[must_use]
    pub fn raw(child: Arc<Node>, offset: u64, size: Option<u64>) -> Self {
        Self::Raw(RawWindow::new(Window {
            child,
            offset,
            size,
        }))
    }
}

impl Node {
    /// A node of this kind. `driver` is QEMU's word.
    #[must_use]
    pub fn new(name: &str, driver: &str, read_only: bool, kind: Kind) -> Arc<Self> {
        Self::with_discard(name, driver, read_only, true, kind)
    }

    /// The same; `unmap` tells whether discards reach it (`discard=unmap`) or
    /// are ignored.
    #[must_use]
    pub fn with_discard(
        name: &str,
        driver: &str,
        read_only: bool,
        unmap: bool,
        kind: Kind,
    ) -> Arc<Self> {
        let bitmaps = match &kind {
            // It has loaded those that it keeps.
            Kind::Image(image) => image.bitmaps().clone(),
            _ => Arc::default(),
        };
        Arc::new(Self {
            name: name.to_owned(),
            driver: driver.to_owned(),
            mode: Mode::new(read_only, unmap),
            threshold: Threshold::default(),
            bitmaps,
            kind,
        })
    }

    /// The node name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver, in QEMU's words.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// Its dirty bitmaps.
    #[must_use]
    pub const fn bitmaps(&self) -> &Arc<NodeBitmaps> {
        &self.bitmaps
    }

    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Exact length in bytes: the file's, not rounded.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match &self.kind {
            Kind::File(file) => file.len(),
            Kind::Raw(raw) => {
                let window = raw.now();
                let rest = || window.child.len_bytes().saturating_sub(window.offset);
                window.size.unwrap_or_else(rest)
            }
            Kind::Null { size, .. } => size.load(Ordering::Acquire),
            Kind::Filter(filter) => filter.child().1.len_bytes(),
            Kind::Image(image) => image.size(),
            Kind::Remote(remote) => remote.len(),
        }
    }

    /// Length that users see: rounded up to 512 bytes, as QEMU does.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len_bytes().div_ceil(512).saturating_mul(512)
    }

    /// Preferred I/O size: a cluster, or a page.
    #[must_use]
    pub fn preferred_io(&self) -> u32 {
        match &self.kind {
            Kind::File(file) => file.align().max(4096),
            Kind::Raw(raw) => raw.now().child.preferred_io(),
            Kind::Null { .. } => 4096,
            Kind::Filter(filter) => filter.child().1.preferred_io(),
            Kind::Image(image) => image.cluster_size().max(4096),
            Kind::Remote(remote) => remote.preferred_io(),
        }
    }

    /// Read without waiting; `None`: it would wait. Bytes past the end are
    /// zero.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<std::result::Result<(), Errno>> {
        Iov::fill(buf, |iov| self.try_read_iov(offset, iov))
    }

    /// The same into pieces, which may be a guest's.
    pub fn try_read_iov(
        &self,
        offset: u64,
        iov: Iov<'_>,
    ) -> Option<std::result::Result<(), Errno>> {
        match &self.kind {
            Kind::File(file) => file.try_read(offset, iov),
            Kind::Raw(raw) => {
                let window = raw.now();
                let (at, shown) = match window.shown(offset, iov.len() as u64) {
                    Ok(shown) => shown,
                    Err(e) => return Some(Err(e)),
                };
                let read = window.child.try_read_iov(at, iov.part(0, shown as usize));
                iov.part(shown as usize, iov.len() - shown as usize)
                    .fill_zero();
                read
            }
            Kind::Null { .. } => {
                iov.fill_zero();
                Some(Ok(()))
            }
            Kind::Filter(filter) => filter.try_read(offset, iov),
            Kind::Image(image) => image.try_read(offset, iov),
            Kind::Remote(_) => None,
        }
    }

    /// Write without waiting; `None`: it would wait, or needs space.
    pub fn try_write(&self, offset: u64, buf: &[u8]) -> Option<std::result::Result<(), Errno>> {
        Iov::drain(buf, |iov| self.try_write_iov(offset, iov))
    }

    /// The same from pieces, which may be a guest's.
    pub fn try_write_iov(
        &self,
        offset: u64,
        iov: Iov<'_>,
    ) -> Option<std::result::Result<(), Errno>> {
        if self.refuses_writes() {
            return Some(Err(Errno::Perm));
        }
        self.note_write(offset, iov.len() as u64);
        let written = match &self.kind {
            Kind::File(file) => file.try_write(offset, iov),
            Kind::Raw(raw) => {
                let window = raw.now();
                let range = ByteRange::new(offset, iov.len() as u64).ok_or(Errno::Inval);
                match range.and_then(|range| window.place(range)) {
                    Ok(range) => window.child.try_write_iov(range.offset(), iov),
                    Err(e) => Some(Err(e)),
                }
            }
            Kind::Null { .. } => Some(Ok(())),
            Kind::Filter(filter) => filter.try_write(offset, iov),
            Kind::Image(image) => image.try_write(offset, iov),
            Kind::Remote(_) => None,
        };
        if written.is_some() {
            let end = offset.saturating_add(iov.len() as u64);
            self.bitmaps.mark(ByteRange::between(offset, end));
        }
        written
    }

    /// Fill memory that others see from `offset`.
    pub fn read_shared(&self, offset: u64, mem: &SharedMem) -> NodeFuture<'_, ()> {
        self.read_mem(offset, mem.io())
    }

    /// Write memory that others see. `fua`: durable when done.
    pub fn write_shared(&self, offset: u64, mem: &SharedMem, fua: bool) -> NodeFuture<'_, ()> {
        self.write_mem(offset, mem.io(), fua)
    }

    /// Fill the buffer from `offset`; gives it back.
    ///
    /// # Errors
    /// The device's, or that of the format.
    pub async fn read(&self, offset: u64, buf: Buf) -> std::result::Result<Buf, Errno> {
        self.read_mem(offset, buf.io()).await?;
        Ok(buf)
    }

    /// Write the buffer. `fua`: durable when done.
    ///
    /// # Errors
    /// `Perm` on a read-only node; the device's or that of the format.
    pub async fn write(&self, offset: u64, buf: &Buf, fua: bool) -> std::result::Result<(), Errno> {
        self.write_mem(offset, buf.io(), fua).await
    }

    pub(crate) fn read_mem(&self, offset: u64, mut mem: IoMem) -> NodeFuture<'_, ()> {
        match &self.kind {
            Kind::File(file) => Box::pin(file.read(offset, mem)),
            Kind::Raw(raw) => {
                let window = raw.get();
                Box::pin(async move {
                    let (at, shown) = window.shown(offset, mem.len() as u64)?;
                    let (shown, len) = (shown as usize, mem.len());
                    mem.part(shown, len - shown).fill_zero();
                    let child = &window.child;
                    child.read_as(Event::READ_AIO, at, mem.part(0, shown)).await
                })
            }
            Kind::Null { .. } => Box::pin(async move {
                mem.fill_zero();
                Ok(())
            }),
            Kind::Filter(filter) => filter.read(offset, mem),
            Kind::Image(image) => {
                let image = image.clone();
                whole(async move { image.read(offset, mem).await })
            }
            Kind::Remote(remote) => Box::pin(remote.read(offset, mem)),
        }
    }

    pub(crate) fn write_mem(&self, offset: u64, mem: IoMem, fua: bool) -> NodeFuture<'_, ()> {
        if self.refuses_writes() {
            return refused(Errno::Perm);
        }
        self.note_write(offset, mem.len() as u64);
        let end = offset.saturating_add(mem.len() as u64);
        let mark = Mark::new(&self.bitmaps, ByteRange::between(offset, end));
        match &self.kind {
            Kind::File(file) => Box::pin(mark.after(file.write(offset, mem, fua))),
            Kind::Raw(raw) => {
                let window = raw.get();
                Box::pin(mark.after(async move {
                    let range = ByteRange::new(offset, mem.len() as u64).ok_or(Errno::Inval)?;
                    let at = window.place(range)?.offset();
                    let child = &window.child;
                    child.write_as(Event::WRITE_AIO, at, mem, fua).await
                }))
            }
            Kind::Null { .. } => Box::pin(mark.after(std::future::ready(Ok(())))),
            Kind::Filter(filter) => Box::pin(mark.after(filter.write(offset, mem, fua))),
            Kind::Image(image) => {
                let image = image.clone();
                whole(mark.after(async move { image.write(offset, mem, fua).await }))
            }
            Kind::Remote(remote) => Box::pin(mark.after(remote.write(offset, mem, fua))),
        }
    }

    // === for parents: a `blkdebug` child is told first what they are at ===

    pub(crate) fn read_as(&self, event: Event, offset: u64, mem: IoMem) -> NodeFuture<'_, ()> {
        match self.blkdebug() {
            None => self.read_mem(offset, mem),
            Some(debug) => Box::pin(async move {
                debug.fire(event).await;
                self.read_mem(offset, mem).await
            }),
        }
    }

    pub(crate) fn write_as(
        &self,
        event: Event,
        offset: u64,
        mem: IoMem,
        fua: bool,
    ) -> NodeFuture<'_, ()> {
        match self.blkdebug() {
            None => self.write_mem(offset, mem, fua),
            Some(debug) => Box::pin(async move {
                debug.fire(event).await;
                self.write_mem(offset, mem, fua).await
            }),
        }
    }

    pub(crate) fn flush_as_child(&self) -> NodeFuture<'_, ()> {
        match self.blkdebug() {
            None => self.flush(),
            Some(debug) => Box::pin(async move {
                debug.fire(Event::FLUSH_TO_OS).await;
                debug.fire(Event::FLUSH_TO_DISK).await;
                self.flush().await
            }),
        }
    }

    /// Write one cluster compressed.
    ///
    /// # Errors
    /// `NotSup` where no format is that compresses.
    pub async fn write_compressed(
        &self,
        offset: u64,
        buf: &Buf,
        codec: Codec,
    ) -> std::result::Result<(), Errno> {
        let end = offset.saturating_add(buf.len() as u64);
        let mark = || Mark::new(&self.bitmaps, ByteRange::between(offset, end));
        match &self.kind {
            _ if self.refuses_writes() => Err(Errno::Perm),
            Kind::Image(image) => {
                self.note_write(offset, buf.len() as u64);
                let (image, mem) = (image.clone(), buf.io());
                let write = async move { image.write_compressed(offset, mem, codec).await };
                whole(mark().after(write)).await
            }
            Kind::Filter(filter) => {
                let write = filter.write_compressed(offset, buf, codec);
                mark().after(write).await
            }
            _ => Err(Errno::NotSup),
        }
    }

    /// Everything acknowledged so far becomes durable.
    pub fn flush(&self) -> NodeFuture<'_, ()> {
        Box::pin(async move {
            match &self.kind {
                Kind::File(file) => file.flush().await,
                Kind::Raw(raw) => raw.get().child.flush_as_child().await,
                Kind::Null { .. } => Ok(()),
                Kind::Filter(filter) => filter.flush().await,
                Kind::Image(image) => {
                    let image = image.clone();
                    whole(async move { image.flush().await }).await
                }
                Kind::Remote(remote) => remote.flush().await,
            }
        })
    }

    /// The content of the range is not needed any more; a hint.
    pub fn discard(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        if self.refuses_writes() {
            return refused(Errno::Perm);
        }
        if !self.unmaps() {
            return Box::pin(std::future::ready(Ok(())));
        }
        let mark = Mark::new(&self.bitmaps, range);
        match &self.kind {
            Kind::File(file) => Box::pin(mark.after(file.discard(range))),
            Kind::Raw(raw) => {
                let window = raw.get();
                Box::pin(
                    mark.after(async move { window.child.discard(window.place(range)?).await }),
                )
            }
            // Nothing happens, and nothing is dirty.
            Kind::Null { .. } => {
                mark.forget();
                Box::pin(std::future::ready(Ok(())))
            }
            Kind::Filter(filter) => Box::pin(mark.after(filter.discard(range))),
            Kind::Image(image) => {
                let image = image.clone();
                whole(mark.after(async move {
                    image.discard(range, DiscardKind::Discard).await?;
                    Ok(())
                }))
            }
            Kind::Remote(remote) => Box::pin(mark.after(remote.discard(range))),
        }
    }

    /// The range reads as zeroes afterwards.
    pub fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> NodeFuture<'_, ()> {
        Box::pin(async move {
            match self.zero(range, may_unmap, false).await {
                Err(Errno::NotSup) => self.zero_slow(range).await,
                other => other,
            }
        })
    }

    /// The same, but `NotSup` if it would take as long as writing.
    pub fn zero_fast(&self, range: ByteRange, may_unmap: bool) -> NodeFuture<'_, ()> {
        self.zero(range, may_unmap, true)
    }

    /// `NotSup` where it takes as long as writing, or where that is not known and `fast` is set.
    pub(crate) fn zero(&self, range: ByteRange, may_unmap: bool, fast: bool) -> NodeFuture<'_, ()> {
        Box::pin(async move {
            if self.refuses_writes() {
                return Err(Errno::Perm);
            }
            self.note_write(range.offset(), range.len());
            let may_unmap = may_unmap && self.unmaps();
            let mark = Mark::new(&self.bitmaps, range);
            match &self.kind {
                Kind::File(file) => mark.after(file.zero(range, may_unmap)).await,
                Kind::Raw(raw) => {
                    let window = raw.get();
                    let range = window.place(range)?;
                    mark.after(window.child.zero(range, may_unmap, fast)).await
                }
                Kind::Null { .. } => Ok(()),
                Kind::Filter(filter) => mark.after(filter.zero(range, may_unmap, fast)).await,
                Kind::Image(image) => {
                    let kind = if may_unmap {
                        DiscardKind::ZeroUnmap
                    } else {
                        DiscardKind::ZeroKeep
                    };
                    let image = image.clone();
                    let work = mark.after(async move { image.discard(range, kind).await });
                    let rest = whole(work).await?;
                    if rest[0] == range && !range.is_empty() {
                        return Err(Errno::NotSup);
                    }
                    for part in rest {
                        self.zero_slow(part).await?;
                    }
                    Ok(())
                }
                Kind::Remote(remote) => mark.after(remote.zero(range, may_unmap, fast)).await,
            }
        })
    }

    async fn zero_slow(&self, range: ByteRange) -> std::result::Result<(), Errno> {
        if range.is_empty() {
            return Ok(());
        }
        let zeroes = Buf::zeroed(range.len().min(ZERO_CHUNK) as usize);
        let mut at = range.offset();
        while at < range.end() {
            let len = (range.end() - at).min(ZERO_CHUNK) as usize;
            self.write_mem(at, zeroes.io_part(0, len), false).await?;
            at += len as u64;
        }
        Ok(())
    }

    /// The range will be read soon; a hint, which only costs where bytes are far away.
    pub fn prefetch(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        match &self.kind {
            Kind::Raw(raw) => {
                let window = raw.get();
                Box::pin(async move { window.child.prefetch(window.place(range)?).await })
            }
            Kind::Filter(filter) => Box::pin(async move { filter.child().1.prefetch(range).await }),
            Kind::Remote(remote) => Box::pin(remote.prefetch(range)),
            _ => Box::pin(std::future::ready(Ok(()))),
        }
    }

    /// Allocation status of a front part of the range, which is not empty.
    pub fn status(&self, range: ByteRange) -> NodeFuture<'_, Status> {
        Box::pin(async move {
            let len = range.len();
            match &self.kind {
                Kind::File(file) => file_status(file, range),
                Kind::Raw(raw) => {
                    let window = raw.get();
                    let (at, shown) = window.shown(range.offset(), len)?;
                    if shown == 0 {
                        return Ok(nothing(len));
                    }
                    let range = ByteRange::new(at, shown).ok_or(Errno::Inval)?;
                    window.child.status(range).await
                }
                // As in QEMU, what neither is stored nor reads as zeroes is allocated nowhere.
                Kind::Null { zeroes, .. } => Ok(Status {
                    len,
                    data: !zeroes,
                    zero: *zeroes,
                    depth: u32::from(*zeroes),
                }),
                Kind::Filter(filter) => filter.status(range).await,
                Kind::Image(image) => image.status(range).await,
                Kind::Remote(remote) => remote.status(range).await,
            }
        })
    }

    /// The image, if this is a format node.
    #[must_use]
    pub const fn image(&self) -> Option<&Arc<Image>> {
        match &self.kind {
            Kind::Image(image) => Some(image),
            _ => None,
        }
    }

    /// The host file, if this is a file node.
    #[must_use]
    pub const fn host_file(&self) -> Option<&HostFile> {
        match &self.kind {
            Kind::File(file) => Some(file),
            _ => None,
        }
    }

    /// The rules, if this is a `blkdebug` node.
    #[must_use]
    pub fn blkdebug(&self) -> Option<&Blkdebug> {
        match &self.kind {
            Kind::Filter(filter) => match &**filter {
                Filter::Blkdebug(debug) => Some(debug),
                _ => None,
            },
            _ => None,
        }
    }

    /// The throttle, if this is a `throttle` node.
    #[must_use]
    pub fn throttle(&self) -> Option<&Arc<Throttle>> {
        match &self.kind {
            Kind::Filter(filter) => match &**filter {
                Filter::Throttle(throttle) => Some(throttle),
                _ => None,
            },
            _ => None,
        }
    }

    /// Where the bytes are, if this is a node of a protocol; QEMU's spelling.
    #[must_use]
    pub fn remote_name(&self) -> Option<String> {
        match &self.kind {
            Kind::Remote(remote) => Some(remote.name()),
            _ => None,
        }
    }

    /// Lets requests pass the limits at and below this node until the answer is dropped.
    #[must_use]
    pub fn drain_throttles(&self) -> Vec<Undrain> {
        let below = self.children().into_iter();
        let below = below.flat_map(|(_, child)| child.drain_throttles());
        self.throttle()
            .map(|it| it.drain())
            .into_iter()
            .chain(below)
            .collect()
    }

    /// Direct children with QEMU's child names.
    #[must_use]
    pub fn children(&self) -> Vec<(&'static str, Arc<Self>)> {
        match &self.kind {
            Kind::File(_) | Kind::Null { .. } | Kind::Remote(_) => Vec::new(),
            Kind::Raw(raw) => vec![("file", raw.now().child.clone())],
            Kind::Filter(filter) => {
                let (role, child) = filter.child();
                vec![(role, Arc::clone(&child))]
            }
            Kind::Image(image) => {
                let names = std::iter::once("file").chain(std::iter::repeat("data-file"));
                let storage = names.zip(image.storage());
                let backing = image.backing().map(|backing| ("backing", backing));
                storage.chain(backing).collect()
            }
        }
    }

    /// The daemon ends: a server that does not answer soon is given up.
    pub fn hurry(&self) {
        if let Kind::Remote(remote) = &self.kind {
            remote.hurry();
        }
    }

    /// Write everything back; the node is not used afterwards.
    ///
    /// # Errors
    /// What file or plugin said.
    pub async fn close(&self) -> Result<()> {
        match &self.kind {
            Kind::Image(image) => {
                let (image, name) = (image.clone(), self.name.clone());
                Finish::new(async move { image.close(&name).await }).await
            }
            Kind::Remote(remote) => {
                remote.close().await;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Runs to its end once it was begun.
fn whole<'a, T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, Errno>> + Send + 'static,
) -> NodeFuture<'a, T> {
    Box::pin(Finish::new(work))
}

fn refused<'a, T: Send + 'static>(errno: Errno) -> NodeFuture<'a, T> {
    Box::pin(std::future::ready(Err(errno)))
}

/// Zeroes that take no space.
const fn nothing(len: u64) -> Status {
    Status {
        len,
        data: false,
        zero: true,
        depth: 1,
    }
}

fn file_status(file: &HostFile, range: ByteRange) -> std::result::Result<Status, Errno> {
    let len = range.len();
    Ok(match file.next_data(range.offset())? {
        None => nothing(len),
        Some(data) if data.offset() > range.offset() => {
            nothing(len.min(data.offset() - range.offset()))
        }
        Some(data) => {
            let len = len.min(data.end() - range.offset());
            Status {
                len,
                data: true,
                zero: false,
                depth: 1,
            }
        }
    })
}
