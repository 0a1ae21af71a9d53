//! Copies out of memory that another process changes at the same time.
//!
//! Any thread. A guest may write its memory while it is copied. Invariant: each byte is read once,
//! so that what was checked is what is used, and no reference to it is made: a reference would
//! promise the compiler that the bytes stay the same, and let it read them again later.
//!
//! The language has no race between threads of two programs; what it has for memory that changes
//! for reasons of its own is the volatile access, which is done exactly as written. That is what
//! the crate `vm-memory` relies on, too. Bytes that are written to a guest need none of this:
//! nobody here reads them again.

/// Bytes that are moved at once where both sides have them: the widest volatile access that is one
/// instruction everywhere.
const WORD: usize = size_of::<u64>();

/// Copies `dst.len()` bytes from `src`.
///
/// # Safety
/// So many bytes from `src` can be read, and no reference to change them exists. Others may change
/// them meanwhile; then `dst` has a mixture of both.
pub(super) unsafe fn copy_out(src: *const u8, dst: &mut [u8]) {
    // Where whole words begin.
    let head = src.align_offset(WORD).min(dst.len());
    let (first, rest) = dst.split_at_mut(head);
    // SAFETY: `first` is as long as what is read for it.
    unsafe { copy_bytes(src, first) };
    let mut src = src.wrapping_add(head);
    let mut lines = rest.chunks_exact_mut(4 * WORD);
    for line in &mut lines {
        let from = src.cast::<u64>();
        // SAFETY: aligned since `head` bytes; four words lie within what the caller promised.
        let words = unsafe { [0, 1, 2, 3].map(|at| from.add(at).read_volatile()) };
        for (to, word) in line.chunks_exact_mut(WORD).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        src = src.wrapping_add(4 * WORD);
    }
    // SAFETY: what is left of `dst` is as long as what is left of the caller's promise.
    unsafe { copy_bytes(src, lines.into_remainder()) };
}

/// The same, byte by byte.
///
/// # Safety
/// As [`copy_out`].
unsafe fn copy_bytes(src: *const u8, dst: &mut [u8]) {
    for (at, to) in dst.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *to = unsafe { src.add(at).read_volatile() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_from_wherever_it_begins() {
        let bytes: Vec<u8> = (0..200).collect();
        for start in 0..20 {
            for len in (0..100).chain([180]) {
                let mut out = vec![0xff; len + 1];
                // SAFETY: inside `bytes`, which nobody changes.
                unsafe { copy_out(bytes.as_ptr().add(start), &mut out[..len]) };
                assert_eq!(out[..len], bytes[start..start + len], "{len} from {start}");
                assert_eq!(out[len], 0xff, "past the end");
            }
        }
    }
}
