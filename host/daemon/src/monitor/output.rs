//! What a client is still to be sent: a bounded queue of bytes.
//!
//! Filled by the dispatcher and by events, emptied by the client's connection. Nobody who fills it
//! waits: a client that does not read holds up only itself, and is dropped in the end.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use outport_qmp::wire;
use serde::Serialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// With more than this to read first, a client's next command waits. Enough for the largest answer
/// (`query-qmp-schema` has some 30 KiB) many times over.
pub(crate) const COMMANDS_WAIT_BYTES: usize = 1 << 20;

/// With more than this to read, a client is dropped: only events can grow the queue past
/// [`COMMANDS_WAIT_BYTES`], and one that reads has them in milliseconds.
pub(crate) const PENDING_BYTES_MAX: usize = 16 << 20;

/// A client that reads nothing for so long while a command of its own waits is dropped.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(10);

/// Bytes handed to the socket at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// The queue of one client.
#[derive(Debug)]
pub(crate) struct Output {
    monitor: String,
    pretty: bool,
    pending: RefCell<VecDeque<u8>>,
    receives_events: Cell<bool>,
    closed: Cell<bool>,
    filled: Notify,
    emptied: Notify,
    shut: Notify,
}

impl Output {
    pub(crate) fn new(monitor: &str, pretty: bool) -> Self {
        Self {
            monitor: monitor.to_owned(),
            pretty,
            pending: RefCell::default(),
            receives_events: Cell::new(false),
            closed: Cell::new(false),
            filled: Notify::new(),
            emptied: Notify::new(),
            shut: Notify::new(),
        }
    }

    /// The client has negotiated: from now on it hears of events.
    pub(crate) fn start_events(&self) {
        self.receives_events.set(true);
    }

    pub(crate) fn receives_events(&self) -> bool {
        self.receives_events.get() && !self.closed.get()
    }

    /// Queues a message.
    pub(crate) fn push(&self, message: &impl Serialize) {
        if self.closed.get() {
            return;
        }
        let bytes = if self.pretty {
            wire::pretty(message)
        } else {
            wire::line(message)
        };
        let mut pending = self.pending.borrow_mut();
        // The answer to one command may be of any length: only what is on top of a full queue is
        // too much.
        if pending.len() > PENDING_BYTES_MAX {
            drop(pending);
            self.drop_client("it does not read what it is sent");
            return;
        }
        pending.extend(bytes);
        self.filled.notify_one();
    }

    /// Nothing more can be sent; whoever waits goes on.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.pending.borrow_mut().clear();
        self.filled.notify_one();
        self.emptied.notify_waiters();
        self.shut.notify_one();
    }

    /// Resolves when the client is not served any more, even if a write to it is stuck.
    pub(crate) async fn shut(&self) {
        while !self.is_closed() {
            self.shut.notified().await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    fn drop_client(&self, reason: &str) {
        tracing::warn!(monitor = self.monitor, reason, "monitor client dropped");
        self.close();
    }

    /// Waits until the client has read enough to be answered again; drops it if it stalls.
    pub(crate) async fn room(&self) {
        let mut left = self.len();
        while left > COMMANDS_WAIT_BYTES && !self.is_closed() {
            let emptied = self.emptied.notified();
            if tokio::time::timeout(STALL_MAX, emptied).await.is_err() && self.len() >= left {
                self.drop_client("it does not read the answers to its commands");
            }
            left = self.len();
        }
    }

    /// Waits until everything was handed to the client.
    pub(crate) async fn drained(&self) {
        while self.len() > 0 && !self.is_closed() {
            self.emptied.notified().await;
        }
    }

    /// Hands over what is queued until the client cannot take more.
    pub(crate) async fn write_to(&self, writer: &mut (impl AsyncWrite + Unpin)) {
        loop {
            let chunk = self.chunk();
            if chunk.is_empty() {
                if self.is_closed() {
                    return;
                }
                self.filled.notified().await;
                continue;
            }
            if writer.write_all(&chunk).await.is_err() || writer.flush().await.is_err() {
                self.close();
                return;
            }
            let mut pending = self.pending.borrow_mut();
            let sent = chunk.len().min(pending.len());
            pending.drain(..sent);
            drop(pending);
            self.emptied.notify_waiters();
        }
    }

    fn len(&self) -> usize {
        self.pending.borrow().len()
    }

    fn chunk(&self) -> Vec<u8> {
        let pending = self.pending.borrow();
        pending.iter().take(CHUNK_BYTES).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[tokio::test]
    async fn what_is_pushed_comes_out_in_order() {
        let output = Rc::new(Output::new("c", false));
        output.push(&1);
        output.push(&2);
        let mut bytes = Vec::new();
        tokio::select! {
            () = output.write_to(&mut bytes) => panic!("it goes on"),
            () = output.drained() => {}
        }
        assert_eq!(bytes, b"1\r\n2\r\n");
    }

    #[tokio::test]
    async fn a_client_that_never_reads_is_dropped() {
        let output = Output::new("c", false);
        let big = "x".repeat(1 << 20);
        for _ in 0..16 {
            output.push(&big);
            assert!(!output.is_closed());
        }
        output.push(&"one more");
        assert!(output.is_closed());
        assert_eq!(output.len(), 0);
        // Nobody waits for it any more.
        output.room().await;
        output.drained().await;
    }
}
