//! File systems that this process serves itself.
//!
//! Any thread. A node over a file of one of them would wait, on an iothread, for an answer of
//! that same iothread. Invariant: a file system is listed from when it is mounted until it is
//! gone.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

/// `major:minor` of each.
static SERVED: Mutex<Vec<(u32, u32)>> = Mutex::new(Vec::new());

/// A file system that is listed; dropped when it is gone.
#[derive(Debug)]
pub struct Served((u32, u32));

impl Served {
    /// `major:minor`.
    #[must_use]
    pub const fn device(&self) -> (u32, u32) {
        self.0
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let mut served = SERVED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = served.iter().position(|device| *device == self.0) {
            served.swap_remove(at);
        }
    }
}

/// Lists a file system.
#[must_use]
pub fn serve(device: (u32, u32)) -> Served {
    let mut served = SERVED.lock().unwrap_or_else(PoisonError::into_inner);
    served.push(device);
    Served(device)
}

/// Is it listed?
#[must_use]
pub fn is_served(device: (u32, u32)) -> bool {
    let served = SERVED.lock().unwrap_or_else(PoisonError::into_inner);
    served.contains(&device)
}

/// Does the path lead to a file of such a file system? Asks nobody who serves one.
pub(super) fn leads_to_served(path: &Path) -> bool {
    let any = !SERVED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_empty();
    any && device_of(path).is_some_and(is_served)
}

fn device_of(path: &Path) -> Option<(u32, u32)> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(fd, c"", flags, StatxFlags::TYPE).ok()?;
    Some((stat.stx_dev_major, stat.stx_dev_minor))
}
