//! The transmission phase: requests as bytes, replies checked against the protocol's rules.

use std::io::{self, Read, Write};

use super::haggle::bad;
use super::wire::{self, chunk, cmd, errno};
use super::{ExportInfo, Haggle, Socket, be16, be32, be64};

/// A compact request header; `len` counts what the command concerns, not its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// `cmd_flag` bits.
    pub flags: u16,
    /// A `cmd`.
    pub kind: u16,
    /// Echoed by the server.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Request {
    /// The 28 bytes on the wire.
    pub fn bytes(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[0..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// A structured reply chunk.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Bit 0: last of its reply.
    pub flags: u16,
    /// A `chunk` type.
    pub kind: u16,
    /// Of the request that it answers.
    pub cookie: u64,
    /// Everything after the header.
    pub data: Vec<u8>,
}

impl Chunk {
    /// The error number, when this is an error chunk.
    pub fn error(&self) -> Option<u32> {
        (self.kind & 1 << 15 != 0).then(|| be32(&self.data, 0))
    }

    /// True on the last chunk of a reply.
    pub fn done(&self) -> bool {
        self.flags & chunk::DONE != 0
    }
}

/// Extents of one metadata context: its id, then length and flags of each.
pub type Extents = (u32, Vec<(u32, u32)>);

/// A connection in transmission.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    /// What the handshake told.
    pub export: ExportInfo,
    structured: bool,
    cookie: u64,
}

impl Client {
    pub(super) fn new(haggle: Haggle, export: ExportInfo) -> Self {
        Self {
            socket: haggle.socket,
            export,
            structured: haggle.structured,
            cookie: 0x0bad_cafe,
        }
    }

    /// The bare socket, for a client with a loop of its own.
    pub fn into_socket(self) -> Socket {
        self.socket
    }

    /// The bare socket.
    pub fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// True when reads are answered by structured replies.
    pub fn structured(&self) -> bool {
        self.structured
    }

    /// Sends a request with its payload, in one write when small.
    pub fn send(&mut self, request: &Request, payload: &[u8]) -> io::Result<()> {
        let mut message = request.bytes().to_vec();
        message.extend_from_slice(&payload[..payload.len().min(4096)]);
        self.socket.write_all(&message)?;
        self.socket.write_all(&payload[payload.len().min(4096)..])
    }

    /// Receives a simple reply header: error number and cookie.
    pub fn simple_reply(&mut self) -> io::Result<(u32, u64)> {
        let header: [u8; 16] = self.take()?;
        match be32(&header, 0) {
            wire::SIMPLE_REPLY_MAGIC => Ok((be32(&header, 4), be64(&header, 8))),
            other => Err(bad(format!("wanted a simple reply, got magic {other:x}"))),
        }
    }

    /// Receives one chunk.
    pub fn chunk(&mut self) -> io::Result<Chunk> {
        let header: [u8; 20] = self.take()?;
        match be32(&header, 0) {
            wire::CHUNK_MAGIC => {}
            other => {
                return Err(bad(format!(
                    "wanted a structured reply, got magic {other:x}"
                )));
            }
        }
        let mut data = vec![0; be32(&header, 16) as usize];
        self.socket.read_exact(&mut data)?;
        Ok(Chunk {
            flags: be16(&header, 4),
            kind: be16(&header, 6),
            cookie: be64(&header, 8),
            data,
        })
    }

    /// Receives the chunks of one reply, up to and with the one marked done.
    pub fn chunks(&mut self) -> io::Result<Vec<Chunk>> {
        let mut chunks = vec![self.chunk()?];
        while !chunks.last().is_some_and(Chunk::done) {
            chunks.push(self.chunk()?);
        }
        Ok(chunks)
    }

    /// Reads; the inner error is the server's error number.
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Result<Vec<u8>, u32>> {
        self.read_with(0, offset, len)
    }

    /// Reads with command flags.
    pub fn read_with(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> io::Result<Result<Vec<u8>, u32>> {
        let request = self.request(flags, cmd::READ, offset, len);
        self.send(&request, &[])?;
        if self.structured {
            let chunks = self.chunks()?;
            return assemble(&request, &chunks);
        }
        let (error, cookie) = self.simple_reply()?;
        same_cookie(&request, cookie)?;
        if error != 0 {
            return known_error(error).map(Err);
        }
        let mut data = vec![0; len as usize];
        self.socket.read_exact(&mut data)?;
        Ok(Ok(data))
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<Result<(), u32>> {
        self.command(0, cmd::WRITE, offset, data.len() as u32, data)
    }

    /// Flushes.
    pub fn flush(&mut self) -> io::Result<Result<(), u32>> {
        self.command(0, cmd::FLUSH, 0, 0, &[])
    }

    /// Any command whose answer is only yes or an error number.
    pub fn command(
        &mut self,
        flags: u16,
        kind: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> io::Result<Result<(), u32>> {
        let request = self.request(flags, kind, offset, len);
        self.send(&request, payload)?;
        self.outcome(&request)
    }

    /// The answer to a command without content, in either reply style.
    pub fn outcome(&mut self, request: &Request) -> io::Result<Result<(), u32>> {
        let (cookie, result) = self.any_outcome()?;
        same_cookie(request, cookie)?;
        Ok(result)
    }

    /// The next answer to any of several commands without content: its cookie and result.
    pub fn any_outcome(&mut self) -> io::Result<(u64, Result<(), u32>)> {
        let magic: [u8; 4] = self.take()?;
        let (error, cookie) = match u32::from_be_bytes(magic) {
            wire::SIMPLE_REPLY_MAGIC => {
                let rest: [u8; 12] = self.take()?;
                (be32(&rest, 0), be64(&rest, 4))
            }
            wire::CHUNK_MAGIC => {
                let rest: [u8; 16] = self.take()?;
                let mut data = vec![0; be32(&rest, 12) as usize];
                self.socket.read_exact(&mut data)?;
                let error = if be16(&rest, 2) & 1 << 15 == 0 {
                    0
                } else {
                    be32(&data, 0)
                };
                (error, be64(&rest, 4))
            }
            other => return Err(bad(format!("reply magic {other:x}"))),
        };
        Ok((
            cookie,
            if error == 0 {
                Ok(())
            } else {
                Err(known_error(error)?)
            },
        ))
    }

    /// Asks for block status; checks the shape, returns one list of extents per context.
    pub fn block_status(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> io::Result<Result<Vec<Extents>, u32>> {
        let request = self.request(flags, cmd::BLOCK_STATUS, offset, len);
        self.send(&request, &[])?;
        let mut contexts = Vec::new();
        for chunk in self.chunks()? {
            same_cookie(&request, chunk.cookie)?;
            if let Some(error) = chunk.error() {
                return known_error(error).map(Err);
            }
            if chunk.kind == chunk::NONE {
                continue;
            }
            if chunk.kind != chunk::BLOCK_STATUS || chunk.data.len() % 8 != 4 {
                return Err(bad(format!("block status chunk {:x}", chunk.kind)));
            }
            let pairs = chunk.data[4..]
                .chunks(8)
                .map(|p| (be32(p, 0), be32(p, 4)))
                .collect();
            contexts.push((be32(&chunk.data, 0), pairs));
        }
        Ok(Ok(contexts))
    }

    /// Says goodbye; the server closes after what is in flight.
    pub fn disconnect(mut self) -> io::Result<()> {
        let request = self.request(0, cmd::DISC, 0, 0);
        self.send(&request, &[])?;
        if self.closed() {
            Ok(())
        } else {
            Err(bad("the server stays after DISC".into()))
        }
    }

    /// True when the server has closed the connection.
    pub fn closed(&mut self) -> bool {
        super::drained_to_end(&mut self.socket)
    }

    /// A request with the next cookie.
    pub fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32) -> Request {
        self.cookie += 1;
        Request {
            flags,
            kind,
            cookie: self.cookie,
            offset,
            len,
        }
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Puts a structured read together: full cover, no overlap, inside the request.
fn assemble(request: &Request, chunks: &[Chunk]) -> io::Result<Result<Vec<u8>, u32>> {
    let mut data = vec![0; request.len as usize];
    let mut covered = vec![false; request.len as usize];
    for chunk in chunks {
        same_cookie(request, chunk.cookie)?;
        if let Some(error) = chunk.error() {
            return known_error(error).map(Err);
        }
        let (at, len) = match chunk.kind {
            chunk::NONE => continue,
            chunk::OFFSET_DATA => (be64(&chunk.data, 0), chunk.data.len() - 8),
            chunk::OFFSET_HOLE => (be64(&chunk.data, 0), be32(&chunk.data, 8) as usize),
            other => return Err(bad(format!("chunk type {other:x} in a read reply"))),
        };
        let range = at
            .checked_sub(request.offset)
            .map(|start| start as usize..start as usize + len)
            .filter(|range| range.end <= data.len() && len > 0)
            .ok_or_else(|| bad(format!("chunk {at}+{len} is outside the request")))?;
        if covered[range.clone()].contains(&true) {
            return Err(bad(format!("chunk {at}+{len} overlaps another")));
        }
        covered[range.clone()].fill(true);
        if chunk.kind == chunk::OFFSET_DATA {
            data[range].copy_from_slice(&chunk.data[8..]);
        }
    }
    if covered.contains(&false) {
        return Err(bad("the chunks do not cover the request".into()));
    }
    Ok(Ok(data))
}

fn same_cookie(request: &Request, cookie: u64) -> io::Result<()> {
    if request.cookie == cookie {
        return Ok(());
    }
    Err(bad(format!(
        "asked with cookie {:x}, answered {cookie:x}",
        request.cookie
    )))
}

fn known_error(error: u32) -> io::Result<u32> {
    if errno::ALL.contains(&error) {
        return Ok(error);
    }
    Err(bad(format!("error {error} is not one of the protocol's")))
}
