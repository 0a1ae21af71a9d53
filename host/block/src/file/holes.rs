//! Where a file has holes, as its file system says.
//!
//! Any thread. Each look is a system call or two, a fraction of a microsecond on a local file
//! system. Where data was found is remembered, so that reads of a file without holes need no call.
//! Invariant: a hole is never remembered. What is remembered may be old: then a hole is taken for
//! data, which is read as the zeroes that it holds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};

use crate::node::Front;
use crate::{ByteRange, Errno};

use super::HostFile;

/// A look that took longer went to a disk or over a network.
const SLOW: Duration = Duration::from_millis(1);

/// After a slow look, reads do without for so long.
const SLOW_PENALTY_MS: u64 = 1000;

/// Data that was found last, and when there is no looking.
///
/// Both ends of the range are read and written on their own: a range of two halves is old, which
/// is no harm.
#[derive(Debug, Default)]
pub(super) struct Data {
    start: AtomicU64,
    end: AtomicU64,
    slow_until: AtomicU64,
}

impl Data {
    /// How many of the bytes from the start of `range` are known to be data.
    fn known(&self, range: ByteRange) -> u64 {
        let (start, end) = (&self.start, &self.end);
        if start.load(Ordering::Relaxed) > range.offset() {
            return 0;
        }
        let end = end.load(Ordering::Relaxed).min(range.end());
        end.saturating_sub(range.offset())
    }

    fn remember(&self, data: ByteRange) {
        self.start.store(data.offset(), Ordering::Relaxed);
        self.end.store(data.end(), Ordering::Relaxed);
    }

    /// There may be holes now.
    pub(super) fn forget(&self) {
        self.end.store(0, Ordering::Relaxed);
    }
}

impl HostFile {
    /// Does the range begin with a hole, and how far does that go? Not asked of a file system that
    /// was slow to answer a moment ago.
    pub(crate) fn front(&self, range: ByteRange) -> Front {
        if self.0.device {
            return Front::data(range.len());
        }
        let data = &self.0.data;
        match data.known(range) {
            0 => {}
            len => return Front::data(len),
        }
        let slow_until = data.slow_until.load(Ordering::Relaxed);
        if slow_until != 0 && self.0.now_ms() < slow_until {
            return Front::data(range.len());
        }
        let before = Instant::now();
        let front = self.look(range);
        if before.elapsed() > SLOW {
            let until = self.0.now_ms() + SLOW_PENALTY_MS;
            data.slow_until.store(until, Ordering::Relaxed);
        }
        front
    }

    /// The data that ends the hole is remembered, since it is asked for next.
    fn look(&self, range: ByteRange) -> Front {
        let start = match seek(&self.0.fd, SeekFrom::Data(range.offset())) {
            Ok(start) => start,
            // There is none up to the end of the file, and zeroes behind it.
            Err(rustix::io::Errno::NXIO) => return Front::zero(range.len()),
            Err(_) => return Front::data(range.len()),
        };
        if start >= range.end() {
            return Front::zero(range.len());
        }
        let end = seek(&self.0.fd, SeekFrom::Hole(start)).unwrap_or(range.end());
        self.0.data.remember(ByteRange::between(start, end));
        if start > range.offset() {
            return Front::zero(start - range.offset());
        }
        let len = end.saturating_sub(start).clamp(1, range.len());
        Front::data(len)
    }

    /// The next data at or after `offset`; `None`: only a hole to the end.
    pub fn next_data(&self, offset: u64) -> std::result::Result<Option<ByteRange>, Errno> {
        let len = self.len();
        if offset >= len {
            return Ok(None);
        }
        if self.0.device {
            return Ok(Some(ByteRange::between(offset, len)));
        }
        let start = match seek(&self.0.fd, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(_) => return Ok(Some(ByteRange::between(offset, len))),
        };
        let end = seek(&self.0.fd, SeekFrom::Hole(start)).unwrap_or(len);
        Ok(Some(ByteRange::between(start, end.max(start + 1))))
    }
}
