//! Descriptors that clients of monitors pass (`SCM_RIGHTS`): named ones and sets.
//!
//! Control plane. A descriptor arrives with the bytes of a command, waits in its monitor's
//! [`Arrived`], and is taken by `getfd` or `add-fd`; what nobody takes is closed with the client.
//! Names belong to the daemon, not to one monitor (QEMU: to the monitor). Invariant: a client can
//! make the daemon hold [`ARRIVED_MAX`] untaken descriptors and no more.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use outport_qmp::types::fdset::{AddfdInfo, FdsetFdInfo, FdsetInfo};

/// Descriptors that wait to be taken: a command takes one, and commands come one by one.
pub(crate) const ARRIVED_MAX: usize = 16;

/// Where the descriptors of sets are found.
const FDSET_FOLDER: &str = "/dev/fdset/";

/// What came over one monitor and was not taken yet. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived(Rc<RefCell<VecDeque<OwnedFd>>>);

impl Arrived {
    /// One more; closed if too many wait.
    pub(crate) fn push(&self, fd: OwnedFd) {
        let mut waiting = self.0.borrow_mut();
        if waiting.len() < ARRIVED_MAX {
            waiting.push_back(fd);
        }
    }

    /// The oldest.
    pub(crate) fn take(&self) -> Option<OwnedFd> {
        self.0.borrow_mut().pop_front()
    }
}

#[derive(Debug)]
struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

/// All descriptors that were taken.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    named: BTreeMap<String, OwnedFd>,
    sets: BTreeMap<i64, Vec<Member>>,
}

impl Descriptors {
    /// Names a descriptor; one that had the name is closed.
    pub(crate) fn name(&mut self, name: &str, fd: OwnedFd) {
        self.named.insert(name.to_owned(), fd);
    }

    /// Takes a named descriptor, to use or to close it.
    pub(crate) fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.named.remove(name)
    }

    /// Adds to a set; without an id to a new one.
    pub(crate) fn add(
        &mut self,
        id: Option<i64>,
        fd: OwnedFd,
        opaque: Option<String>,
    ) -> AddfdInfo {
        let unused = || (0..).find(|id| !self.sets.contains_key(id)).unwrap_or(0);
        let fdset_id = id.unwrap_or_else(unused);
        let number = i64::from(fd.as_raw_fd());
        self.sets
            .entry(fdset_id)
            .or_default()
            .push(Member { fd, opaque });
        AddfdInfo {
            fdset_id,
            fd: number,
        }
    }

    /// Closes one descriptor of a set, or all; `false`: there is none.
    pub(crate) fn remove(&mut self, id: i64, fd: Option<i64>) -> bool {
        let Some(set) = self.sets.get_mut(&id) else {
            return false;
        };
        let before = set.len();
        set.retain(|member| fd.is_some_and(|fd| i64::from(member.fd.as_raw_fd()) != fd));
        let removed = set.len() < before;
        if set.is_empty() {
            self.sets.remove(&id);
        }
        removed
    }

    /// The sets, by id.
    pub(crate) fn query(&self) -> Vec<FdsetInfo> {
        let member = |member: &Member| FdsetFdInfo {
            fd: member.fd.as_raw_fd().into(),
            opaque: member.opaque.clone(),
        };
        let set = |(id, members): (&i64, &Vec<Member>)| FdsetInfo {
            fdset_id: *id,
            fds: members.iter().map(member).collect(),
        };
        self.sets.iter().map(set).collect()
    }

    /// The descriptor that a file name means: `None` for a name of another kind. A set may hold
    /// several for different kinds of access; the first that allows this one is taken.
    ///
    /// # Errors
    /// There is no such set, or none of its descriptors allows the access: the sentence.
    pub(crate) fn file(&self, name: &str, read_only: bool) -> Option<Result<OwnedFd, String>> {
        use rustix::fs::OFlags;
        let id = name.strip_prefix(FDSET_FOLDER)?;
        let failed = |reason: &str| Some(Err(format!("Could not open '{name}': {reason}")));
        let set = id.parse().ok().and_then(|id: i64| self.sets.get(&id));
        let Some(set) = set else {
            return failed("No such file or directory");
        };
        let allows = |member: &&Member| {
            let flags = rustix::fs::fcntl_getfl(&member.fd);
            flags.is_ok_and(|flags| {
                let mode = flags & OFlags::RWMODE;
                mode == OFlags::RDWR || read_only && mode == OFlags::RDONLY
            })
        };
        let Some(member) = set.iter().find(allows) else {
            return failed("Permission denied");
        };
        match member.fd.try_clone() {
            Ok(fd) => Some(Ok(fd)),
            Err(error) => failed(&outport_block::strerror(
                error.raw_os_error().unwrap_or_default(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(write: bool) -> OwnedFd {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(write);
        options.open(file.path()).unwrap().into()
    }

    #[test]
    fn sets_are_made_found_and_gone() {
        let mut all = Descriptors::default();
        let first = all.add(None, open(false), Some("one".into()));
        assert_eq!(first.fdset_id, 0);
        let second = all.add(Some(7), open(true), None);
        assert_eq!(all.add(None, open(true), None).fdset_id, 1);
        assert_eq!(all.query().len(), 3);
        assert!(all.file("/dev/fdset/0", true).unwrap().is_ok());
        assert_eq!(
            all.file("/dev/fdset/0", false).unwrap().unwrap_err(),
            "Could not open '/dev/fdset/0': Permission denied"
        );
        assert!(all.file("/dev/fdset/7", false).unwrap().is_ok());
        assert_eq!(
            all.file("/dev/fdset/9", true).unwrap().unwrap_err(),
            "Could not open '/dev/fdset/9': No such file or directory"
        );
        assert!(all.file("/dev/null", true).is_none());
        assert!(!all.remove(7, Some(second.fd + 1000)));
        assert!(all.remove(7, Some(second.fd)));
        assert!(!all.remove(7, None), "an empty set is gone");
        assert!(all.remove(0, None));
        assert_eq!(all.query().len(), 1);
    }

    #[test]
    fn what_nobody_takes_is_bounded() {
        let arrived = Arrived::default();
        for _ in 0..ARRIVED_MAX + 5 {
            arrived.push(open(false));
        }
        let mut taken = 0;
        while arrived.take().is_some() {
            taken += 1;
        }
        assert_eq!(taken, ARRIVED_MAX);
    }
}
