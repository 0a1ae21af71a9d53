//! The exported file: what it looks like, who has it open, how long it is.
//!
//! Shared by all queues of an export. Invariant: whoever has the file open is a user of the
//! export, until the kernel says that the last descriptor of that open is gone or the
//! connection ends.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outport_block::file::HostFile;
use outport_block::{ByteRange, Errno, Node};

use super::passthrough::Passthrough;
use super::request::Request;
use super::wire::{Attr, AttrOut, ROOT, SetFlags, SetattrIn};
use crate::export::{Export, ExportUser};

/// `stat` counts in these, whatever blocks there are.
const BLOCK: u64 = 512;

/// Bits of a mode that are about the owner.
const OWNER_BITS: u32 = 0o700;
/// Bits of a mode that can be set.
const MODE_BITS: u32 = 0o7777;

/// A change of length that somebody else must permit.
pub type Resizing = Pin<Box<dyn Future<Output = Result<(), Errno>> + Send>>;

/// Changes the length of a node on which the export has no permission to do so for good.
pub type Resizer = Box<dyn Fn(u64) -> Resizing + Send + Sync>;

/// What `block-export-add` says of the file.
#[derive(Debug, Default)]
pub struct FileOptions {
    /// Writes past the end make it longer.
    pub growable: bool,
    /// The kernel may read this file itself; see [`super::identity`].
    pub passthrough: Option<HostFile>,
}

/// The file.
pub(super) struct File {
    export: Arc<Export>,
    growable: bool,
    pub(super) passthrough: Option<Passthrough>,
    allow_other: bool,
    resizer: Resizer,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    /// When it was changed last, in nanoseconds since the epoch.
    changed: AtomicU64,
    /// Where it ends, of a growable image: those are made of sectors, and end in the last one.
    end: AtomicU64,
    opens: Mutex<Opens>,
    /// Whoever changes the length, and whoever writes beyond it where that needs more than
    /// writing.
    pub(super) tail: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Opens {
    made: u64,
    users: BTreeMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    _user: ExportUser,
    /// Whoever may open it so may change it.
    writes: bool,
}

impl File {
    pub(super) fn new(
        export: Arc<Export>,
        options: FileOptions,
        allow_other: bool,
        resizer: Resizer,
    ) -> Self {
        let mode = if export.is_writable() { 0o600 } else { 0o400 };
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        Self {
            growable: options.growable && export.is_writable(),
            passthrough: options.passthrough.map(Passthrough::new),
            allow_other,
            resizer,
            mode: AtomicU32::new(mode),
            uid: AtomicU32::new(uid.as_raw()),
            gid: AtomicU32::new(gid.as_raw()),
            changed: AtomicU64::new(now()),
            end: AtomicU64::new(export.node().len_bytes()),
            opens: Mutex::default(),
            tail: tokio::sync::Mutex::new(()),
            export,
        }
    }

    pub(super) const fn export(&self) -> &Arc<Export> {
        &self.export
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        self.export.node()
    }

    pub(super) const fn is_growable(&self) -> bool {
        self.growable
    }

    /// Where it ends. A file that can grow, or that the kernel reads, has the length that was
    /// written; a disk has whole sectors, as everywhere else in QEMU.
    pub(super) fn len(&self) -> u64 {
        let len = self.node().len_bytes();
        if self.passthrough.is_some() || self.growable && self.node().grows_by_writing() {
            return len;
        }
        if !self.growable {
            return self.node().size();
        }
        let end = self.end.load(Ordering::Acquire);
        // Otherwise somebody else resized the node.
        let in_last_sector = end <= len && len - end < BLOCK;
        if in_last_sector { end } else { len }
    }

    /// It was written up to here.
    pub(super) fn reached(&self, end: u64) {
        self.end.fetch_max(end, Ordering::AcqRel);
    }

    /// Content or length changed now.
    pub(super) fn touch(&self) {
        self.changed.store(now(), Ordering::Relaxed);
    }

    /// For GETATTR: old as soon as it is told, since others may resize the node.
    pub(super) fn attributes(&self) -> AttrOut {
        let changed = Duration::from_nanos(self.changed.load(Ordering::Relaxed));
        let (seconds, nanos) = (changed.as_secs(), changed.subsec_nanos());
        let size = self.len();
        let attr = Attr {
            ino: ROOT,
            size,
            blocks: allocated(self.node()).unwrap_or_else(|| size.div_ceil(BLOCK)),
            atime: seconds,
            mtime: seconds,
            ctime: seconds,
            atimensec: nanos,
            mtimensec: nanos,
            ctimensec: nanos,
            mode: libc::S_IFREG | self.mode.load(Ordering::Relaxed),
            nlink: 1,
            uid: self.uid.load(Ordering::Relaxed),
            gid: self.gid.load(Ordering::Relaxed),
            rdev: 0,
            blksize: self.node().preferred_io(),
            flags: 0,
        };
        AttrOut {
            attr,
            ..AttrOut::default()
        }
    }

    /// Carries out all of SETATTR but a change of length; nothing if some of it is refused.
    pub(super) fn set_attributes(&self, set: &SetattrIn) -> Result<(), i32> {
        let flags = SetFlags::from_bits_retain(set.valid);
        let times = SetFlags::ATIME | SetFlags::MTIME | SetFlags::ATIME_NOW | SetFlags::MTIME_NOW;
        let owner = SetFlags::UID | SetFlags::GID;
        if flags.intersects(times) && !flags.contains(SetFlags::SIZE) {
            return Err(libc::EOPNOTSUPP);
        }
        if flags.intersects(owner) && !self.allow_other {
            return Err(libc::EOPNOTSUPP);
        }
        let mode = set.mode & MODE_BITS;
        if flags.contains(SetFlags::MODE) && mode & !OWNER_BITS != 0 && !self.allow_other {
            return Err(libc::EPERM);
        }
        if flags.contains(SetFlags::MODE) {
            self.mode.store(mode, Ordering::Relaxed);
        }
        if flags.contains(SetFlags::UID) {
            self.uid.store(set.uid, Ordering::Relaxed);
        }
        if flags.contains(SetFlags::GID) {
            self.gid.store(set.gid, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Somebody opens it, who may write or may not; the number names that open.
    pub(super) fn open(&self, who: &Request, writes: bool) -> Result<u64, Errno> {
        let user = self.export.enter().map_err(|_| Errno::Shutdown)?;
        let (uid, gid, pid) = (who.uid, who.gid, who.pid);
        tracing::debug!(export = self.export.id(), uid, gid, pid, "file opened");
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        opens.made += 1;
        let handle = opens.made;
        let open = Open {
            _user: user,
            writes,
        };
        opens.users.insert(handle, open);
        Ok(handle)
    }

    /// Was it opened by somebody who may write?
    pub(super) fn may_write(&self, handle: u64) -> bool {
        let opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        opens.users.get(&handle).is_some_and(|open| open.writes)
    }

    /// The last descriptor of that open is gone.
    pub(super) fn release(&self, handle: u64) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        opens.users.remove(&handle);
    }

    /// The connection ended: nobody has it open.
    pub(super) fn release_all(&self) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        opens.users.clear();
    }

    /// Truncates it to nothing. A disk keeps its length, whoever treats it as if it were a file,
    /// but what was in it is gone: programs that copy sparse files skip what they believe is zero.
    pub(super) async fn clear(&self) -> Result<(), Errno> {
        if self.growable {
            return self.set_len(0).await;
        }
        let all = ByteRange::between(0, self.len());
        self.node().write_zeroes(all, true).await?;
        self.touch();
        self.write_through().await
    }

    /// A change is durable before it is answered, where the export was asked for that.
    pub(super) async fn write_through(&self) -> Result<(), Errno> {
        match self.export().options().writethrough {
            true => self.node().flush().await,
            false => Ok(()),
        }
    }

    /// Changes the length, whatever it is.
    pub(super) async fn set_len(&self, len: u64) -> Result<(), Errno> {
        let _alone = self.tail.lock().await;
        if self.growable {
            self.node().set_len(len).await?;
            self.end.store(len, Ordering::Release);
            // What is left of the last sector would come back when the file grows.
            let rest = ByteRange::between(len, self.node().len_bytes());
            if !rest.is_empty() {
                self.node().write_zeroes(rest, false).await?;
            }
        } else {
            (self.resizer)(len).await?;
        }
        self.touch();
        self.write_through().await
    }

    /// Makes it at least so long.
    pub(super) async fn extend(&self, len: u64) -> Result<(), Errno> {
        let _alone = self.tail.lock().await;
        if len <= self.len() {
            return Ok(());
        }
        if self.growable {
            self.node().extend(len).await?;
        } else {
            (self.resizer)(len).await?;
        }
        self.touch();
        Ok(())
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// Blocks that the file at the bottom takes; `None` where there is none. The kernel counts no
/// blocks of a device, and a file of none is taken for a hole by archivers.
fn allocated(node: &Node) -> Option<u64> {
    if let Some(file) = node.host_file() {
        if file.is_device() {
            return None;
        }
        let stat = rustix::fs::fstat(file.as_fd()).ok()?;
        return u64::try_from(stat.st_blocks).ok();
    }
    allocated(&node.children().into_iter().next()?.1)
}
