//! Entry points for fuzzers: any bytes, no panic, bounded memory.

use std::cell::Cell;

use outport_sdk::{
    Bits, ByteRange, DiscardKind, Errno, Error, Files, Format, Grant, Granted, KeepsBitmaps,
    KeptBitmap, LogLevel, Result, Stage, Txn, WritableFormat, WriteIntent, WriteKind,
};

use crate::header::Header;
use crate::image::Qcow2;
use crate::{refcount, table};

/// The file may grow this far; a real host has its own limits.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Reads of one run: a plugin that reads for ever is as bad as one that panics.
const READS_MAX: u32 = 200_000;

/// The header parser, and back if it parses.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = Header::parse(bytes) {
        let _ = header.check_tables(bytes.len() as u64);
        let _ = header.serialise();
    }
}

/// Table entries and refcounts of every width.
pub fn tables(bytes: &[u8]) {
    let Ok(mut header) = Header::parse(&minimal_header()) else {
        return;
    };
    for cluster_bits in 9..=21 {
        header.cluster_bits = cluster_bits;
        for incompatible in [0, 4, 16, 20] {
            header.incompatible = incompatible;
            let coding = table::L2Coding::new(&header);
            for words in bytes.as_chunks::<16>().0 {
                let (a, b) = words.split_at(8);
                let word = |w: &[u8]| w.iter().fold(0, |n, b| n << 8 | u64::from(*b));
                let raw = [word(a), word(b)];
                let _ = table::l1_decode(raw[0], cluster_bits);
                if let Ok(cluster) = coding.decode(raw) {
                    let _ = coding.encode(cluster);
                }
            }
        }
    }
    let mut block = bytes.to_vec();
    for order in 0..=6 {
        for index in 0..refcount::entries_in(bytes.len() as u64, order) as usize + 2 {
            let n = refcount::get(&block, index, order);
            refcount::set(&mut block, index, order, n);
        }
    }
}

/// The bitmap directory there and back, and a header that gets and loses the extension.
pub fn bitmaps(bytes: &[u8]) {
    crate::bitmaps::fuzz_directory(bytes);
    crate::bitmaps::fuzz_extension(bytes);
}

/// A whole image: opened, read and written in a few places.
pub fn image(bytes: &[u8]) {
    let bytes = bytes.get(..FILE_BYTES_MAX as usize).unwrap_or(bytes);
    for writable in [false, true] {
        let mut memory = Memory {
            bytes: bytes.to_vec(),
            reads: Cell::new(0),
        };
        let _ = exercise(&mut memory, writable);
    }
}

fn exercise(memory: &mut Memory, writable: bool) -> Result<()> {
    let (mut image, children) = Qcow2::open(memory, "{}", writable)?;
    let grants: Vec<Grant> = children
        .into_iter()
        .map(|c| {
            let what = match c.id.as_str() {
                "backing" if c.required => Granted::Backing(1 << 20),
                "data-file" => Granted::Slot(1),
                _ => Granted::None,
            };
            Grant { id: c.id, what }
        })
        .collect();
    let geometry = if writable {
        image.activate_writable(memory, &grants)?
    } else {
        image.activate(memory, &grants)?
    };
    let _ = image.facts(memory);
    exercise_bitmaps(&mut image, memory, writable);
    let size = geometry.size;
    let unit = u64::from(geometry.unit);
    let places = [0, unit, size / 3, size / 2, size.saturating_sub(1)];
    for offset in places.into_iter().filter(|o| *o < size) {
        let range = ByteRange::new(offset, unit.min(size - offset));
        let _ = image.resolve(memory, range);
        if !writable {
            continue;
        }
        let intents = [
            WriteIntent {
                range,
                kind: WriteKind::Data,
                stored_len: 0,
            },
            WriteIntent {
                range: ByteRange::new(0, u64::from(geometry.cluster_size).min(size)),
                kind: WriteKind::Compressed,
                stored_len: 100,
            },
        ];
        if let Ok(placements) = image.prepare_write(memory, &intents) {
            let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
            if image.commit_write(memory, &tokens).is_err() {
                let _ = image.abort_write(memory, &tokens);
            }
        }
        let aligned = ByteRange::new(
            offset - offset % unit,
            unit.min(size - (offset - offset % unit)),
        );
        for kind in [
            DiscardKind::ZeroKeep,
            DiscardKind::ZeroUnmap,
            DiscardKind::Discard,
        ] {
            let _ = image.discard(memory, aligned, kind);
        }
    }
    if writable {
        let _ = image.resize(memory, size.saturating_add(1 << 20) & !511);
        let _ = image.resize(memory, (size / 2) & !511);
        image.close(memory)?;
    }
    Ok(())
}

fn exercise_bitmaps(image: &mut Qcow2, memory: &mut Memory, writable: bool) {
    let Ok(mut listed) = image.list_bitmaps(memory, 0) else {
        return;
    };
    listed.truncate(4);
    for bitmap in &listed {
        let _ = image.read_bits(memory, &bitmap.name, 0);
    }
    if !writable {
        return;
    }
    let one = KeptBitmap {
        name: "fuzz".into(),
        granularity: 65536,
        enabled: true,
        consistent: true,
    };
    listed.push(one);
    let data = vec![5; 700];
    for bitmap in &listed {
        let bits = Bits {
            first: 0,
            data: data.clone(),
        };
        let _ = image.store_bits(memory, bitmap, &bits);
    }
    for _ in 0..4 {
        match image.keep_bitmaps(memory, &listed) {
            Ok(false) => {}
            _ => break,
        }
    }
    let _ = image.facts(memory);
}

fn minimal_header() -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2]);
    bytes[23] = 9;
    bytes[59] = 1;
    bytes
}

/// One file, whatever the slot.
struct Memory {
    bytes: Vec<u8>,
    reads: Cell<u32>,
}

impl Files for Memory {
    fn size(&self, _slot: u32) -> Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_into(&self, _slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        assert!(buf.len() <= 2 << 20, "a read of more than 2 MiB");
        self.reads.set(self.reads.get() + 1);
        if self.reads.get() > READS_MAX {
            return Err(Error::io("Too many reads"));
        }
        buf.fill(0);
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.bytes.get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }

    fn next_data(&self, _slot: u32, _offset: u64) -> Result<Option<ByteRange>> {
        Ok(None)
    }

    fn log(&self, _level: LogLevel, _message: &str) {}

    fn corrupt(&self, _message: &str, _offset: Option<u64>, _size: Option<u64>, _fatal: bool) {}
}

impl Memory {
    fn reach(&mut self, end: u64) -> Result<()> {
        if end > FILE_BYTES_MAX {
            return Err(Error::new(Errno::Enospc, "The file is full"));
        }
        if end as usize > self.bytes.len() {
            self.bytes.resize(end as usize, 0);
        }
        Ok(())
    }
}

impl Txn for Memory {
    fn write(&mut self, _slot: u32, _stage: Stage, offset: u64, data: &[u8]) -> Result<()> {
        assert!(data.len() <= 2 << 20, "a write of more than 2 MiB");
        self.reach(offset.saturating_add(data.len() as u64))?;
        self.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, _slot: u32, _stage: Stage, range: ByteRange) -> Result<()> {
        self.reach(range.end())?;
        self.bytes[range.offset as usize..][..range.len as usize].fill(0);
        Ok(())
    }

    fn grow(&mut self, _slot: u32, size: u64) -> Result<()> {
        self.reach(size)
    }

    fn free(&mut self, _slot: u32, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _slot: u32, _size: u64) -> Result<()> {
        Ok(())
    }

    fn files(&self) -> &dyn Files {
        self
    }
}
