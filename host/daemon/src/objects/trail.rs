//! Where a file's name leads, and the kernel's word that it may lead elsewhere now.
//!
//! ```text
//! /etc/rules/list    / for "etc", /etc for "rules", /etc/rules for "list",
//!   -> ..data/list              /etc/rules for "..data" and for "..one",
//!        -> ..one               /etc/rules/..one for "list", and the file found there
//! ```
//!
//! Laid on a thread that may block, listened to on the control thread; all watches are of one
//! inotify instance. Invariant: a folder is watched before anything is looked up in it, and the
//! file before it is read, so that no change after that is missed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// Room for what the kernel tells at once: each event has a name of up to 255 bytes.
const EVENTS_BYTES: usize = 4096;

/// The kernel follows as many links in a name.
const LINKS_MAX: usize = 40;

/// The number of the event that says that events were lost.
const LOST: i32 = -1;

/// What changes where a name in a folder leads.
const FOLDER: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MASK_ADD)
    .union(WatchFlags::ONLYDIR);

/// What changes a file, or who may read it.
const CONTENT: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::MASK_ADD);

/// What was watched on the way to a file.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// By watch: the names that were looked up there; none for the file itself.
    watches: BTreeMap<i32, BTreeSet<OsString>>,
    /// The last folder's watch failed: what happens there goes unseen.
    pub(super) unwatched: Option<io::Error>,
    /// Some watch failed.
    pub(super) has_gaps: bool,
}

impl Trail {
    /// Watches the way to a file, as far as there is one. May block.
    pub(super) fn lay(fd: &OwnedFd, path: &Path) -> Self {
        let mut trail = Self::default();
        let mut left = parts(path);
        let mut at = PathBuf::new();
        let mut links = 0;
        while let Some(part) = left.pop_front() {
            if part == "/" {
                at.push(part);
                continue;
            }
            trail.folder(fd, &at, &part);
            at.push(part);
            match std::fs::read_link(&at) {
                Ok(_) if links == LINKS_MAX => return trail,
                Ok(target) => {
                    links += 1;
                    at.pop();
                    let mut parts = parts(&target);
                    parts.append(&mut left);
                    left = parts;
                }
                // It is no link.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                // There is nothing; the folder tells when that changes.
                Err(_) => return trail,
            }
        }
        match inotify::add_watch(fd, &at, CONTENT) {
            Ok(watch) => drop(trail.watches.entry(watch).or_default()),
            Err(_) => trail.has_gaps = true,
        }
        trail
    }

    fn folder(&mut self, fd: &OwnedFd, folder: &Path, name: &OsStr) {
        let folder = match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        };
        self.unwatched = match inotify::add_watch(fd, folder, FOLDER) {
            Ok(watch) => {
                let names = self.watches.entry(watch).or_default();
                names.insert(name.to_owned());
                None
            }
            Err(error) => {
                self.has_gaps = true;
                Some(error.into())
            }
        };
    }

    /// Whether an event is about the way or the file.
    fn has(&self, watch: i32, name: Option<&OsStr>) -> bool {
        let Some(names) = self.watches.get(&watch) else {
            // Events that were lost may have been about it.
            return watch == LOST;
        };
        name.is_none_or(|name| names.contains(name))
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let parts = path.components().map(|part| part.as_os_str().to_owned());
    parts.collect()
}

/// A trail that is listened to.
#[derive(Debug)]
pub(super) struct Listener {
    fd: AsyncFd<OwnedFd>,
    trail: Trail,
}

impl Listener {
    /// Hears nothing before it has a trail. Call on the thread that will listen.
    ///
    /// # Errors
    /// The system's: there are too many.
    pub(super) fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            fd: outport_block::engine::register(fd)?,
            trail: Trail::default(),
        })
    }

    /// What to lay a trail with.
    ///
    /// # Errors
    /// The system's: no descriptor is left.
    pub(super) fn fd(&self) -> io::Result<OwnedFd> {
        self.fd.get_ref().try_clone()
    }

    /// From now on this trail counts. Watches of the old one that are not part of it go.
    pub(super) fn set(&mut self, trail: Trail) {
        let old = std::mem::replace(&mut self.trail, trail).watches;
        for watch in old.into_keys() {
            if !self.trail.watches.contains_key(&watch) {
                // One whose folder is gone went with it.
                let _ = inotify::remove_watch(&self.fd, watch);
            }
        }
    }

    pub(super) fn trail(&self) -> &Trail {
        &self.trail
    }

    /// Waits until something has changed on the trail.
    pub(super) async fn changed(&self) {
        loop {
            let Ok(mut ready) = self.fd.readable().await else {
                // The thread ends.
                return std::future::pending().await;
            };
            let changed = self.take_events();
            ready.clear_ready();
            if changed {
                return;
            }
        }
    }

    /// Takes all events; whether one was about the trail.
    fn take_events(&self) -> bool {
        let mut room = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut reader = inotify::Reader::new(self.fd.get_ref(), &mut room);
        let mut changed = false;
        while let Ok(event) = reader.next() {
            let name = event.file_name();
            let name = name.map(|name| OsStr::from_bytes(name.to_bytes()));
            changed |= self.trail.has(event.wd(), name);
        }
        changed
    }
}
