//! Rules in a file (`authz-list-file`), read again whenever the file changes.
//!
//! Also when its name leads to another file, or to none: editors replace files by renaming, and
//! deployments swap links. Control thread; the file itself is read elsewhere. Invariant: while the
//! file does not hold rules, or cannot be read, nobody gets in.

use std::cell::RefCell;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use outport_plugin::WasmPolicy;
use outport_qmp::types::qom::{AuthZListFileProperties, AuthZListProperties};
use outport_qmp::{Error, de, wire};
use tokio::task::AbortHandle;

use super::authz::rules;
use super::secret::unread;
use super::trail::{Listener, Trail};

/// As often as this a file is looked at that could not be taken over, or not be watched entirely.
const AGAIN: Duration = Duration::from_secs(1);

/// What was taken over last, or why it was not.
type Last = Result<Vec<u8>, String>;

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
    content: Vec<u8>,
    /// `None`: it is not read again.
    listener: Option<Listener>,
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
        if let Some(listener) = self.listener {
            let follow = follow(Rc::downgrade(&list), listener, Ok(self.content));
            let task = tokio::task::spawn_local(follow);
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
        let mut listener = match properties.refresh {
            Some(false) => None,
            _ => Some(listener(&filename)?),
        };
        let content = look(&filename, listener.as_mut()).await?;
        if let Some(listener) = &listener
            && let Some(error) = &listener.trail().unwatched
        {
            return Err(unwatchable(&filename, error));
        }
        Ok(Watched {
            first: parse(&filename, &content)?,
            filename,
            content,
            listener,
        })
    }

    /// Takes over what was read, unless it was before.
    async fn take(&self, read: Result<Vec<u8>, Error>, last: Last) -> Last {
        if matches!((&read, &last), (Ok(read), Ok(last)) if read == last) {
            return last;
        }
        let file = &self.filename;
        match self.reconfigure(read).await {
            Ok(content) => {
                tracing::info!(file, "rules were read again");
                Ok(content)
            }
            Err(error) => {
                let error = error.to_string();
                if last.as_ref() != Err(&error) {
                    let until = "nobody is let in until the file is right again";
                    tracing::error!(file, error, "{until}");
                }
                self.policy.close().await;
                Err(error)
            }
        }
    }

    async fn reconfigure(&self, read: Result<Vec<u8>, Error>) -> Result<Vec<u8>, Error> {
        let content = read?;
        let list = parse(&self.filename, &content)?;
        let taken = self.policy.reconfigure(&rules(&list)).await;
        taken.map_err(|error| Error::generic(error.to_string()))?;
        Ok(content)
    }
}

/// Task: looks at the file again for as long as somebody asks it.
async fn follow(list: Weak<FileList>, mut listener: Listener, mut last: Last) {
    loop {
        let is_told = last.is_ok() && !listener.trail().has_gaps;
        tokio::select! {
            () = listener.changed() => {}
            () = tokio::time::sleep(AGAIN), if !is_told => {}
        }
        let Some(list) = list.upgrade() else { return };
        let read = look(&list.filename, Some(&mut listener)).await;
        last = list.take(read, last).await;
    }
}

fn listener(filename: &str) -> Result<Listener, Error> {
    let folder = Path::new(filename).parent();
    if folder.is_none_or(|folder| folder.as_os_str().is_empty()) {
        return Err(Error::generic("Filename must be an absolute path"));
    }
    Listener::new().map_err(|error| unwatchable(filename, &error))
}

fn unwatchable(filename: &str, error: &std::io::Error) -> Error {
    let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
    let folder = Path::new(filename).parent().unwrap_or(Path::new("/"));
    Error::generic(format!("Unable to watch '{}': {reason}", folder.display()))
}

/// Reads the file, and follows its name from now on.
async fn look(filename: &str, listener: Option<&mut Listener>) -> Result<Vec<u8>, Error> {
    let unread = |error: &std::io::Error| {
        let reason = unread(filename, error);
        Error::generic(format!("Unable to read '{filename}': {reason}"))
    };
    let fd = listener.as_ref().map(|listener| listener.fd());
    let fd = fd.transpose().map_err(|error| unread(&error))?;
    let path = filename.to_owned();
    // The watch comes first: a change after the reading is never missed.
    let looking = tokio::task::spawn_blocking(move || {
        let trail = fd.map(|fd| Trail::lay(&fd, Path::new(&path)));
        (trail, std::fs::read(path))
    });
    let (trail, content) = looking.await.map_err(|e| Error::generic(e.to_string()))?;
    if let (Some(listener), Some(trail)) = (listener, trail) {
        listener.set(trail);
    }
    content.map_err(|error| unread(&error))
}

fn parse(filename: &str, content: &[u8]) -> Result<AuthZListProperties, Error> {
    let value = wire::parse_one(content)?;
    if !value.is_object() {
        let message = format!("File '{filename}' must contain a JSON object");
        return Err(Error::generic(message));
    }
    de::from_value(&value, de::Mode::Typed)
}
