//! Memory of transfers that end before their call returns.
//!
//! Any thread; nothing here allocates. Invariants: the bytes are only handed to the kernel, copied
//! or overwritten, so it does not matter if a guest changes them meanwhile; what was made from a
//! shared reference is never overwritten.

/// Contiguous memory: an address and a length, and a promise of whoever made it.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub(super) ptr: *mut u8,
    pub(super) len: usize,
}

impl Piece {
    /// Memory that is not this process's alone, such as a guest's.
    ///
    /// # Safety
    /// `len` bytes from `ptr` can be read and written as long as the piece or a copy of it is
    /// used, and no reference to any of them exists meanwhile. Others may change them at any
    /// time: nobody here reads a byte twice and expects the same.
    #[must_use]
    pub const unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len }
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory of a transfer that is done before the call returns: nobody keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Iov<'a> {
    pieces: &'a [Piece],
    /// Bytes of the first piece that are left out.
    skip: usize,
    len: usize,
    /// It may be filled.
    fillable: bool,
}

impl<'a> Iov<'a> {
    /// These pieces one after another.
    #[must_use]
    pub fn new(pieces: &'a [Piece]) -> Self {
        let len = pieces.iter().map(|p| p.len).sum();
        Self {
            pieces,
            skip: 0,
            len,
            fillable: true,
        }
    }

    /// A buffer to fill.
    pub(crate) fn fill<T>(buf: &mut [u8], with: impl FnOnce(Iov<'_>) -> T) -> T {
        let piece = Piece {
            ptr: buf.as_mut_ptr(),
            len: buf.len(),
        };
        with(Iov::new(&[piece]))
    }

    /// A buffer that is only read: filling it panics.
    pub(crate) fn drain<T>(buf: &[u8], with: impl FnOnce(Iov<'_>) -> T) -> T {
        let piece = Piece {
            ptr: buf.as_ptr().cast_mut(),
            len: buf.len(),
        };
        with(Iov {
            fillable: false,
            ..Iov::new(&[piece])
        })
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `at`.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Self {
        assert!(
            at <= self.len && len <= self.len - at,
            "transfer inside its memory"
        );
        let mut skip = self.skip + at;
        let mut pieces = self.pieces;
        while let [first, rest @ ..] = pieces
            && skip >= first.len
            && !rest.is_empty()
        {
            skip -= first.len;
            pieces = rest;
        }
        Self {
            pieces,
            skip,
            len,
            fillable: self.fillable,
        }
    }

    /// The pieces, cut to what belongs to it.
    fn each(&self) -> impl Iterator<Item = Piece> {
        let (mut skip, mut left) = (self.skip, self.len);
        self.pieces.iter().filter_map(move |p| {
            let cut = skip.min(p.len);
            skip -= cut;
            let len = (p.len - cut).min(left);
            left -= len;
            let ptr = p.ptr.wrapping_add(cut);
            (len > 0).then_some(Piece { ptr, len })
        })
    }

    /// As many vectors as fit, as the kernel wants them; returns how many.
    pub(crate) fn vectors(&self, into: &mut [libc::iovec]) -> usize {
        let mut count = 0;
        for (slot, p) in into.iter_mut().zip(self.each()) {
            slot.iov_base = p.ptr.cast();
            slot.iov_len = p.len;
            count += 1;
        }
        count
    }

    /// Whoever fills it calls this first.
    pub(super) fn expect_fillable(&self) {
        assert!(self.fillable, "a buffer that is only read is not filled");
    }

    /// Zero everything; the memory is to be filled.
    pub(crate) fn fill_zero(&self) {
        self.expect_fillable();
        for p in self.each() {
            // SAFETY: it may be filled, so whoever made the piece promised that it can be written.
            unsafe { p.ptr.write_bytes(0, p.len) };
        }
    }

    /// Copy in; `src` has exactly [`Iov::len`] bytes.
    pub fn copy_from(&self, mut src: &[u8]) {
        self.expect_fillable();
        for p in self.each() {
            let (head, tail) = src.split_at(p.len);
            // SAFETY: as in `fill_zero`; `head` has `p.len` bytes.
            unsafe { p.ptr.copy_from_nonoverlapping(head.as_ptr(), p.len) };
            src = tail;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_pieces_is_cut_on_both_sides() {
        let mut bytes = *b"0123456789";
        let start = bytes.as_mut_ptr();
        // SAFETY: all lie within `bytes`, which outlives them and is looked at afterwards.
        let pieces = [(0, 3), (3, 0), (3, 4), (7, 3)]
            .map(|(at, len)| unsafe { Piece::new(start.add(at), len) });
        let iov = Iov::new(&pieces);
        assert_eq!(iov.len(), 10);
        iov.part(2, 6).copy_from(b"abcdef");
        iov.part(9, 1).fill_zero();
        assert!(iov.part(10, 0).is_empty());
        let mut vectors = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; 8];
        assert_eq!(iov.part(3, 4).vectors(&mut vectors), 1);
        assert_eq!(iov.part(1, 9).vectors(&mut vectors[..2]), 2);
        assert_eq!(&bytes, b"01abcdef8\0");
    }

    #[test]
    fn a_buffer_that_is_only_read_is_not_filled() {
        let bytes = *b"same";
        let fill = || Iov::drain(&bytes, |iov| iov.part(1, 2).fill_zero());
        std::panic::catch_unwind(fill).unwrap_err();
        let copy = || Iov::drain(&bytes, |iov| iov.copy_from(b"else"));
        std::panic::catch_unwind(copy).unwrap_err();
        assert_eq!(&bytes, b"same");
    }
}
