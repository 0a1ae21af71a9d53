//! Rules in a file (`authz-list-file`), read again whenever the file changes.
//!
//! The folder is watched, because editors and tools replace files by renaming. Control thread; the
//! file itself is read elsewhere. Invariant: while the file does not hold rules, nobody gets in.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use outport_plugin::WasmPolicy;
use outport_qmp::types::qom::{AuthZListFileProperties, AuthZListProperties};
use outport_qmp::{Error, de, wire};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::authz::rules;
use super::secret::unread;

/// Room for what the kernel tells at once: each event has a name of up to 255 bytes.
const EVENTS_BYTES: usize = 4096;

/// What may have changed a file of the folder.
const CHANGES: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::MOVED_TO);

/// A file, and who is told what it says.
#[derive(Debug)]
pub(super) struct FileList {
    filename: String,
    policy: Arc<WasmPolicy>,
    watcher: RefCell<Option<AbortHandle>>,
}

/// A file that was read and is being watched, before there is anybody to tell.
#[derive(Debug)]
pub(super) struct Watched {
    filename: String,
    pub(super) first: AuthZListProperties,
    /// `None`: it is not read again.
    changes: Option<AsyncFd<OwnedFd>>,
}

impl Drop for FileList {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
    }
}

impl Watched {
    /// From now on `policy` is told what the file says.
    pub(super) fn keep(self, policy: Arc<WasmPolicy>) -> Rc<FileList> {
        let list = Rc::new(FileList {
            filename: self.filename,
            policy,
            watcher: RefCell::default(),
        });
        if let Some(changes) = self.changes {
            let task = tokio::task::spawn_local(follow(Rc::downgrade(&list), changes));
            *list.watcher.borrow_mut() = Some(task.abort_handle());
        }
        list
    }
}

impl FileList {
    /// Reads the file, and watches it if asked for.
    ///
    /// # Errors
    /// It does not hold rules now, or its folder cannot be watched.
    pub(super) async fn open(properties: &AuthZListFileProperties) -> Result<Watched, Error> {
        let filename = properties.filename.clone();
        // The watch comes first: a change after the reading is never missed.
        let changes = match properties.refresh {
            Some(false) => None,
            _ => Some(watch(Path::new(&filename))?),
        };
        Ok(Watched {
            first: read(filename.clone()).await?,
            filename,
            changes,
        })
    }

    fn name(&self) -> Option<&OsStr> {
        Path::new(&self.filename).file_name()
    }

    async fn replace(&self, read: Result<AuthZListProperties, Error>) {
        let error = match read {
            Ok(list) => match self.policy.reconfigure(&rules(&list)).await {
                Ok(()) => return,
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let file = &self.filename;
        tracing::error!(
            file,
            error,
            "nobody is let in until the file is right again"
        );
        self.policy.close().await;
    }
}

/// Task: reads the file again for as long as somebody asks it.
async fn follow(list: Weak<FileList>, changes: AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = changes.readable().await else {
            return;
        };
        let Some(list) = list.upgrade() else { return };
        if concerns(changes.get_ref(), list.name()) {
            let read = read(list.filename.clone()).await;
            list.replace(read).await;
        }
        ready.clear_ready();
    }
}

/// Takes all events; whether one was about `name`.
fn concerns(fd: &OwnedFd, name: Option<&OsStr>) -> bool {
    let mut room = [MaybeUninit::uninit(); EVENTS_BYTES];
    let mut reader = inotify::Reader::new(fd, &mut room);
    let mut concerned = false;
    while let Ok(event) = reader.next() {
        let about = event
            .file_name()
            .map(|about| OsStr::from_bytes(about.to_bytes()));
        // Events that were lost may have been about it.
        concerned |= about.is_none() || about == name;
    }
    concerned
}

fn watch(path: &Path) -> Result<AsyncFd<OwnedFd>, Error> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let Some(folder) = folder else {
        return Err(Error::generic("Filename must be an absolute path"));
    };
    let failed = |error: std::io::Error| {
        let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
        Error::generic(format!("Unable to watch '{}': {reason}", folder.display()))
    };
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
    let fd = fd.map_err(|error| failed(error.into()))?;
    inotify::add_watch(&fd, folder, CHANGES).map_err(|error| failed(error.into()))?;
    outport_block::engine::register(fd).map_err(failed)
}

async fn read(filename: String) -> Result<AuthZListProperties, Error> {
    let path = filename.clone();
    let content = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
    let content = match content {
        Ok(Ok(content)) => content,
        Ok(Err(error)) => {
            let reason = unread(&filename, &error);
            return Err(Error::generic(format!(
                "Unable to read '{filename}': {reason}"
            )));
        }
        Err(error) => return Err(Error::generic(error.to_string())),
    };
    let value = wire::parse_one(&content)?;
    if !value.is_object() {
        let message = format!("File '{filename}' must contain a JSON object");
        return Err(Error::generic(message));
    }
    de::from_value(&value, de::Mode::Typed)
}
