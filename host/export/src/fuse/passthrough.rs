//! Passthrough: the kernel reads the file at the bottom itself.
//!
//! What was opened so cannot be taken back: it reads that file until it is closed, whatever becomes
//! of mount, export and daemon. So only on request, only for reading, and only for a node that is
//! nothing but a file. Invariant: one number per connection, as all who have the file open must
//! share it.

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use outport_block::Node;
use outport_block::file::HostFile;
use outport_block::node::Kind;

use super::sys;

/// The file, and what the kernel calls it.
#[derive(Debug)]
pub(super) struct Passthrough {
    file: HostFile,
    known: Mutex<Known>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    NotYet,
    As(i32),
    /// Said once; served as any other from then on.
    Refused,
}

impl Passthrough {
    pub(super) fn new(file: HostFile) -> Self {
        Self {
            file,
            known: Mutex::new(Known::NotYet),
        }
    }

    /// This kernel, or this daemon's rights, do not allow it.
    pub(super) fn refuse(&self, reason: &dyn std::fmt::Display) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != Known::Refused {
            *known = Known::Refused;
            let path = self.file.path().display();
            tracing::warn!(%path, %reason, "no passthrough, reads go through the daemon");
        }
    }

    /// The number to open it with; `None`: as any other file.
    pub(super) fn id(&self, device: impl AsFd) -> Option<i32> {
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known {
            Known::As(id) => Some(id),
            Known::Refused => None,
            Known::NotYet => match sys::open_backing(device, self.file.as_fd()) {
                Ok(id) => {
                    let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                    // Another queue may have been faster; its number counts.
                    if *known == Known::NotYet {
                        *known = Known::As(id);
                    }
                    match *known {
                        Known::As(id) => Some(id),
                        Known::NotYet | Known::Refused => None,
                    }
                }
                Err(reason) => {
                    self.refuse(&reason);
                    None
                }
            },
        }
    }
}

/// The file that a node is, byte for byte.
///
/// # Errors
/// In words: something is between, or there is no regular file.
pub fn identity(node: &Node) -> Result<HostFile, String> {
    let name = node.name();
    let refused = |why: &str| Err(format!("Node '{name}' cannot be passed through: {why}"));
    match node.kind() {
        Kind::File(file) if file.is_device() => refused("it is a device, not a regular file"),
        Kind::File(file) => Ok(file.clone()),
        Kind::Raw(raw) => {
            let window = raw.get();
            if window.offset != 0 || window.size.is_some() {
                return refused("it shows only a part of its file");
            }
            identity(&window.child).or_else(|_| refused("it is not over a regular file"))
        }
        _ => refused("it is not raw, so its bytes are not those of a file"),
    }
}
