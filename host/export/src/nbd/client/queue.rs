//! What waits to be sent: the only thing that requesters and the link share.
//!
//! Filled from any thread, emptied by the link. Invariant: while the queue does not take requests,
//! it holds none, and each that comes is answered at once. Its length is bounded by those who fill
//! it: a front-end bounds what its clients have in flight.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outport_block::Errno;
use outport_block::engine::transfer::{Landing, Payload};
use tokio::sync::{Notify, oneshot};

use super::super::wire::{Command, CommandFlags};
use super::receiver::Extent;

/// So long a server may take to answer what it has when the node is closed, and be silent when
/// the daemon ends.
pub(super) const CLOSE_MAX: Duration = Duration::from_secs(2);

/// What comes with a request, and who waits for it.
#[derive(Debug)]
pub(super) enum Body {
    /// A read.
    Read(Landing),
    /// A write.
    Write(Payload, oneshot::Sender<Result<(), Errno>>),
    /// Anything else that only succeeds or fails.
    Plain(oneshot::Sender<Result<(), Errno>>),
    /// A block status.
    Status(oneshot::Sender<Result<Option<Extent>, Errno>>),
}

/// A request.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) body: Body,
}

impl Submission {
    /// Answers it. Whoever asked may have gone.
    pub(super) fn answer(self, outcome: Result<Option<Extent>, Errno>) {
        let plain = outcome.map(|_| ());
        match self.body {
            Body::Read(landing) => landing.finish(plain),
            Body::Write(_, done) | Body::Plain(done) => drop(done.send(plain)),
            Body::Status(done) => drop(done.send(outcome)),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    /// Requests are sent, or wait for a connection.
    #[default]
    Taking,
    /// Requests fail: there has been no connection for too long.
    Failing,
    /// The node was closed, or the server must not be spoken to.
    Closed,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<Submission>,
    state: State,
    /// The daemon ends: a server that does not answer is not waited for.
    hurried: bool,
}

/// The queue of one node.
#[derive(Debug, Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    /// Something was queued, or the state changed.
    pub(super) wake: Notify,
    /// The link has ended.
    pub(super) ended: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request, or answers it.
    pub(super) fn push(&self, submission: Submission) {
        let mut inner = self.lock();
        if inner.state == State::Taking {
            inner.waiting.push_back(submission);
            drop(inner);
            self.wake.notify_one();
        } else {
            drop(inner);
            submission.answer(Err(Errno::Io));
        }
    }

    /// The next request.
    pub(super) fn pop(&self) -> Option<Submission> {
        self.lock().waiting.pop_front()
    }

    /// Puts requests back that were sent and not answered; they go first, in their order.
    pub(super) fn put_back(&self, sent: Vec<Submission>) {
        let mut inner = self.lock();
        if inner.state == State::Taking {
            for submission in sent.into_iter().rev() {
                inner.waiting.push_front(submission);
            }
            return;
        }
        drop(inner);
        for submission in sent {
            submission.answer(Err(Errno::Io));
        }
    }

    /// Takes requests again.
    pub(super) fn take_requests(&self) {
        let mut inner = self.lock();
        if inner.state == State::Failing {
            inner.state = State::Taking;
        }
    }

    /// Fails what waits and what comes.
    pub(super) fn fail_requests(&self) {
        self.stop(State::Failing);
    }

    /// The same, for good.
    pub(super) fn close(&self) {
        self.stop(State::Closed);
        self.wake.notify_one();
    }

    /// From now on a server that is silent is given up, with what it was asked.
    pub(super) fn hurry(&self) {
        self.lock().hurried = true;
        self.wake.notify_one();
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.lock().hurried
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().state == State::Closed
    }

    fn stop(&self, state: State) {
        let mut inner = self.lock();
        if inner.state != State::Closed {
            inner.state = state;
        }
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        for submission in waiting {
            submission.answer(Err(Errno::Io));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flush() -> (Submission, oneshot::Receiver<Result<(), Errno>>) {
        let (done, end) = oneshot::channel();
        let submission = Submission {
            command: Command::FLUSH,
            flags: CommandFlags::empty(),
            offset: 0,
            length: 0,
            body: Body::Plain(done),
        };
        (submission, end)
    }

    #[tokio::test]
    async fn requests_wait_fail_and_wait_again() {
        let queue = Queue::default();
        let (one, first) = flush();
        let (two, second) = flush();
        queue.push(one);
        queue.push(two);
        let sent = vec![queue.pop().unwrap()];
        queue.put_back(sent);
        queue.pop().unwrap().answer(Ok(None));
        assert_eq!(
            first.await,
            Ok(Ok(())),
            "what was sent first goes first again"
        );
        queue.fail_requests();
        assert_eq!(second.await, Ok(Err(Errno::Io)));
        let (three, third) = flush();
        queue.push(three);
        assert_eq!(third.await, Ok(Err(Errno::Io)));
        queue.take_requests();
        let (four, _fourth) = flush();
        queue.push(four);
        assert!(queue.pop().is_some());
        queue.close();
        queue.take_requests();
        assert!(queue.is_closed());
    }
}
