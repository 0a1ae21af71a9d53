//! How a read is cut into chunks: what is known to be zeroes, and what is not.
//!
//! On the connection's iothread, for every structured read; waits for nothing. Invariant: the
//! pieces cover the range, and neighbours are not of one kind.

use outport_block::node::{Ask, Front, Known};
use outport_block::{ByteRange, Node};

/// From this size on, reads look for holes in sparse files.
const HOLE_MIN: u64 = 16 << 10;

/// Chunks of one reply. What is left then is data.
const CHUNKS_MAX: usize = 64;

/// So many chunks are had for any hole; more only while holes have this length on average. A chunk
/// costs half a microsecond and the client's attention: a page of zeroes is sent with less.
const CHUNKS_FREE: usize = 4;
const HOLE_WORTH: u64 = 16 << 10;

/// What becomes one chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) zero: bool,
}

impl Piece {
    fn reach(&mut self, end: u64) {
        self.range = ByteRange::between(self.range.offset(), end);
    }
}

/// What a range consists of, as far as is known.
pub(super) enum Layout {
    Data,
    Zero,
    /// At least two.
    Mixed(Vec<Piece>),
    /// There is somebody to be asked, who would have to be asked for a read as well.
    Unasked,
}

/// Large reads ask the file system, too: what a hole does not transfer pays for it.
pub(super) fn layout(node: &Node, range: ByteRange) -> Layout {
    let ask = match range.len() >= HOLE_MIN {
        true => Ask::FileSystem,
        false => Ask::Memory,
    };
    let first = node.front(range, ask);
    match first.known {
        Known::Nothing => Layout::Unasked,
        Known::Zero if first.len == range.len() => Layout::Zero,
        Known::Data if first.len == range.len() => Layout::Data,
        _ => layout_from(node, range, ask, first),
    }
}

/// The same, knowing the first piece already, which is not all.
fn layout_from(node: &Node, range: ByteRange, ask: Ask, first: Front) -> Layout {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut zeroes = 0;
    let (mut at, mut front) = (range.offset(), first);
    loop {
        let zero = match front.known {
            Known::Zero => true,
            Known::Data => false,
            Known::Nothing => return Layout::Unasked,
        };
        let enough = is_enough(pieces.len(), zeroes);
        let here = ByteRange::between(at, at + front.len);
        let rest = ByteRange::between(at, range.end());
        match pieces.last_mut() {
            Some(last) if last.zero == zero => last.reach(here.end()),
            // The last chunk that a reply may have takes all that is left.
            Some(last) if enough && !last.zero => {
                last.reach(range.end());
                break;
            }
            _ if enough => {
                let zero = false;
                pieces.push(Piece { range: rest, zero });
                break;
            }
            _ => pieces.push(Piece { range: here, zero }),
        }
        zeroes += if zero { front.len } else { 0 };
        at = here.end();
        if at == range.end() {
            break;
        }
        front = node.front(ByteRange::between(at, range.end()), ask);
    }
    match pieces[..] {
        [Piece { zero: true, .. }] => Layout::Zero,
        [_] => Layout::Data,
        _ => Layout::Mixed(pieces),
    }
}

/// Whether one chunk more is the last one.
fn is_enough(chunks: usize, zeroes: u64) -> bool {
    let holes = chunks as u64 / 2;
    chunks + 1 >= CHUNKS_MAX || chunks >= CHUNKS_FREE && zeroes < holes * HOLE_WORTH
}
