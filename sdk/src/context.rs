//! What a plugin may call while it runs: its files ([`Files`]) and, where it
//! may write, the transaction of the running call ([`Txn`]).
//!
//! Both are traits so that plugin logic is tested natively against an in-memory
//! host; in a component they stand for the imports of `host.wit`.

use crate::{ByteRange, Result};

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// For the plugin's author.
    Debug,
    /// Worth a line.
    Info,
    /// The operator should know.
    Warn,
    /// The operator must act.
    Error,
}

/// The granted files of one image, by slot; slot 0 is the image itself.
pub trait Files {
    /// Length of the file in bytes, as this node sees it.
    fn size(&self, slot: u32) -> Result<u64>;

    /// Read metadata: fills `buf` from `offset`; bytes past the end read as
    /// zero. At most 2 MiB. Sees every metadata write of this node, also those
    /// queued by the running call.
    fn read_into(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// The next range at or after `offset` that holds data (a hint).
    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>>;

    /// One log line; the host adds plugin and node.
    fn log(&self, level: LogLevel, message: &str);

    /// Report damage. `fatal`: the node must refuse writes from now on.
    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool);

    /// [`Files::read_into`] with a buffer of its own.
    fn read(&self, slot: u32, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buf = vec![0; len];
        self.read_into(slot, offset, &mut buf)?;
        Ok(buf)
    }
}

/// When a queued write must be durable relative to others (`host.wit`, `txn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Nothing durable points at it yet: new tables, counts going up.
    Prepare,
    /// Makes new state reachable, or old state unreachable.
    Mapping,
}

/// The transaction of the running call. Everything is queued, and applied only
/// if the call returns `Ok`.
pub trait Txn: Files {
    /// Queue `data` (at most 2 MiB) for `offset`.
    fn write(&mut self, slot: u32, stage: Stage, offset: u64, data: &[u8]) -> Result<()>;

    /// Queue zero bytes, any length.
    fn zero(&mut self, slot: u32, stage: Stage, range: ByteRange) -> Result<()>;

    /// Let the file be at least `size` bytes long.
    fn grow(&mut self, slot: u32, size: u64) -> Result<()>;

    /// Nothing points at `range` once this call's mapping writes are durable;
    /// the host calls `reclaim` with it later. Not to be reused before that.
    fn free(&mut self, slot: u32, range: ByteRange) -> Result<()>;

    /// Cut the file down once the mapping stage is durable.
    fn truncate(&mut self, slot: u32, size: u64) -> Result<()>;

    /// This transaction as plain [`Files`].
    fn files(&self) -> &dyn Files;
}
