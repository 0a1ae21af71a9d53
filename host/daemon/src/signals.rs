//! Signals: INT, HUP and TERM end the daemon as `quit` does; a second one ends it at once.
//!
//! SIGPIPE is ignored by Rust's runtime already.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that end the daemon.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    hangup: Signal,
    terminate: Signal,
}

impl Signals {
    /// Catches them from now on.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn catch() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next one's name.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
