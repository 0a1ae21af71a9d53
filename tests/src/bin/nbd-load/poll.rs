//! A thin epoll for a thread with several connections.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::connection::Connection;

/// Waits for any of a set of connections, by their index.
pub(crate) struct Epoll {
    epoll: OwnedFd,
    /// Which connections also wait for room to send.
    output: Vec<Cell<bool>>,
}

impl Epoll {
    /// Makes the connections non-blocking and watches them for input.
    pub(crate) fn new(connections: &mut [Connection]) -> io::Result<Self> {
        // SAFETY: epoll_create1 takes no pointer.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let output = connections.iter().map(|_| Cell::new(false)).collect();
        let this = Self { epoll, output };
        for (at, connection) in connections.iter_mut().enumerate() {
            connection.socket().set_nonblocking(true)?;
            this.control(libc::EPOLL_CTL_ADD, connection, at, libc::EPOLLIN)?;
        }
        Ok(this)
    }

    /// Watches for room to send exactly while the connection has something to send.
    pub(crate) fn want_output(&self, connection: &mut Connection, at: usize) -> io::Result<()> {
        let wanted = connection.has_output();
        if self.output[at].replace(wanted) == wanted {
            return Ok(());
        }
        let events = libc::EPOLLIN | if wanted { libc::EPOLLOUT } else { 0 };
        self.control(libc::EPOLL_CTL_MOD, connection, at, events)
    }

    /// Sleeps until something is ready and lists it.
    pub(crate) fn wait(&self, ready: &mut Vec<usize>) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        let fd = self.epoll.as_raw_fd();
        // SAFETY: the pointer and count are those of `events`, which outlives the call.
        let got = check(unsafe { libc::epoll_wait(fd, events.as_mut_ptr(), 64, -1) });
        ready.clear();
        match got {
            Ok(count) => {
                ready.extend(
                    events[..count as usize]
                        .iter()
                        .map(|event| event.u64 as usize),
                );
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn control(&self, what: i32, whom: &mut Connection, at: usize, events: i32) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: at as u64,
        };
        let (epoll, fd) = (self.epoll.as_raw_fd(), whom.socket().as_raw_fd());
        // SAFETY: both descriptors are open, and `event` outlives the call.
        check(unsafe { libc::epoll_ctl(epoll, what, fd, &mut event) }).map(drop)
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
