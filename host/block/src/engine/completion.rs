//! The result of one operation, and who waits for it.
//!
//! The engine keeps the [`Completion`], on whatever thread the operation ends; the requester, or
//! `background` once the requester left, polls the [`OpFuture`]. Invariant: whoever polled last is
//! woken when the result is there.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::sync::Mutex;

#[derive(Debug, Default)]
struct Slot {
    result: Option<i32>,
    waker: Option<Waker>,
}

/// Where a result is put.
#[derive(Clone, Debug, Default)]
pub(crate) struct Completion(Arc<Mutex<Slot>>);

impl Completion {
    /// Deliver; wakes whoever waits.
    pub(crate) fn set(&self, result: i32) {
        let waker = {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            slot.result = Some(result);
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The result of an operation: `-errno`, or bytes transferred.
#[derive(Debug)]
pub(crate) struct OpFuture(Completion);

impl OpFuture {
    /// A future and the cell that completes it.
    pub(crate) fn new() -> (Self, Completion) {
        let cell = Completion::default();
        (Self(cell.clone()), cell)
    }
}

impl Future for OpFuture {
    type Output = i32;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let mut slot = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(result) = slot.result {
            return Poll::Ready(result);
        }
        match &slot.waker {
            Some(w) if w.will_wake(cx.waker()) => {}
            _ => slot.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}
