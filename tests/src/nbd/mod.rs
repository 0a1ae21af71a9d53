//! A byte-level NBD client for tests: blocking, one thread, no cleverness.
//!
//! ```text
//! Address -> Haggle (options) -> Client (requests)
//! ```
//! It does exactly what the test says, also when that is wrong: that is what it is for. Sockets
//! carry a timeout, so that a server that does not answer fails the test instead of hanging it.

mod client;
mod encrypted;
mod haggle;
mod socket;
pub mod wire;

pub use client::{Chunk, Client, Extents, Request};
pub use haggle::{ANSWER_TIME_MAX, ExportInfo, Haggle, OptionReply, info_query, meta_query};
pub use socket::{Address, Socket};

use std::io::{ErrorKind, Read};

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Reads on until the peer closes (true) or stays silent for the socket's timeout (false).
fn drained_to_end(socket: &mut Socket) -> bool {
    let mut scrap = [0; 4096];
    loop {
        match socket.read(&mut scrap) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            }
        }
    }
}
