//! Which files an image may name: the directories of `--allow-paths`.
//!
//! A name found in an image is a request. Without a grant nothing is opened, looked up or told
//! apart by it. Invariant: what is opened by such a name lies, after all links are followed, in a
//! directory that the operator listed; that is checked again on the open descriptor, so that a
//! link changed meanwhile gains nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::path::{Component, Path, PathBuf};

/// What becomes of a name found in an image.
#[derive(Debug)]
pub(crate) enum Grant {
    /// This file, with all links followed, lies in a granted directory.
    Granted(PathBuf),
    /// The name ends in a granted directory, but leads to no file there.
    Unreachable(io::Error),
    /// It is not granted. Nothing is told of it.
    Refused,
}

/// The directories, with all links followed.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathPolicy {
    allowed: Vec<PathBuf>,
}

impl PathPolicy {
    /// Lists one more directory.
    ///
    /// # Errors
    /// It does not exist, or is no directory.
    pub(crate) fn allow(&mut self, directory: &str) -> Result<(), String> {
        let found = Path::new(directory).canonicalize();
        let found = found.map_err(|error| {
            let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
            format!("Could not open '{directory}': {reason}")
        })?;
        if !found.is_dir() {
            return Err(format!("'{directory}' is not a directory"));
        }
        self.allowed.push(found);
        Ok(())
    }

    /// The directories, for the configuration.
    pub(crate) fn allowed(&self) -> &[PathBuf] {
        &self.allowed
    }

    /// The file that an image means by `name`, if that is granted. `image`: the image's own path,
    /// to which relative names refer.
    pub(crate) fn grant(&self, image: Option<&Path>, name: &str) -> Grant {
        if self.allowed.is_empty() || has_protocol(name) {
            return Grant::Refused;
        }
        let path = match image.and_then(Path::parent) {
            Some(folder) => folder.join(name),
            None => PathBuf::from(name),
        };
        if !path.is_absolute() {
            return Grant::Refused;
        }
        match path.canonicalize() {
            Ok(found) if self.covers(&found) => Grant::Granted(found),
            Ok(_) => Grant::Refused,
            Err(_) => self.why_unreachable(&path),
        }
    }

    /// Whether `path`, which does not lead to a file, ends in a granted directory. The first part
    /// that cannot be followed says why, unless it is a link: that leads anywhere.
    fn why_unreachable(&self, path: &Path) -> Grant {
        let mut ancestors = path.ancestors().skip(1);
        let Some(folder) = ancestors.find_map(|it| Some((it, it.canonicalize().ok()?))) else {
            return Grant::Refused;
        };
        let rest = path.strip_prefix(folder.0).unwrap_or(path);
        let Some(Component::Normal(first)) = rest.components().next() else {
            return Grant::Refused;
        };
        if !self.covers(&folder.1) || rest.components().any(|it| it == Component::ParentDir) {
            return Grant::Refused;
        }
        match folder.1.join(first).symlink_metadata() {
            Ok(_) => Grant::Refused,
            Err(reason) => Grant::Unreachable(reason),
        }
    }

    fn covers(&self, path: &Path) -> bool {
        self.allowed
            .iter()
            .any(|directory| path.starts_with(directory))
    }

    /// Whether an open file is where it was said to be.
    pub(crate) fn covers_open(&self, fd: BorrowedFd<'_>) -> bool {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        std::fs::read_link(link).is_ok_and(|path| self.covers(&path))
    }
}

/// `nbd://host`, `json:{...}`: not the name of a file.
fn has_protocol(name: &str) -> bool {
    name.split('/')
        .next()
        .is_some_and(|first| first.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_inside_is_granted() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("base"), "").unwrap();
        std::fs::write(folder.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
        let image = inside.join("image");

        let mut policy = PathPolicy::default();
        let granted = |policy: &PathPolicy, name| match policy.grant(Some(&image), name) {
            Grant::Granted(path) => Ok(path),
            Grant::Unreachable(reason) => Err(Some(reason.kind())),
            Grant::Refused => Err(None),
        };
        assert_eq!(granted(&policy, "base"), Err(None));
        policy.allow(inside.to_str().unwrap()).unwrap();
        let base = inside.canonicalize().unwrap().join("base");
        assert_eq!(granted(&policy, "base"), Ok(base));
        let missing = Err(Some(io::ErrorKind::NotFound));
        assert_eq!(granted(&policy, "nosuch"), missing);
        assert_eq!(granted(&policy, "nosuch/base"), missing);
        std::os::unix::fs::symlink("../nosuch", inside.join("dangling")).unwrap();
        for name in [
            "../secret",
            "link",
            "/etc/passwd",
            "/nonexistent/base",
            "../nosuch",
            "nosuch/../../secret",
            "dangling",
            "json:{}",
            "file:base",
        ] {
            assert_eq!(granted(&policy, name), Err(None), "{name}");
        }
        assert!(policy.allow("/nonexistent").is_err());
    }
}
