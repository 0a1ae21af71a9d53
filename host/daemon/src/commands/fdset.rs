//! Descriptors over QMP (`misc.json`).

use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::fdset::{AddFd, AddfdInfo, Closefd, Getfd, RemoveFd};

use super::Control;
use crate::daemon::Daemon;

/// `getfd`: takes what came even if the name is none, as nobody else could.
pub(super) fn get(control: &Control, arguments: &Getfd) -> Result<Empty, Error> {
    let fd = control.take_arrived()?;
    let name = &arguments.fdname;
    if name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(Error::expects("fdname", "a name not starting with a digit"));
    }
    control.daemon.descriptors.borrow_mut().name(name, fd);
    Ok(Empty {})
}

/// `closefd`.
pub(super) fn close(daemon: &Daemon, arguments: &Closefd) -> Result<Empty, Error> {
    let name = &arguments.fdname;
    let closed = daemon.descriptors.borrow_mut().take(name);
    match closed {
        Some(_) => Ok(Empty {}),
        None => Err(not_found(name)),
    }
}

/// `add-fd`.
pub(super) fn add(control: &Control, arguments: AddFd) -> Result<AddfdInfo, Error> {
    let fd = control.take_arrived()?;
    if arguments.fdset_id.is_some_and(|id| id < 0) {
        return Err(Error::expects("fdset-id", "a non-negative value"));
    }
    let mut descriptors = control.daemon.descriptors.borrow_mut();
    Ok(descriptors.add(arguments.fdset_id, fd, arguments.opaque))
}

/// `remove-fd`.
pub(super) fn remove(daemon: &Daemon, arguments: &RemoveFd) -> Result<Empty, Error> {
    let RemoveFd { fdset_id, fd } = *arguments;
    if daemon.descriptors.borrow_mut().remove(fdset_id, fd) {
        return Ok(Empty {});
    }
    Err(not_found(&match fd {
        Some(fd) => format!("fdset-id:{fdset_id}, fd:{fd}"),
        None => format!("fdset-id:{fdset_id}"),
    }))
}

fn not_found(name: &str) -> Error {
    Error::generic(format!("File descriptor named '{name}' not found"))
}
