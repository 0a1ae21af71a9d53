//! What becomes of the files that an image names.
//!
//! The block layer asks [`Children`] while it opens the image. What the operator named was opened
//! before; what only the image names is granted by the path policy or refused. A granted file is
//! not opened here, as that may take long: the opening breaks off, [`super::format`] opens the
//! file, and starts again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outport_block::Node;
use outport_block::error::{Error, ErrorKind, Result};
use outport_block::format::{Child, ChildKind};
use outport_block::image::ChildSource;

use crate::policy::{Grant, PathPolicy};

/// What the operator said of one child.
#[derive(Clone, Debug)]
pub(super) enum Given {
    /// This node.
    Node(Arc<Node>),
    /// There is none, whatever the image says.
    None,
}

/// A child that the policy grants and that is not open yet.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) id: String,
    pub(super) kind: ChildKind,
    pub(super) path: PathBuf,
    pub(super) format: Option<String>,
}

/// Grants and refuses, for one image.
#[derive(Clone, Debug)]
pub(super) struct Children {
    pub(super) node_name: String,
    pub(super) image: Option<PathBuf>,
    pub(super) policy: PathPolicy,
    /// By the child's id.
    pub(super) given: Vec<(String, Given)>,
    /// What to open before the next try.
    pub(super) wanted: Option<Wanted>,
}

impl ChildSource for Children {
    fn child(&mut self, child: &Child) -> Result<Option<Arc<Node>>> {
        match self.given.iter().find(|(id, _)| *id == child.id) {
            Some((_, Given::Node(node))) => return Ok(Some(node.clone())),
            Some((_, Given::None)) => return Ok(None),
            None => {}
        }
        let Some(name) = &child.reference else {
            return Ok(None);
        };
        let path = match self.policy.grant(self.image.as_deref(), name) {
            Grant::Granted(path) => path,
            Grant::Unreachable(reason) => return Err(unreachable(child, name, &reason)),
            Grant::Refused => return Err(self.refusal(child, name)),
        };
        self.wanted = Some(Wanted {
            id: child.id.clone(),
            kind: child.kind,
            path,
            format: child.format.clone(),
        });
        Err(Error::new(ErrorKind::NotFound, "granted, but not open yet"))
    }
}

impl Children {
    /// What, where, and what to do.
    fn refusal(&self, child: &Child, name: &str) -> Error {
        let node = &self.node_name;
        let sentence = match (child.kind, child.id.as_str()) {
            (ChildKind::Backing, id) => format!(
                "Node '{node}': the image names a backing file '{name}' that is not granted. Grant \
                 it with --allow-paths DIR or with '{id}' in blockdev-add, or open with {id}=null."
            ),
            (ChildKind::Storage, "data-file") => format!(
                "Node '{node}': the image names a data file '{name}' that is not granted. Grant it \
                 with --allow-paths DIR or with 'data-file' in blockdev-add."
            ),
            (ChildKind::Storage, id) => format!(
                "Node '{node}': the image names a file '{name}' that is not granted. Grant it with \
                 --allow-paths DIR or with '{id}' in blockdev-add."
            ),
        };
        Error::new(ErrorKind::Invalid, sentence)
    }
}

/// Its place is granted, but it cannot be opened: QEMU's words.
fn unreachable(child: &Child, name: &str, reason: &io::Error) -> Error {
    let reason = outport_block::strerror(reason.raw_os_error().unwrap_or_default());
    let sentence = match child.kind {
        ChildKind::Backing => {
            format!("Could not open backing file: Could not open '{name}': {reason}")
        }
        ChildKind::Storage => format!("Could not open '{name}': {reason}"),
    };
    Error::new(ErrorKind::NotFound, sentence)
}

/// Where the image itself lies: relative names start there.
pub(super) fn image_path(primary: &Node) -> Option<PathBuf> {
    if let Some(file) = primary.host_file() {
        return std::path::absolute(file.path()).ok();
    }
    let (_, child) = primary.children().into_iter().next()?;
    image_path(&child)
}

/// The name of a child's file, for messages.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
