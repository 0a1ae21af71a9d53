//! Android sparse images ("simg", version 1), read-only.
//!
//! ```text
//! header | chunk header, bytes | chunk header, bytes | ...
//!          raw: its blocks       fill: 4 bytes         don't care, crc32
//! ```
//!
//! `open` walks the chunk headers once; from then on `resolve` is a binary
//! search and the host reads the raw chunks itself.

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Child, Error, Extent, Files, Format, Geometry, Grant, Info, Location, Reader, Result,
};

const MAGIC: u32 = 0xed26_ff3a;
const FILE_HEADER_LEN: u16 = 28;
const CHUNK_HEADER_LEN: u16 = 12;
/// 4 Mi chunks are 16 GiB of alternating 4 KiB blocks, and 128 MiB of table.
const CHUNKS_MAX: u32 = 1 << 22;
/// One answer of `resolve`: enough that a scan misses rarely.
const EXTENTS_MAX: usize = 64;

struct Chunk {
    range: ByteRange,
    content: Content,
}

enum Content {
    Raw { offset: u64 },
    Fill([u8; 4]),
    DontCare,
}

/// An open image: its chunks in guest order, without gaps.
pub struct Simg {
    chunks: Vec<Chunk>,
    size: u64,
    block_len: u32,
}

impl Simg {
    fn read_chunks(&mut self, files: &dyn Files, header: &Header) -> Result<()> {
        let file_len = files.size(0)?;
        let mut at = u64::from(header.file_header_len);
        for index in 0..header.chunks {
            let bytes = files.read(0, at, CHUNK_HEADER_LEN.into())?;
            let mut r = Reader::new(&bytes);
            let (kind, _reserved) = (r.le_u16()?, r.le_u16()?);
            let len = u64::from(r.le_u32()?) * u64::from(self.block_len);
            let stored = u64::from(r.le_u32()?);
            let body = at + u64::from(header.chunk_header_len);
            let (expected, content) = match kind {
                0xcac1 => (len, Some(Content::Raw { offset: body })),
                0xcac2 => (
                    4,
                    Some(Content::Fill(
                        Reader::new(&files.read(0, body, 4)?).array()?,
                    )),
                ),
                0xcac3 => (0, Some(Content::DontCare)),
                0xcac4 => (4, None),
                _ => {
                    return Err(Error::invalid(format!(
                        "Chunk {index} has type {kind:#06x}"
                    )));
                }
            };
            if stored != u64::from(header.chunk_header_len) + expected {
                return Err(Error::invalid(format!(
                    "Chunk {index} has a wrong length: {stored}"
                )));
            }
            at += stored;
            if at > file_len {
                return Err(Error::invalid(format!("Chunk {index} ends after the file")));
            }
            if let (Some(content), 1..) = (content, len) {
                self.chunks.push(Chunk {
                    range: ByteRange::new(self.size, len),
                    content,
                });
                self.size += len;
            }
        }
        Ok(())
    }
}

struct Header {
    file_header_len: u16,
    chunk_header_len: u16,
    block_len: u32,
    blocks: u32,
    chunks: u32,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        if r.le_u32()? != MAGIC {
            return Err(Error::invalid("This is not an Android sparse image"));
        }
        let (major, _minor) = (r.le_u16()?, r.le_u16()?);
        if major != 1 {
            return Err(Error::unsupported(format!(
                "Sparse image version {major} is unknown"
            )));
        }
        let (file_header_len, chunk_header_len) = (r.le_u16()?, r.le_u16()?);
        let (block_len, blocks, chunks) = (r.le_u32()?, r.le_u32()?, r.le_u32()?);
        if file_header_len < FILE_HEADER_LEN || chunk_header_len < CHUNK_HEADER_LEN {
            return Err(Error::invalid(
                "The headers are shorter than version 1 has them",
            ));
        }
        if block_len == 0 || block_len % 512 != 0 {
            return Err(Error::unsupported(format!(
                "A block of {block_len} bytes is unsupported"
            )));
        }
        if chunks > CHUNKS_MAX {
            return Err(Error::unsupported(format!("{chunks} chunks are too many")));
        }
        Ok(Self {
            file_header_len,
            chunk_header_len,
            block_len,
            blocks,
            chunks,
        })
    }
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
        if writable {
            return Err(Error::unsupported("Android sparse images are read-only"));
        }
        let header = Header::parse(&files.read(0, 0, FILE_HEADER_LEN.into())?)?;
        let mut image = Self {
            chunks: Vec::new(),
            size: 0,
            block_len: header.block_len,
        };
        image.read_chunks(files, &header)?;
        if image.size != u64::from(header.blocks) * u64::from(header.block_len) {
            return Err(Error::invalid(
                "The chunks are not as long as the header says",
            ));
        }
        Ok((image, Vec::new()))
    }

    fn activate(&mut self, _files: &dyn Files, _grants: &[Grant]) -> Result<Geometry> {
        // Blocks of, say, 12 KiB have no name in powers of two; 4 KiB fits them.
        let unit = (1 << self.block_len.trailing_zeros()).min(2 << 20);
        Ok(Geometry {
            size: self.size,
            unit,
            cluster_size: unit,
            zero_granularity: 0,
            discard_granularity: 0,
        })
    }

    fn resolve(&mut self, _files: &dyn Files, range: ByteRange) -> Result<Vec<Extent>> {
        let first = self
            .chunks
            .partition_point(|c| c.range.end() <= range.offset);
        let rest = self.chunks.iter().enumerate().skip(first).take(EXTENTS_MAX);
        let located = rest.map(|(index, chunk)| Extent {
            range: chunk.range,
            at: match chunk.content {
                Content::Raw { offset } => Location::Raw {
                    slot: 0,
                    offset,
                    in_place: false,
                },
                Content::Fill([0, 0, 0, 0]) => Location::Zero,
                Content::Fill(_) => Location::Special(index as u64),
                Content::DontCare => Location::Hole,
            },
        });
        Ok(located.collect())
    }

    fn read_special(&mut self, _files: &dyn Files, id: u64, range: ByteRange) -> Result<Vec<u8>> {
        let chunk = usize::try_from(id).ok().and_then(|id| self.chunks.get(id));
        match chunk.map(|c| &c.content) {
            // Chunks start at multiples of 4 in the guest.
            Some(Content::Fill(word)) => Ok((range.offset..range.end())
                .map(|at| word[(at % 4) as usize])
                .collect()),
            _ => Err(Error::invalid("This is not a fill chunk")),
        }
    }
}

outport_sdk::export_format_ro!(Simg);
