//! `raw`: a window of another node, which can be exchanged while it is used.
//!
//! Any thread. Each request takes the window as it is when the request comes, and ends there. The
//! control plane exchanges it and then waits until nobody is in the old one: no request is held
//! up or lost.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use crate::Node;

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
