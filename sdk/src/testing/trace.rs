//! What reached the files, in the host's order: the input of the crash checker.

use super::disk::Disk;
use crate::ByteRange;
use std::sync::Arc;

/// One effect on a file, or a mark.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write {
        slot: u32,
        offset: u64,
        data: Arc<[u8]>,
    },
    Zero {
        slot: u32,
        range: ByteRange,
    },
    SetLen {
        slot: u32,
        len: u64,
    },
    /// All files: what came before is durable.
    Flush,
    /// This operation of the workload starts.
    Begin(usize),
    /// It was acknowledged.
    End(usize),
}

pub(super) type Trace = Vec<Event>;

impl Event {
    pub(super) fn apply(&self, disks: &mut [Disk]) {
        match self {
            Self::Write { slot, offset, data } => disks[*slot as usize].write(*offset, data),
            Self::Zero { slot, range } => disks[*slot as usize].zero(*range),
            Self::SetLen { slot, len } => disks[*slot as usize].set_len(*len),
            Self::Flush | Self::Begin(_) | Self::End(_) => {}
        }
    }

    /// The parts of it that a disk writes as one: sectors of `sector` bytes.
    pub(super) fn torn(&self, sector: u64) -> Vec<Self> {
        let Self::Write { slot, offset, data } = self else {
            return vec![self.clone()];
        };
        let mut parts = Vec::new();
        let (mut at, end) = (*offset, offset + data.len() as u64);
        while at < end {
            let next = (at / sector + 1).saturating_mul(sector).min(end);
            let data = &data[(at - offset) as usize..(next - offset) as usize];
            parts.push(Self::Write {
                slot: *slot,
                offset: at,
                data: data.into(),
            });
            at = next;
        }
        parts
    }
}
