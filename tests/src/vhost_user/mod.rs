//! A vhost-user front-end and its guest, byte by byte: whatever a real one does, and what none
//! should.
//!
//! Guest memory is a memfd that is read and written by system calls, so nothing here is unsafe and
//! a test can put anything anywhere.

mod front_end;
mod guest;
mod queue;

pub use front_end::{FrontEnd, Message, Refusal, features, protocol, request};
pub use guest::Guest;
pub use queue::{Blk, Desc, NEXT, Packed, Split, TABLE, WRITE, blk};
