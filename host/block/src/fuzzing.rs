//! Entry points for fuzzers: bytes in, nothing out, no panic, bounded memory.
//!
//! Not used by a daemon. The assertions behind them are this crate's promises; breaking one is a
//! find.

/// The extent verifier: a conversation with a plugin that says anything.
pub fn verifier(bytes: &[u8]) {
    crate::image::fuzz_verifier(bytes);
}
