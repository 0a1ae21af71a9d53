//! The imports of the component as [`Files`] and [`Txn`].

#![forbid(unsafe_code)]

use super::bindings::about::outport::plugin::log;
use super::bindings::reader::outport::plugin::{files, health};
use super::bindings::writer::outport::plugin::txn;
use crate::{ByteRange, Errno, Error, Files, LogLevel, Result, Stage, Txn};

/// The host, as the running call sees it.
pub(super) struct Host;

impl Files for Host {
    fn size(&self, slot: u32) -> Result<u64> {
        Ok(files::size(slot)?)
    }

    fn read_into(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        buf.copy_from_slice(&self.read(slot, offset, buf.len())?);
        Ok(())
    }

    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>> {
        Ok(files::next_data(slot, offset)?.map(ByteRange::from))
    }

    fn log(&self, level: LogLevel, message: &str) {
        log::log(level.into(), message);
    }

    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool) {
        let message = message.to_owned();
        health::corrupt(&health::Corruption {
            message,
            offset,
            size,
            fatal,
        });
    }

    fn read(&self, slot: u32, offset: u64, len: usize) -> Result<Vec<u8>> {
        let wanted = u32::try_from(len)
            .map_err(|_| Error::new(Errno::Einval, "A metadata read is at most 2 MiB"))?;
        let bytes = files::read(slot, offset, wanted)?;
        if bytes.len() != len {
            return Err(Error::io("The host returned fewer bytes than asked for"));
        }
        Ok(bytes)
    }
}

impl Txn for Host {
    fn write(&mut self, slot: u32, stage: Stage, offset: u64, data: &[u8]) -> Result<()> {
        Ok(txn::write(slot, stage.into(), offset, data)?)
    }

    fn zero(&mut self, slot: u32, stage: Stage, range: ByteRange) -> Result<()> {
        Ok(txn::zero(slot, stage.into(), range.into())?)
    }

    fn grow(&mut self, slot: u32, size: u64) -> Result<()> {
        Ok(txn::grow(slot, size)?)
    }

    fn free(&mut self, slot: u32, range: ByteRange) -> Result<()> {
        Ok(txn::free(slot, range.into())?)
    }

    fn truncate(&mut self, slot: u32, size: u64) -> Result<()> {
        Ok(txn::truncate(slot, size)?)
    }

    fn files(&self) -> &dyn Files {
        self
    }
}
