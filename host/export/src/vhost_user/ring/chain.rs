//! A chain of descriptors, and the indirect tables that it may point to.
//!
//! Pure but for what it reads from guest memory.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::super::limits::CHAIN_MAX;
use super::super::memory::Memory;
use super::Broken;

/// Bytes of a descriptor, in either kind of ring.
pub(super) const DESCRIPTOR: usize = 16;

/// One descriptor, as it was when it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    /// In a packed ring the third field is the buffer's id, and this is it.
    pub(super) id: u16,
    pub(super) flags: u16,
    /// Only in a split ring.
    pub(super) next: u16,
}

impl Descriptor {
    /// A descriptor of a split ring.
    pub(super) const fn split((addr, rest): (u64, u64)) -> Self {
        Self {
            addr,
            len: rest as u32,
            id: 0,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// A descriptor of a packed ring.
    pub(super) const fn packed((addr, rest): (u64, u64)) -> Self {
        Self {
            addr,
            len: rest as u32,
            id: (rest >> 32) as u16,
            flags: (rest >> 48) as u16,
            next: 0,
        }
    }

    pub(super) const fn has_next(self) -> bool {
        self.flags & VRING_DESC_F_NEXT as u16 != 0
    }

    pub(super) const fn is_table(self) -> bool {
        self.flags & VRING_DESC_F_INDIRECT as u16 != 0
    }

    const fn segment(self) -> Segment {
        Segment {
            addr: self.addr,
            len: self.len,
            writable: self.flags & VRING_DESC_F_WRITE as u16 != 0,
        }
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Segment {
    pub(in super::super) addr: u64,
    pub(in super::super) len: u32,
    /// For us to write.
    pub(in super::super) writable: bool,
}

/// The buffers of one chain in order; used again for the next one.
#[derive(Debug, Default)]
pub(in super::super) struct Chain {
    segments: Vec<Segment>,
}

impl Chain {
    /// The buffers.
    pub(in super::super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
    }

    pub(super) fn push(&mut self, descriptor: Descriptor) -> Result<(), Broken> {
        if self.segments.len() >= CHAIN_MAX {
            return Err(Broken::Long);
        }
        self.segments.push(descriptor.segment());
        Ok(())
    }

    /// The buffers of an indirect table. In a split ring they are linked, in a packed one they
    /// follow one another.
    pub(super) fn push_table(
        &mut self,
        memory: &Memory,
        table: Descriptor,
        packed: bool,
    ) -> Result<(), Broken> {
        let count = table.len as usize / DESCRIPTOR;
        if count == 0 || !(table.len as usize).is_multiple_of(DESCRIPTOR) {
            return Err(Broken::TableLength(table.len));
        }
        if count > CHAIN_MAX {
            return Err(Broken::Long);
        }
        let mut index = 0;
        for step in 0..count {
            let descriptor = self.entry(memory, table.addr, index, packed)?;
            if descriptor.is_table() {
                return Err(Broken::Table);
            }
            self.push(descriptor)?;
            index = match (packed, descriptor.has_next()) {
                (true, _) => step + 1,
                (false, true) => descriptor.next as usize,
                (false, false) => return Ok(()),
            };
            if index >= count && !packed {
                return Err(Broken::Index(descriptor.next, count as u16));
            }
        }
        if packed { Ok(()) } else { Err(Broken::Endless) }
    }

    fn entry(
        &self,
        memory: &Memory,
        table: u64,
        index: usize,
        packed: bool,
    ) -> Result<Descriptor, Broken> {
        let mut bytes = [0; DESCRIPTOR];
        let addr = table.checked_add((index * DESCRIPTOR) as u64);
        addr.and_then(|addr| memory.load(addr, &mut bytes))
            .ok_or(Broken::TableAddress)?;
        let value = u128::from_le_bytes(bytes);
        let pair = (value as u64, (value >> 64) as u64);
        Ok(if packed {
            Descriptor::packed(pair)
        } else {
            Descriptor::split(pair)
        })
    }
}
