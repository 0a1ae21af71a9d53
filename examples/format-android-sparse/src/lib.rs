//! Android sparse images ("simg", version 1), read-only.
//!
//! ```text
//! header | chunk header, bytes | chunk header, bytes | ...
//!          raw: its blocks       fill: 4 bytes         don't care, crc32
//! ```
//!
//! `open` walks the chunk headers once; the host reads the raw chunks itself.

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Child, Error, Extent, ExtentList, Files, Format, Geometry, Grant, Info, Location,
    Reader, Result, ensure,
};

const MAGIC: u32 = 0xed26_ff3a;
/// 1 Mi chunks are 4 GiB of alternating 4 KiB blocks, and 56 MiB of extents.
const CHUNKS_MAX: u32 = 1 << 20;

struct Header {
    len: u64,
    chunk_header_len: u64,
    block_len: u32,
    blocks: u32,
    chunks: u32,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        ensure!(r.le_u32()? == MAGIC, "This is not an Android sparse image");
        let (major, _minor) = (r.le_u16()?, r.le_u16()?);
        ensure!(major == 1, "Sparse image version {major} is unknown");
        let header = Self {
            len: r.le_u16()?.into(),
            chunk_header_len: r.le_u16()?.into(),
            block_len: r.le_u32()?,
            blocks: r.le_u32()?,
            chunks: r.le_u32()?,
        };
        let (len, chunk_len) = (header.len, header.chunk_header_len);
        ensure!(
            len >= 28 && chunk_len >= 12,
            "Headers of {len} and {chunk_len} bytes are short"
        );
        let block_len = header.block_len;
        ensure!(
            block_len > 0 && block_len % 512 == 0,
            "{block_len} bytes are no block"
        );
        ensure!(
            header.chunks <= CHUNKS_MAX,
            "{} chunks are too many",
            header.chunks
        );
        Ok(header)
    }
}

/// An open image.
pub struct Simg {
    extents: ExtentList,
    block_len: u32,
}

impl Format for Simg {
    fn info() -> Info {
        Info {
            name: "simg",
            version: env!("CARGO_PKG_VERSION"),
            description: "Android sparse images, read-only",
            options_schema: "",
        }
    }

    fn probe(head: &[u8], _size: u64) -> u8 {
        if head.starts_with(&MAGIC.to_le_bytes()) {
            100
        } else {
            0
        }
    }

    fn open(files: &dyn Files, _options: &str, writable: bool) -> Result<(Self, Vec<Child>)> {
        ensure!(!writable, "Android sparse images are read-only");
        let header = Header::parse(&files.read(0, 0, 28)?)?;
        let (block_len, file_len) = (header.block_len, files.size(0)?);
        let mut extents = ExtentList::new();
        let mut at = header.len;
        for index in 0..header.chunks {
            let bytes = files.read(0, at, 12)?;
            let mut r = Reader::new(&bytes);
            let (kind, _reserved) = (r.le_u16()?, r.le_u16()?);
            let len = u64::from(r.le_u32()?) * u64::from(block_len);
            let stored = u64::from(r.le_u32()?);
            let body = at + header.chunk_header_len;
            let (body_len, content) = match kind {
                0xcac1 => (len, Location::stored(body)),
                // Four bytes again and again: their value is all that `read_special` needs.
                0xcac2 => (
                    4,
                    match Reader::new(&files.read(0, body, 4)?).le_u32()? {
                        0 => Location::Zero,
                        word => Location::Special(word.into()),
                    },
                ),
                0xcac3 => (0, Location::Hole),
                0xcac4 => (4, Location::Hole),
                _ => {
                    return Err(Error::invalid(format!(
                        "Chunk {index} has type {kind:#06x}"
                    )));
                }
            };
            let wanted = header.chunk_header_len + body_len;
            ensure!(
                stored == wanted,
                "Chunk {index} has a wrong length: {stored}"
            );
            at += stored;
            ensure!(at <= file_len, "Chunk {index} ends after the file");
            // A checksum has no blocks, whatever its header says.
            extents.push(if kind == 0xcac4 { 0 } else { len }, content)?;
        }
        let size = u64::from(header.blocks) * u64::from(block_len);
        ensure!(
            extents.size() == size,
            "The chunks are not as long as the header says"
        );
        Ok((Self { extents, block_len }, Vec::new()))
    }

    fn activate(&mut self, _files: &dyn Files, _grants: &[Grant]) -> Result<Geometry> {
        // Blocks of, say, 12 KiB have no name in powers of two; 4 KiB fits them.
        let unit = (1 << self.block_len.trailing_zeros()).min(2 << 20);
        Ok(Geometry::read_only(self.extents.size(), unit))
    }

    fn resolve(&mut self, _files: &dyn Files, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(self.extents.resolve(range))
    }

    fn read_special(&mut self, _files: &dyn Files, id: u64, range: ByteRange) -> Result<Vec<u8>> {
        // Chunks start at multiples of 4 in the guest.
        let word = id.to_le_bytes();
        Ok((range.offset..range.end())
            .map(|at| word[(at % 4) as usize])
            .collect())
    }
}

outport_sdk::export_format_ro!(Simg);
