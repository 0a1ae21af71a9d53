//! A file that is open in another way from now on, or left alone.
//!
//! Any thread; few at a time. Changes in flight end before, those that come meanwhile wait. Reads
//! go on: a read that `cache.direct` overtakes is aligned and tried again. Invariant: the number of
//! the descriptor never changes, so nobody who holds it has to be told.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;

use crate::engine::syscalls;
use crate::error::Result;

use super::open::{could_not_open, device_not_writable, direct_align};
use super::{HostFile, Inner};

/// What a file that is open can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode {
    /// Somebody may write.
    pub writable: bool,
    /// `cache.direct`.
    pub direct: bool,
    /// `cache.no-flush`.
    pub no_flush: bool,
    /// `discard=unmap`.
    pub unmap: bool,
}

impl Inner {
    /// The length of a device that somebody may have made longer.
    pub(super) fn len_again(&self) -> u64 {
        use rustix::fs::{SeekFrom, seek};
        // Nothing uses the position of this descriptor.
        if let Ok(len) = seek(&self.fd, SeekFrom::End(0)) {
            self.len.fetch_max(len, Ordering::AcqRel);
        }
        self.len()
    }
}

impl HostFile {
    /// How it is open now.
    #[must_use]
    pub fn mode(&self) -> FileMode {
        FileMode {
            writable: !self.is_read_only(),
            direct: self.0.is_direct(),
            no_flush: self.0.no_flush.load(Ordering::Acquire),
            unmap: self.0.unmap.load(Ordering::Acquire),
        }
    }

    /// Opens the same file in another way. What may be written stays so: who may not was refused
    /// before it came here.
    ///
    /// # Errors
    /// `Could not open 'PATH': REASON`, in QEMU's words; nothing changed then.
    pub async fn reopen(&self, mode: FileMode) -> Result<()> {
        let inner = &self.0;
        let failed = |e: std::io::Error| could_not_open(self.path(), &e);
        let _quiet = inner.changing.drain().await;
        if mode.writable && self.is_read_only() {
            // By number: the name may mean another file by now.
            let own = format!("/proc/self/fd/{}", self.as_fd().as_raw_fd());
            let open = OpenOptions::new().read(true).write(true).open(own);
            let file = open.map_err(failed)?;
            if syscalls::is_read_only_device(file.as_fd()) {
                return Err(device_not_writable());
            }
            inner.locks.move_to(self.as_fd(), file.as_fd())?;
            syscalls::replace(self.as_fd(), file.as_fd()).map_err(failed)?;
            inner.read_only.store(false, Ordering::Release);
            self.set_direct(inner.is_direct()).map_err(failed)?;
        }
        if mode.direct != inner.is_direct() {
            if mode.direct {
                // Requests are aligned from now on, before the kernel insists.
                self.align_for_direct(true);
            }
            let set = self.set_direct(mode.direct);
            if set.is_err() || !mode.direct {
                self.align_for_direct(false);
            }
            set.map_err(failed)?;
        }
        inner.no_flush.store(mode.no_flush, Ordering::Release);
        inner.unmap.store(mode.unmap, Ordering::Release);
        Ok(())
    }

    fn align_for_direct(&self, direct: bool) {
        let align = if direct {
            direct_align(self.as_fd())
        } else {
            1
        };
        self.0.align.store(align, Ordering::Release);
        self.0.direct.store(direct, Ordering::Release);
    }

    fn set_direct(&self, direct: bool) -> std::io::Result<()> {
        let mut flags = rustix::fs::fcntl_getfl(self.as_fd())?;
        flags.set(OFlags::DIRECT, direct);
        rustix::fs::fcntl_setfl(self.as_fd(), flags)?;
        Ok(())
    }

    /// Nothing is changed from now on: changes fail with EPERM. Those in flight have ended when
    /// this returns.
    pub(crate) async fn freeze(&self) {
        let _quiet = self.0.changing.drain().await;
        self.0.frozen.store(true, Ordering::Release);
    }

    /// Somebody else may have made it longer.
    pub(crate) fn look_again(&self) {
        if let Some(len) = self.len_now() {
            // Nobody else makes it shorter while it is ours, and we may be making it longer.
            self.0.len.fetch_max(len, Ordering::AcqRel);
        }
    }

    /// Asks for the length of a device, which somebody may have made longer.
    pub(crate) fn ask_device(&self) {
        if self.0.device {
            self.0.len_again();
        }
    }

    /// What the system says; devices are asked when somebody needs them to be longer.
    fn len_now(&self) -> Option<u64> {
        if self.0.device {
            return None;
        }
        let stat = rustix::fs::fstat(self.as_fd()).ok()?;
        u64::try_from(stat.st_size).ok()
    }

    /// It may be changed again, and somebody else may have changed it since.
    pub(crate) fn thaw(&self) {
        if let Some(len) = self.len_now() {
            self.0.len.store(len, Ordering::Release);
        }
        self.0.frozen.store(false, Ordering::Release);
    }
}
