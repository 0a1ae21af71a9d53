//! Nothing at all: what a plugin is given while it is only being asked who it
//! is, what it recognises, or how large an image would be; and what the other
//! kinds of plugin have, who have no business with it.

use std::pin::Pin;

use outport_block::authz::ConfigFiles;
use outport_block::format::FormatFiles;
use outport_block::metacontext::ContextExtent;
use outport_block::rule::Rule;
use outport_block::view::{Allocation, NodeView, Viewing};
use outport_block::{ByteRange, Errno};

/// Grants nothing, notices nothing.
#[derive(Debug)]
pub(crate) struct Nothing;

impl FormatFiles for Nothing {
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

impl ConfigFiles for Nothing {
    fn read(&self, _name: &str) -> Result<Vec<u8>, Errno> {
        Err(Errno::Access)
    }

    fn generation(&self, _name: &str) -> Result<u64, Errno> {
        Err(Errno::Access)
    }
}

impl NodeView for Nothing {
    fn size(&self) -> u64 {
        0
    }

    fn allocation(&self, _range: ByteRange, _runs_max: usize) -> Viewing<'_, Vec<Allocation>> {
        Box::pin(std::future::ready(Err(Errno::Access)))
    }

    fn bitmap_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn bitmap_granularity(&self, _name: &str) -> Result<u32, Errno> {
        Err(Errno::Access)
    }

    fn bitmap_bits(&self, _name: &str, _range: ByteRange) -> Result<Vec<u8>, Errno> {
        Err(Errno::Access)
    }

    fn by_rule<'a>(
        &'a self,
        _rule: &'a Rule,
        _range: ByteRange,
        _extents_max: usize,
    ) -> Viewing<'a, Vec<ContextExtent>> {
        Box::pin(std::future::ready(Err(Errno::Access)))
    }
}
