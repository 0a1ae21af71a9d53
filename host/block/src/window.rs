//! `raw`: a window of another node, which can be exchanged while it is used.
//!
//! Any thread. Each request takes the window as it is when the request comes, and ends there. The
//! control plane exchanges it and then waits until nobody is in the old one: no request is held
//! up or lost. Invariant: whoever asks, and whatever for, nothing outside of the window is read
//! or changed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use crate::{ByteRange, Errno, Node};

/// How often it is looked whether the old window is empty: leaving does not signal.
const LEAVING_POLL: Duration = Duration::from_micros(200);

/// A place in another node.
#[derive(Clone, Debug)]
pub struct Window {
    /// The node behind it.
    pub child: Arc<Node>,
    /// Where the window starts.
    pub offset: u64,
    /// How long it is; `None`: to the end.
    pub size: Option<u64>,
}

impl Window {
    /// All of a node.
    pub(crate) const fn whole(child: Arc<Node>) -> Self {
        Self {
            child,
            offset: 0,
            size: None,
        }
    }

    /// Where a request of `len` bytes begins in the child, and how many of them the window shows:
    /// those behind read as zeroes.
    pub(crate) fn shown(&self, offset: u64, len: u64) -> Result<(u64, u64), Errno> {
        let at = self.offset.checked_add(offset).ok_or(Errno::Inval)?;
        let shown = self.size.map_or(len, |size| size.saturating_sub(offset));
        Ok((at, shown.min(len)))
    }

    /// The range in the child.
    ///
    /// # Errors
    /// `NoSpc`: it does not end inside the window.
    pub(crate) fn place(&self, range: ByteRange) -> Result<ByteRange, Errno> {
        if self.size.is_some_and(|size| range.end() > size) {
            return Err(Errno::NoSpc);
        }
        let offset = range.offset().checked_add(self.offset);
        let moved = offset.and_then(|offset| ByteRange::new(offset, range.len()));
        moved.ok_or(Errno::Inval)
    }
}

/// The window of a node.
#[derive(Debug)]
pub struct RawWindow(ArcSwap<Window>);

impl RawWindow {
    pub(crate) fn new(window: Window) -> Self {
        Self(ArcSwap::from_pointee(window))
    }

    /// As it is now, for a moment.
    pub(crate) fn now(&self) -> Guard<Arc<Window>> {
        self.0.load()
    }

    /// As it is now, for as long as a request takes.
    #[must_use]
    pub fn get(&self) -> Arc<Window> {
        self.0.load_full()
    }

    /// Another window, for all requests that come from now on.
    pub fn exchange(&self, window: Window) -> OldWindow {
        OldWindow(self.0.swap(Arc::new(window)))
    }
}

/// A window that no new request enters.
#[derive(Debug)]
pub struct OldWindow(Arc<Window>);

impl OldWindow {
    /// Waits until the requests in it have ended. Limits of throttles do not hold them up.
    pub async fn left(self) {
        let _passing = self.0.child.drain_throttles();
        while Arc::strong_count(&self.0) > 1 {
            tokio::time::sleep(LEAVING_POLL).await;
        }
    }
}
