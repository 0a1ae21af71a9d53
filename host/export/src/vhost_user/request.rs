//! A virtio-blk request in a chain of buffers (virtio 1.2, section 5.2.6).
//!
//! Pure but for what it reads from guest memory; fuzzed. The layout of the buffers is the
//! driver's: a header may be cut anywhere, and share a buffer with the payload. Invariant: a
//! request that parses lies within the device and is as long as its buffers.

use outport_block::ByteRange;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::limits::{DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, REQUEST_BYTES_MAX};
use super::memory::{Gather, Memory};
use super::ring::{Broken, Chain, Segment};

/// Bytes of a sector, whatever the logical block size.
pub(super) const SECTOR: u64 = 512;

/// Bytes of the header.
const HEADER: usize = 16;

/// Bytes of a segment of discard and write-zeroes.
const RANGE: u64 = 16;

/// `VIRTIO_BLK_T_BARRIER`: a flag of old drivers, of no meaning.
const BARRIER: u32 = 1 << 31;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) const fn byte(self) -> u8 {
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// A piece of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) unmap: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Into the gathered payload.
    Read(u64),
    /// From the gathered payload.
    Write(u64),
    Flush,
    /// Into the gathered payload.
    GetId,
    Discard(Vec<Piece>),
    WriteZeroes(Vec<Piece>),
    /// Nothing: the answer is known.
    Fail(Status),
}

/// A request, and where its answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    /// Guest address of the status byte.
    pub(super) status: u64,
    /// Bytes that the driver gave us to write: what is told when the request is given back.
    pub(super) written: u32,
}

/// The device as requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device {
    /// Bytes.
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) writable: bool,
}

/// Parse a chain in `memory`, and gather its payload, which is of the same memory.
///
/// # Errors
/// There is no byte to put an answer into.
pub(super) fn parse(
    chain: &Chain,
    device: &Device,
    memory: &Memory,
    payload: &mut Gather,
) -> Result<Request, Broken> {
    payload.clear();
    let status = status(chain.segments(), memory).ok_or(Broken::NoStatus)?;
    let written = chain.segments().iter().filter(|it| it.writable);
    let written: u64 = written.map(|it| u64::from(it.len)).sum();
    let operation = operation(chain.segments(), device, memory, payload);
    let operation = operation.unwrap_or_else(Operation::Fail);
    Ok(Request {
        operation,
        status,
        written: u32::try_from(written).unwrap_or(u32::MAX),
    })
}

/// Guest address of the last byte of the last buffer, if that is ours to write.
fn status(segments: &[Segment], memory: &Memory) -> Option<u64> {
    let last = segments.iter().rev().find(|segment| segment.len > 0)?;
    let addr = last.addr.checked_add(u64::from(last.len) - 1)?;
    (last.writable && memory.holds(addr)).then_some(addr)
}

fn operation(
    segments: &[Segment],
    device: &Device,
    memory: &Memory,
    payload: &mut Gather,
) -> Result<Operation, Status> {
    let first_writable = segments.iter().position(|it| it.writable);
    let (readable, writable) = segments.split_at(first_writable.unwrap_or(segments.len()));
    if writable.iter().any(|it| !it.writable) {
        return Err(Status::IoError);
    }
    let mut header = [0; HEADER];
    let mut readable = Bytes(readable, 0);
    readable.load(memory, &mut header)?;
    let [kind, _, low, high] = [0, 4, 8, 12].map(|at| {
        let bytes = [0, 1, 2, 3].map(|i| header[at + i]);
        u32::from_le_bytes(bytes)
    });
    let sector = u64::from(low) | u64::from(high) << 32;
    let writes = matches!(
        kind & !BARRIER,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if writes && !device.writable {
        return Err(Status::IoError);
    }
    Ok(match kind & !BARRIER {
        VIRTIO_BLK_T_IN => {
            gather_writable(writable, payload)?;
            Operation::Read(device.check(sector, payload.len())?)
        }
        VIRTIO_BLK_T_OUT => {
            readable.gather(payload)?;
            Operation::Write(device.check(sector, payload.len())?)
        }
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID => {
            gather_writable(writable, payload)?;
            Operation::GetId
        }
        VIRTIO_BLK_T_DISCARD => Operation::Discard(device.pieces(&mut readable, memory, 0)?),
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            Operation::WriteZeroes(device.pieces(&mut readable, memory, flags)?)
        }
        _ => Operation::Fail(Status::Unsupported),
    })
}

/// All that is ours to write, but for the status byte at its end.
fn gather_writable(writable: &[Segment], payload: &mut Gather) -> Result<(), Status> {
    let total: u64 = writable.iter().map(|it| u64::from(it.len)).sum();
    let mut left = total.saturating_sub(1);
    if left > REQUEST_BYTES_MAX {
        return Err(Status::IoError);
    }
    for segment in writable {
        let len = left.min(u64::from(segment.len));
        payload.add(segment.addr, len).ok_or(Status::IoError)?;
        left -= len;
    }
    Ok(())
}

/// What is not read yet of the buffers for us to read: they, and an offset into the first.
struct Bytes<'a>(&'a [Segment], u32);

impl Bytes<'_> {
    fn len(&self) -> u64 {
        let all: u64 = self.0.iter().map(|it| u64::from(it.len)).sum();
        all - u64::from(self.1)
    }

    fn load(&mut self, memory: &Memory, mut into: &mut [u8]) -> Result<(), Status> {
        while !into.is_empty() {
            let first = self.0.first().ok_or(Status::IoError)?;
            let len = ((first.len - self.1) as usize).min(into.len());
            let (head, tail) = into.split_at_mut(len);
            let addr = first.addr.checked_add(u64::from(self.1));
            addr.and_then(|addr| memory.load(addr, head))
                .ok_or(Status::IoError)?;
            into = tail;
            // Not more than was left of the buffer.
            self.1 += len as u32;
            if self.1 == first.len {
                self.0 = &self.0[1..];
                self.1 = 0;
            }
        }
        Ok(())
    }

    fn gather(&self, payload: &mut Gather) -> Result<(), Status> {
        if self.len() > REQUEST_BYTES_MAX {
            return Err(Status::IoError);
        }
        let mut skip = self.1;
        for segment in self.0 {
            let addr = segment.addr.checked_add(u64::from(skip));
            let len = u64::from(segment.len - skip);
            addr.and_then(|addr| payload.add(addr, len))
                .ok_or(Status::IoError)?;
            skip = 0;
        }
        Ok(())
    }
}

impl Device {
    /// The offset of a transfer of `len` bytes, if it lies in the device.
    fn check(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let block = u64::from(self.block_size);
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len == 0
            || end > self.size
            || !offset.is_multiple_of(block)
            || !len.is_multiple_of(block)
        {
            return Err(Status::IoError);
        }
        Ok(offset)
    }

    fn pieces(
        &self,
        bytes: &mut Bytes<'_>,
        memory: &Memory,
        known: u32,
    ) -> Result<Vec<Piece>, Status> {
        let count = bytes.len() / RANGE;
        if count == 0 || !bytes.len().is_multiple_of(RANGE) || count > DISCARD_SEGMENTS_MAX.into() {
            return Err(Status::IoError);
        }
        (0..count)
            .map(|_| self.piece(bytes, memory, known))
            .collect()
    }

    fn piece(&self, bytes: &mut Bytes<'_>, memory: &Memory, known: u32) -> Result<Piece, Status> {
        let mut range = [0; RANGE as usize];
        bytes.load(memory, &mut range)?;
        let value = u128::from_le_bytes(range);
        let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > DISCARD_SECTORS_MAX {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.check(sector, len)?;
        Ok(Piece {
            range: ByteRange::new(offset, len).ok_or(Status::IoError)?,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }
}
