//! `outport:plugin/health`: damage that a plugin found in an image goes to the
//! node, which emits `BLOCK_IMAGE_CORRUPTED`.

use super::generated::outport::plugin::health::{self, Corruption};
use crate::limits::{MESSAGE_BYTES_MAX, sentence};
use crate::store::HostState;

impl health::Host for HostState {
    fn corrupt(&mut self, what: Corruption) {
        // A fatal one is never dropped: it protects the image.
        match self.call.corruptions_left.checked_sub(1) {
            Some(left) => self.call.corruptions_left = left,
            None if what.fatal => {}
            None => return,
        }
        let message = sentence(what.message, MESSAGE_BYTES_MAX);
        self.granted
            .files
            .corrupt(&message, what.offset, what.size, what.fatal);
    }
}
