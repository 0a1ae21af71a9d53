//! Opening host files, and what is asked of them once.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::Aio;
use crate::engine::buffer::Buf;
use crate::engine::syscalls;
use crate::error::{Error, ErrorKind, Result};
use crate::strerror;

use super::lock::Locking;

/// What `blockdev-add driver=file` says.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Path as given.
    pub path: PathBuf,
    /// The file itself, if somebody opened it already; the path is its name then.
    pub opened: Option<Arc<OwnedFd>>,
    /// Open for reading only.
    pub read_only: bool,
    /// Fall back to reading only when writing is not permitted.
    pub auto_read_only: bool,
    /// `cache.direct`.
    pub direct: bool,
    /// `cache.no-flush`.
    pub no_flush: bool,
    /// Engine.
    pub aio: Aio,
    /// `discard=unmap`: discards punch holes.
    pub unmap: bool,
    /// Image locks.
    pub locking: Locking,
    /// A block or character device is expected.
    pub host_device: bool,
}

impl FileOptions {
    /// The defaults of QEMU's file driver for this path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            opened: None,
            read_only: false,
            auto_read_only: false,
            direct: false,
            no_flush: false,
            aio: Aio::default(),
            unmap: false,
            locking: Locking::default(),
            host_device: false,
        }
    }
}

/// What opening found out.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) read_only: bool,
    /// Why it is read-only, though it was wanted otherwise.
    pub(super) refused: Option<Error>,
    pub(super) device: bool,
    pub(super) len: u64,
    pub(super) align: u32,
}

pub(super) fn open(options: &FileOptions) -> Result<Opened> {
    let invalid = |message: String| Error::new(ErrorKind::Invalid, message);
    if options.aio == Aio::Native && !options.direct {
        return Err(invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
                .to_owned(),
        ));
    }
    if options.opened.is_none() && super::served::leads_to_served(&options.path) {
        let path = options.path.display();
        return Err(invalid(format!(
            "Could not open '{path}': it is an export of this daemon"
        )));
    }
    let (file, refused) = open_file(options)?;
    let read_only = options.read_only || refused.is_some();
    let could_not = |e: std::io::Error| could_not_open(&options.path, &e);
    let meta = file.metadata().map_err(could_not)?;
    let kind = meta.file_type();
    let device = kind.is_block_device() || kind.is_char_device();
    if options.host_device && !device {
        let path = options.path.display();
        return Err(invalid(format!(
            "'host_device' driver requires '{path}' to be either a character or block device"
        )));
    }
    if !options.host_device && device {
        let path = options.path.display();
        return Err(invalid(format!(
            "'file' driver requires '{path}' to be a regular file"
        )));
    }
    if !kind.is_file() && !device {
        return Err(invalid("'file' driver requires a regular file".to_owned()));
    }
    blocking(&file).map_err(could_not)?;
    let len = if device {
        device_len(&file).map_err(could_not)?
    } else {
        meta.len()
    };
    let align = if options.direct {
        direct_align(file.as_fd())
    } else {
        1
    };
    Ok(Opened {
        file,
        read_only,
        refused,
        device,
        len,
        align,
    })
}

pub(super) fn could_not_open(path: &Path, e: &std::io::Error) -> Error {
    let reason = strerror(e.raw_os_error().unwrap_or(libc::EIO));
    let kind = match e.kind() {
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::new(
        kind,
        format!("Could not open '{}': {reason}", path.display()),
    )
}

/// The file, and why it was opened for reading only if that was not wanted.
/// Without waiting: a FIFO with no writer must not hold up the monitor.
fn open_file(options: &FileOptions) -> Result<(File, Option<Error>)> {
    if let Some(fd) = &options.opened {
        return adopt(options, fd);
    }
    let flags =
        libc::O_CLOEXEC | libc::O_NONBLOCK | if options.direct { libc::O_DIRECT } else { 0 };
    let open = |write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(&options.path)
    };
    let refused = match open(!options.read_only) {
        Ok(file) if options.read_only || !syscalls::is_read_only_device(file.as_fd()) => {
            return Ok((file, None));
        }
        // The kernel opens it for writing, and fails every write.
        Ok(_) => device_not_writable(),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EACCES | libc::EROFS | libc::EPERM)
            ) =>
        {
            could_not_open(&options.path, &e)
        }
        Err(e) => return Err(could_not_open(&options.path, &e)),
    };
    if options.read_only || !options.auto_read_only {
        return Err(refused);
    }
    let file = open(false).map_err(|e| could_not_open(&options.path, &e))?;
    Ok((file, Some(refused)))
}

/// QEMU's sentence for a block device that is read-only as a whole.
pub(super) fn device_not_writable() -> Error {
    Error::new(
        ErrorKind::Io,
        "The device is not writable: Permission denied".to_owned(),
    )
}

/// A descriptor that was passed: whoever opened it chose the access, `cache.direct` is ours.
fn adopt(options: &FileOptions, fd: &OwnedFd) -> Result<(File, Option<Error>)> {
    use rustix::fs::OFlags;
    let own = || -> std::io::Result<File> {
        let file = File::from(fd.try_clone()?);
        let mut flags = rustix::fs::fcntl_getfl(&file)?;
        flags.set(OFlags::DIRECT, options.direct);
        rustix::fs::fcntl_setfl(&file, flags)?;
        Ok(file)
    };
    let file = own().map_err(|e| could_not_open(&options.path, &e))?;
    if options.read_only || !syscalls::is_read_only_device(file.as_fd()) {
        return Ok((file, None));
    }
    match options.auto_read_only {
        true => Ok((file, Some(device_not_writable()))),
        false => Err(device_not_writable()),
    }
}

/// From here on the ring may wait for the file: with `O_NONBLOCK` it would
/// answer `EAGAIN` for ever on file systems that cannot say "not now".
fn blocking(file: &File) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags & !rustix::fs::OFlags::NONBLOCK)?;
    Ok(())
}

fn device_len(mut file: &File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0))
}

/// What the kernel says it needs; otherwise what reading tells.
pub(super) fn direct_align(fd: BorrowedFd<'_>) -> u32 {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let asked = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(stat) = asked
        && stat.stx_dio_offset_align > 0
    {
        return stat
            .stx_dio_offset_align
            .max(stat.stx_dio_mem_align)
            .clamp(512, 4096);
    }
    let Ok(dup) = fd.try_clone_to_owned() else {
        return 4096;
    };
    let mut buf = Buf::zeroed(4096);
    // An empty file reads at any alignment, and so tells nothing.
    match File::from(dup).read_at(&mut buf.as_mut_slice()[..512], 0) {
        Ok(1..) => 512,
        Ok(0) | Err(_) => 4096,
    }
}
