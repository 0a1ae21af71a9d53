//! Image locks, as QEMU takes them: two processes do not write one image.
//!
//! A holder has two sets: what it does with the file (`perm`) and what it lets
//! others do (`shared`). For each permission that it uses it holds a shared
//! lock on byte `100 + i`, for each that it does not share one on `200 + i`
//! (open file description locks: they belong to this open, not to the process).
//! Nobody waits: who finds a lock in the way is told which permission it was.
//!
//! ```text
//!   take what is new -> look for others' locks -> give up what is old
//!                              | in the way
//!                              +--> give up what was new, error
//! ```

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use crate::engine::syscalls::{LockKind, is_locked_by_other, lock_byte};
use crate::error::{Error, ErrorKind, Result};
use crate::strerror;

use super::HostFile;

/// First of the bytes that say "I use this".
const USED_BASE: u64 = 100;

/// First of the bytes that say "nobody else may".
const UNSHARED_BASE: u64 = 200;

/// `locking` of the file driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; an error where it cannot.
    On,
    /// Never.
    Off,
}

/// A set of block permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    /// None at all.
    pub const NONE: Self = Self(0);
    /// Read, and what is read makes sense.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Change the content.
    pub const WRITE: Self = Self(1 << 1);
    /// Write what is there already (a copy-on-read, a commit's source).
    pub const WRITE_UNCHANGED: Self = Self(1 << 2);
    /// Change the length.
    pub const RESIZE: Self = Self(1 << 3);
    /// Every one.
    pub const ALL: Self = Self(0xf);

    /// QEMU's words, by bit.
    const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

    /// Those of either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that this has and `other` has not.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// All of `other`?
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    fn bits(self) -> impl Iterator<Item = usize> {
        (0..Self::NAMES.len()).filter(move |i| self.0 & (1 << i) != 0)
    }
}

/// What this open file holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    used: Permissions,
    unshared: Permissions,
}

/// The locks of one open file.
#[derive(Debug)]
pub(super) struct Locks {
    wanted: bool,
    held: Mutex<Held>,
}

impl Locks {
    pub(super) fn new(locking: Locking, fd: BorrowedFd<'_>) -> Self {
        let wanted = match locking {
            Locking::On => true,
            Locking::Off => false,
            Locking::Auto => is_locked_by_other(fd, USED_BASE).is_ok(),
        };
        Self {
            wanted,
            held: Mutex::default(),
        }
    }

    /// The same locks on another open file, which takes the place of this one.
    pub(super) fn move_to(&self, old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<()> {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if self.wanted {
            take(new, Held::default(), held)?;
            release(old, held.used, held.unshared);
        }
        Ok(())
    }

    fn change(&self, fd: BorrowedFd<'_>, new: Held) -> Result<()> {
        if !self.wanted {
            return Ok(());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let old = *held;
        let result = take(fd, old, new).and_then(|()| look(fd, new));
        let keep = if result.is_ok() { new } else { old };
        release(
            fd,
            old.used.union(new.used).without(keep.used),
            old.unshared.union(new.unshared).without(keep.unshared),
        );
        *held = keep;
        result
    }
}

fn take(fd: BorrowedFd<'_>, old: Held, new: Held) -> Result<()> {
    let used = new.used.without(old.used).bits().map(|i| (USED_BASE, i));
    let unshared = new.unshared.without(old.unshared).bits();
    for (base, i) in used.chain(unshared.map(|i| (UNSHARED_BASE, i))) {
        let at = base + i as u64;
        lock_byte(fd, at, LockKind::Shared).map_err(|e| {
            let reason = strerror(e.raw_os_error().unwrap_or(libc::EIO));
            Error::new(
                ErrorKind::InUse,
                format!("Failed to lock byte {at}: {reason}"),
            )
        })?;
    }
    Ok(())
}

/// Is anyone in the way?
fn look(fd: BorrowedFd<'_>, new: Held) -> Result<()> {
    let found = |base: u64, i: usize| is_locked_by_other(fd, base + i as u64).unwrap_or(false);
    let in_use = |what: &str, i: usize| {
        let name = Permissions::NAMES[i];
        Error::new(
            ErrorKind::InUse,
            format!("Failed to get {what}\"{name}\" lock"),
        )
    };
    for i in new.used.bits() {
        if found(UNSHARED_BASE, i) {
            return Err(in_use("", i));
        }
    }
    for i in new.unshared.bits() {
        if found(USED_BASE, i) {
            return Err(in_use("shared ", i));
        }
    }
    Ok(())
}

fn release(fd: BorrowedFd<'_>, used: Permissions, unshared: Permissions) {
    let used = used.bits().map(|i| USED_BASE + i as u64);
    for at in used.chain(unshared.bits().map(|i| UNSHARED_BASE + i as u64)) {
        if let Err(e) = lock_byte(fd, at, LockKind::Unlock) {
            tracing::warn!(byte = at, reason = %e, "an image lock could not be given up");
        }
    }
}

impl HostFile {
    /// From now on this open file uses `used`, and lets other processes use
    /// `shared`. On an error nothing has changed. Closing gives all up.
    ///
    /// # Errors
    /// QEMU's sentences: `Failed to get "write" lock`,
    /// `Failed to get shared "write" lock`.
    pub fn set_permissions(&self, used: Permissions, shared: Permissions) -> Result<()> {
        let new = Held {
            used,
            unshared: Permissions::ALL.without(shared),
        };
        self.0.locks.change(self.as_fd(), new)
    }
}
