//! A record of what reached a file, for crash tests: which writes were issued,
//! which had completed, and which flushes covered them.

mod crash;

use std::sync::{Mutex, PoisonError};

use crate::ByteRange;
use crate::engine::buffer::IoMem;

pub use crash::{CrashImage, CrashImages, Limits, crash_images};

/// One event, in the order it happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A write was issued.
    Write {
        /// Names it.
        id: u64,
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// A range was issued to be zeroed; the file does not get longer.
    Zero {
        /// Names it.
        id: u64,
        /// Where.
        range: ByteRange,
    },
    /// The length was set.
    Truncate(u64),
    /// The length became at least this.
    Grow(u64),
    /// The write or zero completed.
    Done(u64),
    /// The write is durable by itself (FUA).
    Durable(u64),
    /// A flush was issued.
    Flush(u64),
    /// The flush completed: all that was done before it was issued is durable.
    Flushed(u64),
    /// A mark set by the test.
    Mark(u64),
}

/// The record of one file.
#[derive(Debug, Default)]
pub struct Trace(Mutex<(u64, Vec<Event>)>);

impl Trace {
    fn push(&self, make: impl FnOnce(u64) -> Event) -> u64 {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.0 += 1;
        let id = inner.0;
        let event = make(id);
        inner.1.push(event);
        id
    }

    pub(crate) fn write(&self, offset: u64, mem: &IoMem) -> u64 {
        let mut data = vec![0; mem.len()];
        mem.copy_to(&mut data);
        self.push(|id| Event::Write { id, offset, data })
    }

    pub(crate) fn zero(&self, range: ByteRange) -> u64 {
        self.push(|id| Event::Zero { id, range })
    }

    pub(crate) fn truncate(&self, len: u64) {
        self.push(|_| Event::Truncate(len));
    }

    pub(crate) fn grow(&self, len: u64) {
        self.push(|_| Event::Grow(len));
    }

    pub(crate) fn written(&self, id: u64) {
        self.push(|_| Event::Done(id));
    }

    pub(crate) fn durable(&self, id: u64) {
        self.push(|_| Event::Durable(id));
    }

    pub(crate) fn flush(&self) -> u64 {
        self.push(Event::Flush)
    }

    pub(crate) fn flushed(&self, id: u64) {
        self.push(|_| Event::Flushed(id));
    }

    /// Leave a mark of the test's own.
    pub fn mark(&self, mark: u64) {
        self.push(|_| Event::Mark(mark));
    }

    /// Everything so far.
    pub fn events(&self) -> Vec<Event> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone()
    }
}
