//! Payload buffers, recycled per iothread.
//!
//! Large reads and writes each need a buffer for the time they are in flight;
//! allocating and clearing one costs as much as filling it. Invariant: at most
//! [`KEPT_BYTES_MAX`] are kept per thread.

use std::cell::RefCell;

use outport_block::Buf;

/// Kept per iothread: a deep queue of 256 KiB requests.
const KEPT_BYTES_MAX: usize = 8 << 20;

/// Smaller buffers are cheap to make, larger ones are rare.
const CLASS_MIN: usize = 64 << 10;
const CLASS_MAX: usize = 2 << 20;

#[derive(Default)]
struct Kept {
    bufs: Vec<Buf>,
    bytes: usize,
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// A buffer of `len` bytes whose content is unspecified: fill all of it.
pub(crate) fn take(len: usize) -> Buf {
    let class = len.next_power_of_two().max(CLASS_MIN);
    let kept = KEPT.with_borrow_mut(|kept| {
        let at = kept.bufs.iter().position(|b| b.capacity() == class)?;
        let buf = kept.bufs.swap_remove(at);
        kept.bytes -= buf.capacity();
        Some(buf)
    });
    let mut buf = kept.unwrap_or_else(|| Buf::zeroed(if len <= CLASS_MAX { class } else { len }));
    buf.set_len(len);
    buf
}

/// Keep the buffer for the next one who needs it.
pub(crate) fn give_back(buf: Buf) {
    let class = buf.capacity();
    if !class.is_power_of_two() || !(CLASS_MIN..=CLASS_MAX).contains(&class) {
        return;
    }
    KEPT.with_borrow_mut(|kept| {
        if kept.bytes + class <= KEPT_BYTES_MAX {
            kept.bytes += class;
            kept.bufs.push(buf);
        }
    });
}

/// A client left: what was kept for it goes, too. Others soon keep theirs.
pub(crate) fn clear() {
    KEPT.take();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_with_the_length_asked_for() {
        let mut buf = take(100_000);
        buf.as_mut_slice().fill(1);
        assert_eq!((buf.len(), buf.capacity()), (100_000, 131_072));
        give_back(buf);
        let again = take(131_072);
        assert_eq!(again.len(), 131_072);
        assert_eq!(again.as_slice()[0], 1, "the same memory");
    }
}
