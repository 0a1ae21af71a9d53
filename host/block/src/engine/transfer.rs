//! Memory of a request that something outside this crate carries out.
//!
//! A [`Landing`] is where a read puts its bytes, a [`Payload`] what a write takes them from. Both
//! keep the memory alive; neither lets two sides have it at once. Invariants: whoever waits for a
//! read sees its end only after the [`Landing`] gave its memory up, so nothing is written behind
//! its back; a payload never changes, so what a guest wrote is copied first.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::buffer::IoMem;
use crate::Errno;

/// Where a read puts its bytes. Dropped without [`Landing::finish`], the read failed.
#[derive(Debug)]
pub struct Landing {
    /// `None`: given up.
    mem: Option<IoMem>,
    len: usize,
    /// `None`: told.
    done: Option<oneshot::Sender<Result<(), Errno>>>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.end(Err(Errno::Io));
    }
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
        let (mem, done) = (Some(mem), Some(done));
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

    fn part(&mut self, at: usize, len: usize, work: impl FnOnce(&mut IoMem)) {
        match &mut self.mem {
            Some(mem) if len == self.len => work(mem),
            Some(mem) if len > 0 => work(&mut mem.part(at, len)),
            _ => {}
        }
    }

    /// The read ended; on success every byte was put.
    pub fn finish(mut self, result: Result<(), Errno>) {
        self.end(result);
    }

    /// Gives the memory up, then tells; once.
    fn end(&mut self, result: Result<(), Errno>) {
        self.mem = None;
        if let Some(done) = self.done.take() {
            // Whoever waited may have gone.
            let _ = done.send(result);
        }
    }
}

/// What a write takes its bytes from.
#[derive(Clone, Debug)]
pub struct Payload(IoMem);

impl Payload {
    /// Bytes of a guest are copied: they would change while they are sent, and a connection that
    /// was lost would get others the second time.
    pub(crate) fn new(mem: IoMem) -> Self {
        Self(mem.settled())
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
    use std::sync::{Arc, Mutex};

    use super::super::buffer::{Piece, SharedMem};
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

    /// Told by the memory of a read that it was given up.
    struct Watched(std::sync::mpsc::Sender<bool>, Mutex<Landed>);

    impl Drop for Watched {
        fn drop(&mut self) {
            let landed = &mut self.1.lock().unwrap().0;
            let told = landed.try_recv() != Err(oneshot::error::TryRecvError::Empty);
            self.0.send(told).unwrap();
        }
    }

    #[test]
    fn memory_is_given_up_before_the_end_is_told() {
        for finish in [false, true] {
            let (tell, told) = std::sync::mpsc::channel();
            let (mut landing, landed) = Landing::new(Buf::zeroed(1).io());
            let watched = Arc::new(Watched(tell, Mutex::new(landed)));
            // SAFETY: no pieces, no memory.
            landing.mem = Some(unsafe { SharedMem::new(&[], watched) }.io());
            if finish {
                landing.finish(Ok(()));
            } else {
                drop(landing);
            }
            assert_eq!(told.recv(), Ok(false));
        }
    }

    #[test]
    fn a_payload_keeps_what_it_was_made_from() {
        let mut buf = Buf::from_slice(b"old");
        let payload = Payload::new(buf.io());
        buf.as_mut_slice().copy_from_slice(b"new");
        assert_eq!(payload.slices().collect::<Vec<_>>().concat(), b"old");
    }

    #[test]
    fn a_payload_stays_the_same_whatever_a_guest_does() {
        let memory = Arc::new(Mutex::new([*b"old"]));
        let start = memory.lock().unwrap().as_mut_ptr().cast::<u8>();
        // SAFETY: the bytes live as long as `memory`, and are only reached through `start`.
        let shared = unsafe {
            let pieces = [(0, 1), (1, 2)].map(|(at, len)| Piece::new(start.add(at), len));
            SharedMem::new(&pieces, memory)
        };
        let payload = Payload::new(shared.io());
        // SAFETY: as above; a guest writes.
        unsafe { start.copy_from_nonoverlapping(b"new".as_ptr(), 3) };
        assert_eq!(payload.slices().collect::<Vec<_>>().concat(), b"old");
        let mut now = [0; 2];
        shared.io().part(1, 2).copy_to(&mut now);
        assert_eq!(&now, b"ew", "what is copied later is what is there later");
    }
}
