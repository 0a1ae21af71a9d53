//! The log of pages that we write while a guest migrates.
//!
//! The front-end shares a bitmap, one bit per page of guest memory ("Migration" of the protocol's
//! document). Any thread sets bits; nobody here clears them. What lies past the end of the log is
//! left out: the front-end chose its size.

use std::os::fd::OwnedFd;

use outport_block::Errno;

use super::limits::LOG_BYTES_MAX;
use super::memory::Area;

/// Bytes that one bit stands for.
const PAGE: u64 = 4096;

/// The bitmap.
#[derive(Debug)]
pub(super) struct DirtyLog(Area);

impl DirtyLog {
    /// Map it.
    ///
    /// # Errors
    /// `Inval`: longer than its file, or than any guest needs.
    pub(super) fn map(fd: OwnedFd, offset: u64, size: u64) -> Result<Self, Errno> {
        if size == 0 || size > LOG_BYTES_MAX {
            return Err(Errno::Inval);
        }
        Ok(Self(Area::of_file(fd, offset, size)?))
    }

    /// These bytes of guest memory were written.
    pub(super) fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        let end = self.0.len() as u64 * 8;
        let first = addr / PAGE;
        let last = (addr.saturating_add(last) / PAGE).min(end.saturating_sub(1));
        for page in first..=last {
            // Below `end`, which fits: it was the length of an area.
            self.0.or8((page / 8) as usize, 1 << (page % 8));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_that_is_touched_gets_its_bit() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&fd, 4).unwrap();
        let log = DirtyLog::map(fd.try_clone().unwrap(), 0, 4).unwrap();
        log.mark(0, 0);
        log.mark(PAGE - 1, 2);
        log.mark(9 * PAGE, 1);
        log.mark(31 * PAGE, u64::MAX);
        log.mark(u64::MAX, 1);
        let mut seen = [0; 4];
        rustix::io::pread(&fd, &mut seen, 0).unwrap();
        assert_eq!(seen, [3, 2, 0, 0x80]);
        assert!(DirtyLog::map(fd.try_clone().unwrap(), 0, 5).is_err());
        assert!(DirtyLog::map(fd, 0, 0).is_err());
    }
}
