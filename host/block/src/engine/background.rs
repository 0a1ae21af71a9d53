//! Work that runs to its end, whoever still waits for it.
//!
//! A client may go away in the middle of a write. Its operation may be in the
//! kernel, its space reserved, the plugin half-way through a call: nobody can
//! stop there. So every operation that changes something is wrapped in
//! [`Finish`]: dropped before it was polled it never happened, dropped later it
//! moves to one thread that does nothing but finish such work.
//!
//! ```text
//!   request task -- polls --> Finish { work } -- drop --> "io-finish" thread
//! ```
//!
//! Invariant: locks, passes and reservations that the work holds are given up
//! by the work itself, after its last operation completed. Only its own panic ends
//! it before: that of a sibling, whose unwinding drops it, makes it move.

use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A future that is finished elsewhere if it is dropped midway.
pub(crate) struct Finish<T: Send + 'static> {
    work: Option<Work<T>>,
    /// Polled once, or promised to run: it can no longer be forgotten.
    begun: bool,
    /// It is being polled; still set after that: it panicked.
    polled: bool,
}

impl<T: Send + 'static> Finish<T> {
    /// Nothing happens unless it is polled; then all of it happens.
    pub(crate) fn new(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self {
            work: Some(Box::pin(work)),
            begun: false,
            polled: false,
        }
    }
}

impl<T: Send + 'static> Future for Finish<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        this.begun = true;
        let Some(work) = this.work.as_mut().filter(|_| !this.polled) else {
            // Polled again after it was ready, or after it panicked: a caller's mistake.
            return Poll::Pending;
        };
        this.polled = true;
        let result = work.as_mut().poll(cx);
        this.polled = false;
        if result.is_ready() {
            this.work = None;
        }
        result
    }
}

impl<T: Send + 'static> Drop for Finish<T> {
    fn drop(&mut self) {
        // Work that panicked is in no state to go on. The panic of somebody else, in whose
        // unwinding it is dropped, is no reason to stop it.
        if !self.begun || self.polled {
            return;
        }
        if let Some(work) = self.work.take() {
            adopt(Box::pin(async move {
                work.await;
            }));
        }
    }
}

/// Run the work on this thread's runtime, or anywhere if there is none; its end
/// does not depend on the caller.
pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) {
    let mut work = Finish::new(work);
    work.begun = true;
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => {
            runtime.spawn(work);
        }
        Err(_) => drop(work),
    }
}

fn adopt(work: Work<()>) {
    static THREAD: LazyLock<Option<mpsc::UnboundedSender<Work<()>>>> = LazyLock::new(|| {
        let (tx, mut rx) = mpsc::unbounded_channel::<Work<()>>();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .ok()?;
        let run = move || {
            runtime.block_on(async move {
                while let Some(work) = rx.recv().await {
                    tokio::spawn(work);
                }
            });
        };
        let thread = std::thread::Builder::new().name("io-finish".to_owned());
        thread.spawn(run).ok().map(|_| tx)
    });
    match &*THREAD {
        Some(thread) => {
            let _ = thread.send(work);
        }
        None => tracing::error!("abandoned work cannot be finished: no thread can be had"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn dropped_midway_it_is_finished_elsewhere() {
        let (go, wait) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel::<()>();
        let mut work = Finish::new(async move {
            let _ = wait.await;
            let _ = tell.send(());
        });
        let once = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut work).poll(cx)));
        assert!(once.await.is_pending());
        drop(work);
        go.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(10), told)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn dropped_before_it_began_it_never_happens() {
        let (tell, told) = oneshot::channel::<()>();
        drop(Finish::new(async move {
            let _ = tell.send(());
        }));
        told.await.unwrap_err();
    }

    #[tokio::test]
    async fn a_panic_of_a_sibling_does_not_stop_it() {
        let (go, wait) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel::<()>();
        let work = Finish::new(async move {
            let _ = wait.await;
            let _ = tell.send(());
        });
        let sibling = async { panic!("a planted panic") };
        let both = tokio::spawn(futures_util::future::join(work, sibling));
        assert!(both.await.unwrap_err().is_panic());
        let _ = go.send(());
        tokio::time::timeout(Duration::from_secs(10), told)
            .await
            .unwrap()
            .unwrap();
    }

    #[test]
    fn work_that_panicked_is_not_polled_again() {
        let (polled, polls) = std::sync::mpsc::channel();
        let mut work = Finish::new(std::future::poll_fn(move |_| -> Poll<()> {
            polled.send(()).unwrap();
            panic!("a planted panic");
        }));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let poll = std::panic::AssertUnwindSafe(|| Pin::new(&mut work).poll(&mut cx));
        std::panic::catch_unwind(poll).unwrap_err();
        // Nobody unwinds any more.
        drop(work);
        assert_eq!(polls.recv(), Ok(()));
        polls.recv().unwrap_err();
    }
}
