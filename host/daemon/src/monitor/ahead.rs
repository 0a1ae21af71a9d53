//! Messages of a client that wait while a command of it runs.
//!
//! Without the capability `oob` a client has one message in the daemon at a time. With it some more
//! are read, so that one with `exec-oob` is answered before the command that runs has ended.
//! Invariant: what waits is bounded in messages and in bytes.

use outport_qmp::wire::ParseError;
use serde_json::Value;
use tokio::sync::mpsc;

/// A message, or what is wrong with it.
pub(super) type Message = Result<Value, ParseError>;

/// Messages that may wait (QEMU's limit); then the client is not read.
const MESSAGES_MAX: usize = 8;

/// With more bytes than this read, all messages before have to start first: a value takes more
/// memory than its text, and one of them may be as large as messages get.
const BYTES_MAX: usize = 1 << 20;

/// The end that is filled.
pub(super) struct Ahead {
    queue: mpsc::Sender<Message>,
    bytes: usize,
}

/// An empty queue.
pub(super) fn queue() -> (Ahead, mpsc::Receiver<Message>) {
    let (queue, queued) = mpsc::channel(MESSAGES_MAX);
    (Ahead { queue, bytes: 0 }, queued)
}

impl Ahead {
    /// Adds a message, once there is a place; `false`: nobody takes messages any more.
    pub(super) async fn push(&self, message: Message) -> bool {
        self.queue.send(message).await.is_ok()
    }

    /// Counts bytes that were read, and waits if they are too many.
    pub(super) async fn read(&mut self, bytes: usize) {
        if self.queue.capacity() == MESSAGES_MAX {
            self.bytes = 0;
        }
        self.bytes += bytes;
        if self.bytes > BYTES_MAX {
            // All places are free when nothing waits.
            let _empty_or_over = self.queue.reserve_many(MESSAGES_MAX).await;
            self.bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_waits_is_bounded() {
        let (mut ahead, mut queued) = queue();
        for n in 0..MESSAGES_MAX {
            assert!(ahead.push(Ok(n.into())).await);
        }
        tokio::select! {
            biased;
            _ = ahead.push(Ok(0.into())) => panic!("there is a place"),
            first = queued.recv() => assert_eq!(first.unwrap().unwrap(), 0),
        }
        ahead.read(BYTES_MAX).await;
        tokio::select! {
            biased;
            () = ahead.read(1) => panic!("there is room"),
            () = async { for _ in 1..MESSAGES_MAX { queued.recv().await.unwrap().unwrap(); } } => {}
        }
        ahead.read(BYTES_MAX).await;
        drop(queued);
        assert!(!ahead.push(Ok(0.into())).await);
    }
}
