//! `outport:plugin/files`: metadata reads.
//!
//! A read is tried without waiting first, which is the rule once the metadata
//! cache is warm. What the running call has queued lies over what the node
//! answers: first stage `prepare`, then stage `mapping`, as it will be on disk.

use outport_block::ByteRange;
use outport_block::format::{Stage, TxnLog, TxnOp};

use super::generated::outport::plugin::files;
use super::refuse;
use super::types::{self, Errno, Error};
use crate::limits::{READ_BYTES_PER_CALL_MAX, READ_CHARGE_MIN, TRANSFER_MAX};
use crate::store::HostState;

impl files::Host for HostState {
    fn size(&mut self, slot: u32) -> Result<u64, Error> {
        let size = self.granted.files.size(slot).map_err(|e| failed(e, slot))?;
        Ok(self.call.txn.iter().fold(size, |size, op| match op {
            TxnOp::Grow {
                slot: at,
                size: grown,
            } if *at == slot => size.max(*grown),
            _ => size,
        }))
    }

    async fn read(&mut self, slot: u32, offset: u64, len: u32) -> Result<Vec<u8>, Error> {
        let bytes = len as usize;
        if bytes > TRANSFER_MAX {
            return refuse(Errno::Einval, "A metadata read is at most 2 MiB");
        }
        let Some(range) = ByteRange::new(offset, u64::from(len)) else {
            return refuse(Errno::Einval, "The range of a read ends past 2^63 - 1");
        };
        let charge = u64::from(len).max(READ_CHARGE_MIN);
        let Some(left) = self.call.read_left.checked_sub(charge) else {
            return refuse(
                Errno::Enomem,
                format!("One call may read {READ_BYTES_PER_CALL_MAX} bytes of metadata"),
            );
        };
        self.call.read_left = left;

        let mut buf = vec![0; bytes];
        match self.granted.files.try_read(slot, offset, &mut buf) {
            Some(done) => done.map_err(|e| failed(e, slot))?,
            None => {
                buf = self
                    .granted
                    .files
                    .read(slot, offset, bytes)
                    .await
                    .map_err(|e| failed(e, slot))?;
                self.call.waited = true;
                if buf.len() != bytes {
                    return refuse(Errno::Eio, "The file gave fewer bytes than asked for");
                }
            }
        }
        if !self.call.txn.is_empty() {
            overlay(&self.call.txn, slot, range, &mut buf);
        }
        Ok(buf)
    }

    fn next_data(&mut self, slot: u32, offset: u64) -> Result<Option<types::ByteRange>, Error> {
        if ByteRange::new(offset, 0).is_none() {
            return refuse(Errno::Einval, "An offset is at most 2^63 - 1");
        }
        let data = self
            .granted
            .files
            .next_data(slot, offset)
            .map_err(|e| failed(e, slot))?;
        Ok(data.map(|r| types::ByteRange {
            offset: r.offset(),
            len: r.len(),
        }))
    }
}

fn failed(e: outport_block::Errno, slot: u32) -> Error {
    Error {
        code: e.into(),
        message: format!("File {slot} of the image: {e}"),
    }
}

/// Lay the queued writes for `slot` over `buf`, which holds `range`.
fn overlay(txn: &TxnLog, slot: u32, range: ByteRange, buf: &mut [u8]) {
    for now in [Stage::Prepare, Stage::Mapping] {
        for op in txn {
            let (at, data) = match op {
                TxnOp::Write {
                    slot: s,
                    stage,
                    offset,
                    data,
                } if *s == slot && *stage == now => {
                    let end = offset.saturating_add(data.len() as u64);
                    (ByteRange::between(*offset, end), Some(data))
                }
                TxnOp::Zero {
                    slot: s,
                    stage,
                    range,
                } if *s == slot && *stage == now => (*range, None),
                _ => continue,
            };
            let Some(both) = range.intersect(at) else {
                continue;
            };
            // Both lie within `buf` and `data`: no longer than 2 MiB or a Vec.
            let to = &mut buf[index(both.offset() - range.offset())..][..index(both.len())];
            match data {
                Some(data) => {
                    let from = index(both.offset() - at.offset());
                    to.copy_from_slice(&data[from..][..index(both.len())]);
                }
                None => to.fill(0),
            }
        }
    }
}

/// A distance inside a buffer in memory.
fn index(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(stage: Stage, offset: u64, data: &[u8]) -> TxnOp {
        TxnOp::Write {
            slot: 0,
            stage,
            offset,
            data: data.to_vec(),
        }
    }

    #[test]
    fn queued_writes_lie_over_the_file_in_disk_order() {
        let txn = vec![
            write(Stage::Mapping, 2, &[9, 9]),
            write(Stage::Prepare, 0, &[1; 4]),
            TxnOp::Zero {
                slot: 0,
                stage: Stage::Prepare,
                range: ByteRange::between(1, 3),
            },
            TxnOp::Zero {
                slot: 1,
                stage: Stage::Prepare,
                range: ByteRange::between(0, 100),
            },
        ];
        let mut buf = [7; 6];
        overlay(&txn, 0, ByteRange::between(0, 6), &mut buf);
        assert_eq!(buf, [1, 0, 9, 9, 7, 7]);
        let mut tail = [7; 2];
        overlay(&txn, 0, ByteRange::between(3, 5), &mut tail);
        assert_eq!(tail, [9, 7]);
    }
}
