//! Memory of a request that something outside this crate carries out.
//!
//! A [`Landing`] is where a read puts its bytes, a [`Payload`] what a write takes them from. Both
//! keep the memory alive; neither lets two sides have it at once. Invariant: whoever waits for a
//! read sees its end only after the [`Landing`] is gone, so nothing is written behind its back.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::buffer::IoMem;
use crate::Errno;

/// Where a read puts its bytes. Dropped without [`Landing::finish`], the read failed.
#[derive(Debug)]
pub struct Landing {
    mem: IoMem,
    len: usize,
    done: oneshot::Sender<Result<(), Errno>>,
}

/// The end of a read.
#[derive(Debug)]
pub(crate) struct Landed(oneshot::Receiver<Result<(), Errno>>);

impl Future for Landed {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(cx)
            .map(|end| end.unwrap_or(Err(Errno::Io)))
    }
}

impl Landing {
    pub(crate) fn new(mem: IoMem) -> (Self, Landed) {
        let (done, end) = oneshot::channel();
        let len = mem.len();
        (Self { mem, len, done }, Landed(end))
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Put bytes at `at`; what lies outside is left out.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let len = bytes.len().min(self.len.saturating_sub(at));
        self.part(at, len, |mem| mem.copy_from(&bytes[..len]));
    }

    /// Put zeroes at `at`; what lies outside is left out.
    pub fn zero(&mut self, at: usize, len: usize) {
        let len = len.min(self.len.saturating_sub(at));
        self.part(at, len, IoMem::fill_zero);
    }

    fn part(&mut self, at: usize, len: usize, work: impl FnOnce(&IoMem)) {
        if len == self.len {
            work(&self.mem);
        } else if len > 0 {
            work(&self.mem.part(at, len));
        }
    }

    /// The read ended; on success every byte was put.
    pub fn finish(self, result: Result<(), Errno>) {
        let Self { mem, done, .. } = self;
        drop(mem);
        // Whoever waited may have gone.
        let _ = done.send(result);
    }
}

/// What a write takes its bytes from.
#[derive(Clone, Debug)]
pub struct Payload(IoMem);

impl Payload {
    pub(crate) const fn new(mem: IoMem) -> Self {
        Self(mem)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// No bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, piece by piece.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.0.slices()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buf;

    #[tokio::test]
    async fn what_was_put_is_there_when_the_read_ends() {
        let buf = Buf::zeroed(6);
        let (mut landing, landed) = Landing::new(buf.io());
        landing.put(0, b"abc");
        landing.put(4, b"xyz");
        landing.zero(0, 1);
        landing.put(9, b"outside");
        landing.finish(Ok(()));
        assert_eq!(landed.await, Ok(()));
        assert_eq!(buf.as_slice(), b"\0bc\0xy");
    }

    #[tokio::test]
    async fn a_lost_landing_is_a_failed_read() {
        let buf = Buf::zeroed(1);
        let (landing, landed) = Landing::new(buf.io());
        drop(landing);
        assert_eq!(landed.await, Err(Errno::Io));
    }

    #[test]
    fn a_payload_keeps_what_it_was_made_from() {
        let mut buf = Buf::from_slice(b"old");
        let payload = Payload::new(buf.io());
        buf.as_mut_slice().copy_from_slice(b"new");
        assert_eq!(payload.slices().collect::<Vec<_>>().concat(), b"old");
    }
}
