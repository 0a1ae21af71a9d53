//! A small host in memory: files, transactions, and what happens on disk when.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::cell::RefCell;

use outport_sdk::{ByteRange, Errno, Error, Files, LogLevel, Result, SlotRange, Stage, Txn};

/// A write on its way to the disk.
#[derive(Clone, Debug)]
pub(crate) struct Flying {
    pub(crate) slot: u32,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

/// The files of one image. What calls queue is visible at once and undone if
/// the call fails.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) files: Vec<Vec<u8>>,
    undo: Vec<(u32, u64, Vec<u8>, usize)>,
    queued: Vec<(Stage, Flying)>,
    queued_frees: Vec<SlotRange>,
    /// Since the last barrier.
    pub(crate) prepare: Vec<Flying>,
    pub(crate) mapping: Vec<Flying>,
    /// Freed, and the mapping is not durable yet.
    pub(crate) freed: Vec<SlotRange>,
    pub(crate) corruptions: RefCell<Vec<String>>,
}

impl Host {
    pub(crate) fn new(files: Vec<Vec<u8>>) -> Self {
        Self {
            files,
            ..Self::default()
        }
    }

    pub(crate) fn writes_queued(&self) -> usize {
        self.queued.len()
    }

    /// Run a call as a transaction.
    pub(crate) fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.undo.clear();
        let result = call(self);
        if result.is_ok() {
            for (stage, write) in self.queued.drain(..) {
                match stage {
                    Stage::Prepare => self.prepare.push(write),
                    Stage::Mapping => self.mapping.push(write),
                }
            }
            self.freed.append(&mut self.queued_frees);
        } else {
            for (slot, offset, old, len) in self.undo.drain(..).rev() {
                let file = &mut self.files[slot as usize];
                let at = offset as usize;
                file[at..at + old.len()].copy_from_slice(&old);
                file.truncate(len);
            }
            self.queued.clear();
            self.queued_frees.clear();
        }
        result
    }

    /// Payload, written by the host itself.
    pub(crate) fn payload(&mut self, slot: u32, offset: u64, data: &[u8]) {
        self.store(slot, offset, data);
        self.prepare.push(Flying {
            slot,
            offset,
            data: data.to_vec(),
        });
    }

    fn store(&mut self, slot: u32, offset: u64, data: &[u8]) {
        let file = &mut self.files[slot as usize];
        let end = offset as usize + data.len();
        let len = file.len();
        if end > len {
            file.resize(end, 0);
        }
        let old = file[offset as usize..end].to_vec();
        self.undo.push((slot, offset, old, len));
        file[offset as usize..end].copy_from_slice(data);
    }

    /// Everything is durable; returns what may be reclaimed.
    pub(crate) fn barrier(&mut self) -> Vec<SlotRange> {
        self.prepare.clear();
        self.mapping.clear();
        std::mem::take(&mut self.freed)
    }
}

impl Files for Host {
    fn size(&self, slot: u32) -> Result<u64> {
        self.files
            .get(slot as usize)
            .map(|f| f.len() as u64)
            .ok_or_else(|| Error::invalid("No such slot"))
    }

    fn read_into(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        assert!(buf.len() <= 2 << 20, "a read of more than 2 MiB");
        buf.fill(0);
        let file = &self.files[slot as usize];
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| file.get(at..))
            .unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }

    fn next_data(&self, _slot: u32, _offset: u64) -> Result<Option<ByteRange>> {
        Ok(None)
    }

    fn log(&self, _level: LogLevel, _message: &str) {}

    fn corrupt(&self, message: &str, _offset: Option<u64>, _size: Option<u64>, _fatal: bool) {
        self.corruptions.borrow_mut().push(message.to_owned());
    }
}

impl Txn for Host {
    fn write(&mut self, slot: u32, stage: Stage, offset: u64, data: &[u8]) -> Result<()> {
        assert!(data.len() <= 2 << 20, "a write of more than 2 MiB");
        if offset + data.len() as u64 > 4 << 30 {
            return Err(Error::new(Errno::Enospc, "The file is full"));
        }
        self.store(slot, offset, data);
        self.queued.push((
            stage,
            Flying {
                slot,
                offset,
                data: data.to_vec(),
            },
        ));
        Ok(())
    }

    fn zero(&mut self, slot: u32, stage: Stage, range: ByteRange) -> Result<()> {
        let zeroes = vec![0; range.len as usize];
        for (i, chunk) in zeroes.chunks(1 << 20).enumerate() {
            self.write(slot, stage, range.offset + ((i as u64) << 20), chunk)?;
        }
        Ok(())
    }

    fn grow(&mut self, slot: u32, size: u64) -> Result<()> {
        let len = self.files[slot as usize].len();
        if size as usize > len {
            self.undo.push((slot, 0, Vec::new(), len));
            self.files[slot as usize].resize(size as usize, 0);
        }
        Ok(())
    }

    fn free(&mut self, slot: u32, range: ByteRange) -> Result<()> {
        assert!(range.end() <= 4 << 30, "a free outside of the file");
        for other in self.freed.iter().chain(&self.queued_frees) {
            assert!(
                other.slot != slot
                    || other.range.end() <= range.offset
                    || range.end() <= other.range.offset,
                "{range:?} is freed twice"
            );
        }
        self.queued_frees.push(SlotRange { slot, range });
        Ok(())
    }

    fn truncate(&mut self, slot: u32, size: u64) -> Result<()> {
        self.files[slot as usize].truncate(size as usize);
        Ok(())
    }

    fn files(&self) -> &dyn Files {
        self
    }
}
