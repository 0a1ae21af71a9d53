//! `outport:plugin/log`: lines of a plugin, cut, cleaned and rationed.
//!
//! The last error line of a call is kept even when it is over the ration: it is
//! the panic's message if the call traps.

use super::generated::outport::plugin::log::{self, Level};
use crate::limits::{MESSAGE_BYTES_MAX, sentence};
use crate::store::HostState;

/// Where plugins' lines go in `RUST_LOG` terms.
const TARGET: &str = "outport::plugin";

impl log::Host for HostState {
    fn log(&mut self, level: Level, message: String) {
        let message = sentence(message, MESSAGE_BYTES_MAX);
        if self.log.take() {
            let (plugin, user) = (&*self.plugin, &*self.granted.user);
            let dropped = std::mem::take(&mut self.log.dropped);
            if dropped > 0 {
                tracing::warn!(target: TARGET, plugin, user, dropped, "log lines were dropped");
            }
            match level {
                Level::Debug => tracing::debug!(target: TARGET, plugin, user, "{message}"),
                Level::Info => tracing::info!(target: TARGET, plugin, user, "{message}"),
                Level::Warn => tracing::warn!(target: TARGET, plugin, user, "{message}"),
                Level::Error => tracing::error!(target: TARGET, plugin, user, "{message}"),
            }
        }
        if level == Level::Error {
            self.call.last_error = Some(message);
        }
    }
}
