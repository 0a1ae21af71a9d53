//! The host's own drivers: files, devices, windows of other nodes, and nothing at all.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use outport_block::file::{FileOptions, HostFile, Locking};
use outport_block::node::Kind;
use outport_block::{Aio, Node};
use outport_qmp::Error;
use outport_qmp::types::OnOffAuto;
use outport_qmp::types::block_core::{
    BlockdevAioOptions, BlockdevOptionsFile, BlockdevOptionsNull, BlockdevOptionsRaw,
};
use outport_qmp::types::block_create::{BlockdevCreateOptionsFile, PreallocMode};
use rustix::fs::FallocateFlags;

use super::base::Common;
use super::{Made, Opening, control_error};
use crate::daemon::Daemon;
use crate::graph::Use;

/// Length of a null node that does not say.
const NULL_BYTES: i64 = 1 << 30;

/// Lengths and places of a window are multiples of this.
const SECTOR: u64 = 512;

impl Opening<'_> {
    /// `file` and `host_device`.
    pub(super) async fn file(
        &mut self,
        name: &str,
        driver: &str,
        file: BlockdevOptionsFile,
        common: &Common,
    ) -> Result<Made, Error> {
        if let Some(id) = &file.pr_manager {
            return Err(Error::generic(format!(
                "No persistent reservation manager with id '{id}'"
            )));
        }
        if file.filename.is_empty() {
            return Err(Error::generic(format!(
                "The '{driver}' block driver requires a file name"
            )));
        }
        let passed = {
            let descriptors = self.daemon.descriptors.borrow();
            descriptors.file(&file.filename, common.read_only)
        };
        let opened = passed.transpose().map_err(Error::generic)?;
        let options = FileOptions {
            opened: opened.map(Arc::new),
            path: file.filename.into(),
            read_only: common.read_only,
            auto_read_only: common.auto_read_only,
            direct: common.direct,
            no_flush: common.no_flush,
            aio: match file.aio {
                Some(BlockdevAioOptions::Threads) => Aio::Threads,
                Some(BlockdevAioOptions::Native) => Aio::Native,
                Some(BlockdevAioOptions::IoUring) | None => Aio::IoUring,
            },
            unmap: common.unmap,
            locking: match file.locking {
                Some(OnOffAuto::Off) => Locking::Off,
                _ if common.force_share => Locking::Off,
                Some(OnOffAuto::On) => Locking::On,
                Some(OnOffAuto::Auto) | None => Locking::Auto,
            },
            host_device: driver == "host_device",
        };
        open_file(self.daemon, name, driver, options)
            .await
            .map(Made::from)
    }

    /// `raw`.
    pub(super) async fn raw(
        &mut self,
        name: &str,
        raw: BlockdevOptionsRaw,
        common: &Common,
    ) -> Result<Made, Error> {
        let offset = not_negative("offset", raw.offset)?;
        let size = not_negative("size", raw.size)?;
        let purpose = match (offset, size) {
            (None | Some(0), None) => Use::Filter,
            _ => Use::Window,
        };
        let child = self
            .child(name, "file", raw.file, common.for_filter(), purpose)
            .await?;
        let offset = offset.unwrap_or(0);
        check_window(offset, size, child.size())?;
        let kind = Kind::raw(child, offset, size);
        Ok(Node::with_discard(name, "raw", common.read_only, common.unmap, kind).into())
    }
}

/// Opens a file on a thread that may wait for it, but not longer than the daemon lives.
pub(super) async fn open_file(
    daemon: &Daemon,
    name: &str,
    driver: &str,
    options: FileOptions,
) -> Result<Arc<Node>, Error> {
    let opened = tokio::task::spawn_blocking(move || HostFile::open(options));
    let file = daemon
        .unless_it_ends(opened)
        .await?
        .map_err(|error| Error::generic(error.to_string()))?
        .map_err(|error| control_error(&error))?;
    let read_only = file.is_read_only();
    Ok(Node::new(name, driver, read_only, Kind::File(file)))
}

/// `null-co` and `null-aio`.
pub(super) fn null(
    name: &str,
    driver: &str,
    null: &BlockdevOptionsNull,
    common: &Common,
) -> Result<Arc<Node>, Error> {
    let size = null.size.unwrap_or(NULL_BYTES);
    let size = u64::try_from(size).map_err(|_| {
        Error::generic(format!(
            "Value '{size}' is out of range for parameter 'size'"
        ))
    })?;
    if null.latency_ns.is_some_and(|latency| latency > 0) {
        return Err(Error::generic("Parameter 'latency-ns' is not supported"));
    }
    let zeroes = null.read_zeroes.unwrap_or(false);
    let kind = Kind::Null {
        size: AtomicU64::new(size),
        zeroes,
    };
    Ok(Node::new(name, driver, common.read_only, kind))
}

pub(super) fn not_negative(name: &str, value: Option<i64>) -> Result<Option<u64>, Error> {
    let out_of_range = |value| {
        Error::generic(format!(
            "Value '{value}' is out of range for parameter '{name}'"
        ))
    };
    value
        .map(|value| u64::try_from(value).map_err(|_| out_of_range(value)))
        .transpose()
}

pub(super) fn check_window(offset: u64, size: Option<u64>, container: u64) -> Result<(), Error> {
    if offset > container {
        return Err(Error::generic(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({container})"
        )));
    }
    let Some(size) = size else { return Ok(()) };
    if container - offset < size {
        // Two spaces: QEMU's sentence has them.
        return Err(Error::generic(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({container})"
        )));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::generic("Specified size is not multiple of 512"));
    }
    Ok(())
}

/// Makes a file (`blockdev-create`, driver `file`); may take long.
///
/// # Errors
/// In QEMU's words.
pub(crate) fn create_file(options: &BlockdevCreateOptionsFile) -> Result<(), Error> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = &options.filename;
    let failed = |what: &str, error: &std::io::Error| {
        let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
        Error::generic(format!("Could not {what} '{path}': {reason}"))
    };
    let mut open = std::fs::OpenOptions::new();
    open.read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644);
    let file = open.open(path).map_err(|error| failed("create", &error))?;
    let size = options.size.0;
    file.set_len(size)
        .map_err(|error| failed("resize", &error))?;
    let preallocated = match options.preallocation.unwrap_or(PreallocMode::Off) {
        PreallocMode::Off => Ok(()),
        PreallocMode::Falloc | PreallocMode::Full if size > 0 => {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
        }
        PreallocMode::Falloc | PreallocMode::Full => Ok(()),
        PreallocMode::Metadata => {
            return Err(Error::generic("Unsupported preallocation mode 'metadata'"));
        }
    };
    preallocated.map_err(|error| failed("preallocate", &error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_fit_into_their_container() {
        let error = |offset, size| check_window(offset, size, 4096).unwrap_err().desc;
        check_window(1, None, 4096).unwrap();
        check_window(512, Some(3584), 4096).unwrap();
        assert_eq!(error(0, Some(1)), "Specified size is not multiple of 512");
        assert_eq!(
            error(8192, None),
            "Offset (8192) cannot be greater than size of the containing file (4096)"
        );
        assert_eq!(
            error(3584, Some(1024)),
            "The sum of offset (3584) and size (1024) has to be smaller or equal to the  actual \
             size of the containing file (4096)"
        );
        assert_eq!(
            not_negative("offset", Some(-512)).unwrap_err().desc,
            "Value '-512' is out of range for parameter 'offset'"
        );
    }
}
