//! Buffers that the kernel may fill while nobody in the process looks at them.
//!
//! A [`Buf`] is handed to an operation by value and comes back when it is done,
//! so while an operation runs no safe code holds the bytes. The operation holds
//! an `IoMem`, which keeps the memory alive even if the future that waited
//! for it is dropped.
//!
//! Invariant: an `IoMem` is made from a buffer that its maker owns and gives back
//! after completion, or from a [`SharedMem`]: memory of a guest, which may change
//! under our eyes and is therefore only ever copied (`racing`) or handed to the
//! kernel. No reference to a byte of it exists.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

pub use super::iov::{Iov, Piece};
use super::racing;

/// Alignment of every buffer: enough for `O_DIRECT` on any device with blocks
/// up to 4 KiB, which is what Linux supports for file systems' direct I/O.
pub const BUFFER_ALIGN: usize = 4096;

/// Memory that one request may take to be made fit for a file or server: a request may be as long
/// as its sender likes. A power of two.
pub(crate) const BOUNCE_MAX: u64 = 2 << 20;

/// The kernel's `IOV_MAX`: a longer vector is refused.
const PIECES_MAX: usize = 1024;

/// The kernel transfers a little less than 2 GiB at once, and a ring entry has
/// a 32-bit length.
const OP_BYTES_MAX: usize = 1 << 30;

/// The memory of one buffer.
#[derive(Debug)]
struct Mem {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Mem` is plain memory; who may touch it when is governed by the
// ownership rules in the module documentation, not by the thread it is on.
unsafe impl Send for Mem {}
// SAFETY: as above; shared references give out only a raw pointer.
unsafe impl Sync for Mem {}

impl Mem {
    fn zeroed(len: usize) -> Self {
        let size = len.max(1).next_multiple_of(BUFFER_ALIGN);
        let layout = Layout::from_size_align(size, BUFFER_ALIGN)
            .expect("a buffer length is bounded far below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        match NonNull::new(raw) {
            Some(ptr) => Self { ptr, layout },
            None => handle_alloc_error(layout),
        }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc` with exactly this layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// An owned, page-aligned buffer.
#[derive(Debug)]
pub struct Buf {
    mem: Arc<Mem>,
    len: usize,
}

impl Buf {
    /// A zero-filled buffer of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self {
            mem: Arc::new(Mem::zeroed(len)),
            len,
        }
    }

    /// A buffer with these bytes.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.as_mut_slice().copy_from_slice(bytes);
        buf
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes; no operation runs on a buffer that
        // safe code can reach (module documentation).
        unsafe { std::slice::from_raw_parts(self.mem.ptr.as_ptr(), self.len) }
    }

    /// The bytes, to change them. While an abandoned write may still read
    /// them, it keeps them and this buffer gets a copy.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        if Arc::get_mut(&mut self.mem).is_none() {
            let copy = Self::zeroed(self.capacity());
            // SAFETY: both memories have that many bytes, are alive, and the
            // new one is nobody else's; an operation in flight on the old one
            // only reads (one that fills a buffer owns the `Buf` too).
            unsafe {
                copy.mem
                    .ptr
                    .as_ptr()
                    .copy_from_nonoverlapping(self.mem.ptr.as_ptr(), self.capacity());
            }
            self.mem = copy.mem;
        }
        // SAFETY: as in `as_slice`, and `&mut self` excludes other readers.
        unsafe { std::slice::from_raw_parts_mut(self.mem.ptr.as_ptr(), self.len) }
    }

    /// Shorten to `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes that the buffer could hold: [`Buf::set_len`] may go up to it.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.mem.layout.size()
    }

    /// Shorten or lengthen within the capacity; what comes into view keeps its
    /// earlier content, so a buffer is recycled without clearing it.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.mem.layout.size(), "length within the capacity");
        self.len = len;
    }

    /// All bytes, for an operation.
    pub(crate) fn io(&self) -> IoMem {
        self.io_part(0, self.len)
    }

    /// `len` bytes from `at`, for an operation.
    pub(crate) fn io_part(&self, at: usize, len: usize) -> IoMem {
        assert!(
            at <= self.len && len <= self.len - at,
            "operation inside its buffer"
        );
        let piece = Piece {
            ptr: self.mem.ptr.as_ptr().wrapping_add(at),
            len,
        };
        IoMem {
            pieces: Pieces::One(piece),
            keep: vec![self.mem.clone()],
            shared: false,
        }
    }
}

/// Whatever keeps memory alive.
pub type Keep = Arc<dyn std::any::Any + Send + Sync>;

/// Memory that others may change meanwhile, for an operation that takes its time.
#[derive(Clone, Debug)]
pub struct SharedMem(IoMem);

impl SharedMem {
    /// The pieces one after another.
    ///
    /// # Safety
    /// As [`Piece::new`], for as long as `keep` is kept.
    #[must_use]
    pub unsafe fn new(pieces: &[Piece], keep: Keep) -> Self {
        let pieces = match pieces {
            [one] => Pieces::One(*one),
            many => Pieces::Many(many.to_vec()),
        };
        let keep = vec![keep];
        Self(IoMem {
            pieces,
            keep,
            shared: true,
        })
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// No bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn io(&self) -> IoMem {
        self.0.clone()
    }
}

#[derive(Clone, Debug)]
enum Pieces {
    One(Piece),
    Many(Vec<Piece>),
}

/// Memory of an operation in flight: pieces, and what keeps them alive.
#[derive(Clone, Debug)]
pub(crate) struct IoMem {
    pieces: Pieces,
    keep: Vec<Keep>,
    /// Some of it is a guest's.
    shared: bool,
}

// SAFETY: the pointers stay valid through `keep`, wherever the value is.
unsafe impl Send for IoMem {}
// SAFETY: shared references only copy pointers out.
unsafe impl Sync for IoMem {}

impl IoMem {
    /// Several memories one after another.
    pub(crate) fn join(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut pieces = Vec::new();
        let mut keep = Vec::new();
        let mut shared = false;
        for part in parts {
            shared |= part.shared;
            match part.pieces {
                Pieces::One(p) => pieces.push(p),
                Pieces::Many(ps) => pieces.extend(ps),
            }
            keep.extend(part.keep);
        }
        pieces.retain(|p| p.len > 0);
        Self {
            pieces: Pieces::Many(pieces),
            keep,
            shared,
        }
    }

    fn as_pieces(&self) -> &[Piece] {
        match &self.pieces {
            Pieces::One(p) => std::slice::from_ref(p),
            Pieces::Many(ps) => ps,
        }
    }

    /// How many bytes one operation can take: [`PIECES_MAX`] pieces of them,
    /// and no more than the kernel transfers at once.
    pub(crate) fn one_op(&self) -> usize {
        let pieces = self.as_pieces().iter().take(PIECES_MAX);
        pieces.map(|p| p.len).sum::<usize>().min(OP_BYTES_MAX)
    }

    /// Bytes in all pieces.
    pub(crate) fn len(&self) -> usize {
        self.as_pieces().iter().map(|p| p.len).sum()
    }

    /// `len` bytes from `at`.
    pub(crate) fn part(&self, at: usize, len: usize) -> Self {
        let mut skip = at;
        let mut left = len;
        let mut out = Vec::new();
        for p in self.as_pieces() {
            if skip >= p.len {
                skip -= p.len;
                continue;
            }
            let take = (p.len - skip).min(left);
            if take == 0 {
                break;
            }
            out.push(Piece {
                ptr: p.ptr.wrapping_add(skip),
                len: take,
            });
            left -= take;
            skip = 0;
        }
        assert!(left == 0, "operation inside its buffer");
        let pieces = match out.as_slice() {
            [one] => Pieces::One(*one),
            _ => Pieces::Many(out),
        };
        Self {
            pieces,
            keep: self.keep.clone(),
            shared: self.shared,
        }
    }

    /// Memory that nobody changes while it is looked at: this, or a copy of what a guest has
    /// there now.
    pub(crate) fn settled(self) -> Self {
        if !self.shared {
            return self;
        }
        let mut copy = Buf::zeroed(self.len());
        self.copy_to(copy.as_mut_slice());
        copy.io()
    }

    /// As the kernel wants it.
    pub(crate) fn iovecs(&self) -> Vec<libc::iovec> {
        self.as_pieces()
            .iter()
            .map(|p| libc::iovec {
                iov_base: p.ptr.cast(),
                iov_len: p.len,
            })
            .collect()
    }

    /// The only piece, if there is one: no iovec is needed then.
    pub(crate) fn single(&self) -> Option<(*mut u8, usize)> {
        match self.as_pieces() {
            [p] => Some((p.ptr, p.len)),
            _ => None,
        }
    }

    /// Aligned for direct I/O in blocks of `align` bytes?
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        self.as_pieces()
            .iter()
            .all(|p| p.ptr.addr() % align == 0 && p.len % align == 0)
    }

    /// Zero everything. The caller owns the memory's content at this time.
    pub(crate) fn fill_zero(&mut self) {
        for p in self.as_pieces() {
            // SAFETY: the piece is alive through `keep`, and its owner called
            // us while no operation runs on it.
            unsafe { p.ptr.write_bytes(0, p.len) };
        }
    }

    /// Copy in; `src` has exactly [`IoMem::len`] bytes.
    pub(crate) fn copy_from(&mut self, mut src: &[u8]) {
        for p in self.as_pieces() {
            let (head, tail) = src.split_at(p.len);
            // SAFETY: as in `fill_zero`; `head` has `p.len` bytes and does not
            // overlap a buffer that is owned by someone else. Nothing is read back.
            unsafe { p.ptr.copy_from_nonoverlapping(head.as_ptr(), p.len) };
            src = tail;
        }
    }

    /// The bytes, piece by piece, of memory that is [`IoMem::settled`].
    pub(crate) fn slices(&self) -> impl Iterator<Item = &[u8]> {
        assert!(!self.shared, "no reference to memory of a guest");
        // SAFETY: alive through `keep`, and no guest's; what a write sends is not changed
        // meanwhile, since `Buf::as_mut_slice` copies while the memory is shared.
        let slice = |p: &Piece| unsafe { std::slice::from_raw_parts(p.ptr, p.len) };
        self.as_pieces().iter().map(slice)
    }

    /// Copy out; `dst` has at least [`IoMem::len`] bytes.
    pub(crate) fn copy_to(&self, dst: &mut [u8]) {
        let mut at = 0;
        for p in self.as_pieces() {
            let dst = &mut dst[at..at + p.len];
            // SAFETY: the piece is alive through `keep`, and nobody has a reference to change
            // it: it is a guest's, or an operation's that only reads it.
            unsafe { racing::copy_out(p.ptr, dst) };
            at += p.len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zeroed() {
        let b = Buf::zeroed(10);
        assert_eq!(b.as_slice(), &[0; 10]);
        assert!(b.io_part(0, 0).is_aligned(BUFFER_ALIGN));
    }

    #[test]
    fn a_buffer_that_an_operation_still_reads_is_not_changed() {
        let mut b = Buf::from_slice(b"old");
        let in_flight = b.io();
        b.as_mut_slice().copy_from_slice(b"new");
        let mut seen = [0; 3];
        in_flight.copy_to(&mut seen);
        assert_eq!((&seen, b.as_slice()), (b"old", &b"new"[..]));
    }

    #[test]
    fn one_operation_takes_what_the_kernel_takes() {
        let b = Buf::zeroed(4096);
        let many = IoMem::join((0..2000).map(|i| b.io_part(i, 1)));
        assert_eq!(many.one_op(), PIECES_MAX);
    }

    #[test]
    fn joined_memory_is_sliced_across_pieces() {
        let a = Buf::from_slice(b"hello ");
        let b = Buf::from_slice(b"world");
        let joined = IoMem::join([a.io(), b.io()]);
        assert_eq!(joined.len(), 11);
        let mut out = [0; 5];
        joined.part(4, 5).copy_to(&mut out);
        assert_eq!(&out, b"o wor");
        joined.part(5, 2).copy_from(b"-W");
        assert_eq!(a.as_slice(), b"hello-");
        assert_eq!(b.as_slice(), b"World");
    }
}
