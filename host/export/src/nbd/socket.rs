//! Bytes through a registered socket, for whoever has nothing else to do meanwhile.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::unix::AsyncFd;

/// Receives what there is; 0 at the end of the stream.
///
/// # Errors
/// The system's.
pub(super) async fn receive(fd: &AsyncFd<OwnedFd>, buf: &mut [u8]) -> Result<usize, Errno> {
    loop {
        let mut ready = fd.readable().await.map_err(errno)?;
        match rustix::net::recv(fd, &mut *buf, RecvFlags::DONTWAIT) {
            Ok((n, _)) => return Ok(n),
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends all of it.
///
/// # Errors
/// The system's.
pub(super) async fn send(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await.map_err(errno)?;
        match rustix::net::send(fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A system's error without its decoration.
pub(super) fn errno(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}
