//! No files at all: what a plugin is given while it is only being asked who it
//! is, what it recognises, or how large an image would be.

use std::pin::Pin;

use outport_block::format::FormatFiles;
use outport_block::{ByteRange, Errno};

/// Grants nothing, notices nothing.
#[derive(Debug)]
pub(crate) struct NoFiles;

impl FormatFiles for NoFiles {
    fn size(&self, _slot: u32) -> Result<u64, Errno> {
        Err(Errno::Access)
    }

    fn try_read(&self, _slot: u32, _offset: u64, _buf: &mut [u8]) -> Option<Result<(), Errno>> {
        Some(Err(Errno::Access))
    }

    fn read(
        &self,
        _slot: u32,
        _offset: u64,
        _len: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Errno>> + Send + '_>> {
        Box::pin(std::future::ready(Err(Errno::Access)))
    }

    fn next_data(&self, _slot: u32, _offset: u64) -> Result<Option<ByteRange>, Errno> {
        Err(Errno::Access)
    }

    fn corrupt(&self, _message: &str, _offset: Option<u64>, _size: Option<u64>, _fatal: bool) {}

    fn node_name(&self) -> &str {
        "-"
    }
}
