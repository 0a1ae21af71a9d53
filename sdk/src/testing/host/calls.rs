//! What a plugin may call: files that show its own writes, and the transaction.

use super::{Corruption, MemoryHost, Op, TRANSFER_MAX, broken};
use crate::{ByteRange, Errno, Error, Files, LogLevel, Result, Stage, Txn};

impl Files for MemoryHost {
    fn size(&self, slot: u32) -> Result<u64> {
        let size = self.file(slot)?.disk.len();
        Ok(self.queued.iter().fold(size, |size, op| match op {
            Op::Grow(s, grown) if *s == slot => size.max(*grown),
            _ => size,
        }))
    }

    fn read_into(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        let file = self.file(slot)?;
        if buf.len() > TRANSFER_MAX {
            return Err(Error::new(
                Errno::Einval,
                "A metadata read is at most 2 MiB",
            ));
        }
        if offset > i64::MAX as u64 - buf.len() as u64 {
            return Err(Error::new(Errno::Einval, "A read ends past 2^63 - 1"));
        }
        file.disk.read_into(offset, buf);
        overlay(&self.queued, slot, Stage::Prepare, offset, buf);
        for range in file
            .pending
            .overlaps(ByteRange::new(offset, buf.len() as u64))
        {
            let start = (range.offset - offset) as usize;
            file.overlay
                .read_into(range.offset, &mut buf[start..][..range.len as usize]);
        }
        overlay(&self.queued, slot, Stage::Mapping, offset, buf);
        Ok(())
    }

    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>> {
        Ok(self.file(slot)?.disk.next_data(offset))
    }

    fn log(&self, level: LogLevel, message: &str) {
        self.log.borrow_mut().push((level, message.to_owned()));
    }

    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool) {
        let message = message.to_owned();
        self.corruptions.borrow_mut().push(Corruption {
            message,
            offset,
            size,
            fatal,
        });
    }
}

impl Txn for MemoryHost {
    fn write(&mut self, slot: u32, stage: Stage, offset: u64, data: &[u8]) -> Result<()> {
        if data.len() > TRANSFER_MAX {
            return Err(Error::new(
                Errno::Einval,
                "A metadata write is at most 2 MiB",
            ));
        }
        self.check_metadata(slot, stage, ByteRange::new(offset, data.len() as u64))?;
        self.queued
            .push(Op::Write(slot, stage, offset, data.to_vec()));
        Ok(())
    }

    fn zero(&mut self, slot: u32, stage: Stage, range: ByteRange) -> Result<()> {
        self.check_metadata(slot, stage, range)?;
        self.queued.push(Op::Zero(slot, stage, range));
        Ok(())
    }

    fn grow(&mut self, slot: u32, size: u64) -> Result<()> {
        self.file(slot)?;
        self.queued.push(Op::Grow(slot, size));
        Ok(())
    }

    fn free(&mut self, slot: u32, range: ByteRange) -> Result<()> {
        if self.file(slot)?.quarantine.touches(range) {
            return Err(broken(format!("{range:?} is freed twice")));
        }
        self.queued.push(Op::Free(slot, range));
        Ok(())
    }

    fn truncate(&mut self, slot: u32, size: u64) -> Result<()> {
        self.file(slot)?;
        self.queued.push(Op::Truncate(slot, size));
        Ok(())
    }

    fn files(&self) -> &dyn Files {
        self
    }
}

/// Lay what is queued for `stage` over `buf`, which was read at `offset`.
fn overlay(queued: &[Op], slot: u32, stage: Stage, offset: u64, buf: &mut [u8]) {
    let end = offset + buf.len() as u64;
    for op in queued {
        let (at, data) = match op {
            Op::Write(s, st, at, data) if (*s, *st) == (slot, stage) => {
                (ByteRange::new(*at, data.len() as u64), Some(data))
            }
            Op::Zero(s, st, range) if (*s, *st) == (slot, stage) => (*range, None),
            _ => continue,
        };
        let (from, to) = (at.offset.max(offset), at.end().min(end));
        if from >= to {
            continue;
        }
        let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
        match data {
            Some(data) => {
                target.copy_from_slice(&data[(from - at.offset) as usize..][..target.len()]);
            }
            None => target.fill(0),
        }
    }
}
