//! The PID file: written once startup succeeded, locked while the daemon lives.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use outport_block::strerror;
use rustix::fs::FlockOperation;

/// The file; removed when dropped.
#[derive(Debug)]
pub(crate) struct Pidfile {
    path: PathBuf,
    file: File,
}

impl Pidfile {
    /// Writes our process id into `path`.
    ///
    /// # Errors
    /// QEMU's sentences.
    pub(crate) fn create(path: &Path) -> Result<Self, String> {
        let failed = |what: &str, error: &std::io::Error| {
            let reason = strerror(error.raw_os_error().unwrap_or_default());
            format!("cannot create PID file: {what}: {reason}")
        };
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let opened = options.open(path);
        let mut file = opened
            .map_err(|error| failed(&format!("Could not create '{}'", path.display()), &error))?;
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("Cannot lock pid file", &error.into()))?;
        let write = |file: &mut File| {
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|error| failed("Failed to write pid file", &error))?;
        // The daemon may have another working directory when it ends.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok(Self { path, file })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        let ours = self
            .file
            .metadata()
            .map(|meta| (meta.dev(), meta.ino()))
            .ok();
        let there = std::fs::symlink_metadata(&self.path);
        if ours.is_some() && ours == there.map(|meta| (meta.dev(), meta.ino())).ok() {
            let _gone_anyway = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_our_id_and_goes_with_us() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p");
        let pidfile = Pidfile::create(&path).unwrap();
        let id = std::fs::read_to_string(&path).unwrap();
        assert_eq!(id, format!("{}\n", std::process::id()));
        drop(pidfile);
        assert!(!path.exists());
        assert_eq!(
            Pidfile::create(Path::new("/nonexistent/p")).unwrap_err(),
            "cannot create PID file: Could not create '/nonexistent/p': No such file or directory"
        );
    }
}
