//! The engine: iothreads, their rings, the thread pool, and buffers.
//!
//! Data plane. A file operation that can be answered from the page cache never
//! comes here (`file` does it inline); what must wait is queued on the calling
//! iothread's ring, or on the pool; what its requester abandons is finished in
//! the background. All `unsafe` of the block layer is in this folder.

pub(crate) mod background;
pub mod buffer;
mod completion;
mod iothread;
mod iov;
mod lanes;
mod op;
pub mod polling;
mod pool;
mod racing;
mod reactor;
pub(crate) mod syscalls;
pub mod transfer;
mod uring;

#[cfg(test)]
pub(crate) use completion::{Completion, OpFuture};
pub(crate) use iothread::submit;
pub use iothread::{Aio, IoThread};
pub(crate) use op::{Op, OpKind};
pub use reactor::{READABLE, register, register_readable};
