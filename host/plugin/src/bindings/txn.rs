//! `outport:plugin/txn`: effects are queued here and applied by the node after
//! the call returned `ok`. What exceeds a limit is refused at once, with words,
//! so that the plugin can fail the call in an orderly way.

use outport_block::ByteRange;
use outport_block::format::{SlotRange, Stage, TxnOp};

use super::generated::outport::plugin::txn;
use super::refuse;
use super::types::{self, Errno, Error};
use crate::limits::{TRANSFER_MAX, TXN_BYTES_MAX, TXN_OPS_MAX};
use crate::store::{HostState, Queueing};

impl txn::Host for HostState {
    fn write(
        &mut self,
        slot: u32,
        stage: txn::Stage,
        offset: u64,
        data: Vec<u8>,
    ) -> Result<(), Error> {
        if data.len() > TRANSFER_MAX {
            return refuse(Errno::Einval, "A metadata write is at most 2 MiB");
        }
        checked(types::ByteRange {
            offset,
            len: data.len() as u64,
        })?;
        let bytes = data.len();
        self.queue(
            TxnOp::Write {
                slot,
                stage: stage.into(),
                offset,
                data,
            },
            bytes,
        )
    }

    fn zero(&mut self, slot: u32, stage: txn::Stage, range: types::ByteRange) -> Result<(), Error> {
        let range = checked(range)?;
        self.queue(
            TxnOp::Zero {
                slot,
                stage: stage.into(),
                range,
            },
            0,
        )
    }

    fn grow(&mut self, slot: u32, size: u64) -> Result<(), Error> {
        checked(types::ByteRange {
            offset: size,
            len: 0,
        })?;
        self.queue(TxnOp::Grow { slot, size }, 0)
    }

    fn free(&mut self, slot: u32, range: types::ByteRange) -> Result<(), Error> {
        let range = checked(range)?;
        self.queue(TxnOp::Free(SlotRange { slot, range }), 0)
    }

    fn truncate(&mut self, slot: u32, size: u64) -> Result<(), Error> {
        checked(types::ByteRange {
            offset: size,
            len: 0,
        })?;
        self.queue(TxnOp::Truncate { slot, size }, 0)
    }
}

impl HostState {
    fn queue(&mut self, op: TxnOp, bytes: usize) -> Result<(), Error> {
        match self.call.queueing {
            Queueing::Allowed => {}
            Queueing::NotNow => {
                return refuse(Errno::Einval, "This call may not queue writes");
            }
            Queueing::ReadOnly => {
                return refuse(Errno::Erofs, "The image is open for reading only");
            }
        }
        let call = &mut self.call;
        if call.txn.len() >= TXN_OPS_MAX {
            return refuse(
                Errno::Enomem,
                format!("One call may queue {TXN_OPS_MAX} writes (TXN_OPS_MAX)"),
            );
        }
        // Both are far below overflow: each write is at most TRANSFER_MAX.
        let total = call.txn_bytes.saturating_add(bytes);
        if total > TXN_BYTES_MAX {
            return refuse(
                Errno::Enomem,
                format!("One call may queue {TXN_BYTES_MAX} bytes (TXN_BYTES_MAX)"),
            );
        }
        call.txn_bytes = total;
        call.txn.push(op);
        Ok(())
    }
}

fn checked(range: types::ByteRange) -> Result<ByteRange, Error> {
    match ByteRange::new(range.offset, range.len) {
        Some(range) => Ok(range),
        None => refuse(
            Errno::Einval,
            "The range of a queued write ends past 2^63 - 1",
        ),
    }
}

impl From<txn::Stage> for Stage {
    fn from(stage: txn::Stage) -> Self {
        match stage {
            txn::Stage::Prepare => Self::Prepare,
            txn::Stage::Mapping => Self::Mapping,
        }
    }
}
