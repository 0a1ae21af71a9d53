//! The extents of a block status reply: whatever a provider reports, the chunk is legal.
//!
//! Filled on the connection's iothread, once per context. Invariant: at least one extent, none
//! empty, all but the last inside the request, none past the export, and never more of them than
//! [`EXTENTS_MAX`] over the contexts of one reply. NBD proto: `NBD_REPLY_TYPE_BLOCK_STATUS`.

use super::limits::{EXTENT_CLAMP, EXTENTS_MAX};
use super::reply::{ReplyMode, ReplyTo};
use super::wire::ChunkType;

/// Collects the extents of one context.
#[derive(Debug)]
pub struct StatusExtents {
    extents: Vec<(u64, u64)>,
    extents_max: usize,
    /// One extent, not longer than the request.
    one: bool,
    /// Bytes asked for.
    requested: u64,
    /// Bytes from the request's offset to the end of the export.
    available: u64,
    covered: u64,
    full: bool,
}

impl StatusExtents {
    /// For a request of `requested` bytes, with `available` bytes from its offset to the end of
    /// the export, on a reply that reports `contexts` of them.
    #[must_use]
    pub fn new(one: bool, requested: u64, available: u64, contexts: u32) -> StatusExtents {
        let share = EXTENTS_MAX / contexts.max(1) as usize;
        StatusExtents {
            extents: Vec::new(),
            extents_max: if one { 1 } else { share.max(1) },
            one,
            requested,
            available: available.max(requested),
            covered: 0,
            full: requested == 0,
        }
    }

    /// Adds what follows the extents so far; `false` once there is no use in more.
    ///
    /// Empty extents count for nothing, and equal neighbours become one.
    #[inline]
    pub fn push(&mut self, length: u64, flags: u64) -> bool {
        let end = if self.one {
            self.requested
        } else {
            self.available
        };
        let length = length.min(end - self.covered);
        if self.full || length == 0 {
            return !self.full;
        }
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some((last, same)) if *same == flags => *last += length,
            _ if count == self.extents_max => self.full = true,
            _ => self.extents.push((length, flags)),
        }
        if !self.full {
            self.covered += length;
            self.full = self.covered >= self.requested;
        }
        !self.full
    }

    /// How many more extents are of use: one too many shows where the last one ends.
    #[must_use]
    pub fn room(&self) -> usize {
        self.extents_max + 1 - self.extents.len()
    }

    /// Bytes covered so far, from the request's offset: where the next extent begins.
    #[must_use]
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// Appends the chunk of the context `id` and starts over for the next context.
    ///
    /// A provider that reported nothing is answered for: status 0 is always safe.
    pub fn finish(&mut self, to: &ReplyTo, id: u32, last: bool, out: &mut Vec<u8>) {
        if self.extents.is_empty() {
            self.extents.push((self.requested.max(1), 0));
        }
        let count = self.extents.len();
        if to.mode() == ReplyMode::Extended {
            to.chunk(out, last, ChunkType::BlockStatusExt, 8 + 16 * count as u64);
            out.extend_from_slice(&id.to_be_bytes());
            out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            out.reserve(16 * count);
            for (length, flags) in self.extents.drain(..) {
                let both = u128::from(length) << 64 | u128::from(flags);
                out.extend_from_slice(&both.to_be_bytes());
            }
        } else {
            to.chunk(out, last, ChunkType::BlockStatus, 4 + 8 * count as u64);
            out.extend_from_slice(&id.to_be_bytes());
            let mut left = self.requested;
            out.reserve(8 * count);
            for (length, flags) in self.extents.drain(..) {
                // Contexts with wider flags are never selected without extended headers.
                let flags = u32::try_from(flags).unwrap_or(0);
                let both = u64::from(narrow(length, left)) << 32 | u64::from(flags);
                out.extend_from_slice(&both.to_be_bytes());
                left = left.saturating_sub(length);
            }
        }
        self.covered = 0;
        self.full = self.requested == 0;
    }
}

/// A length in 32 bits. Only a last extent can be longer, since requests with 32-bit extents
/// are 32 bit themselves: it is cut, but not below what is `left` of the request.
fn narrow(length: u64, left: u64) -> u32 {
    u32::try_from(length).unwrap_or_else(|_| {
        let cut = EXTENT_CLAMP.max(left.min(u64::from(u32::MAX)));
        u32::try_from(cut).unwrap_or(u32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::{Command, CommandFlags, Request};

    fn to(mode: ReplyMode) -> ReplyTo {
        let flags = CommandFlags::empty();
        let command = Command::BLOCK_STATUS;
        ReplyTo::new(
            mode,
            &Request {
                flags,
                command,
                cookie: 7,
                offset: 0,
                length: 0,
            },
        )
    }

    /// The extents as a client with 32-bit extents reads them.
    fn narrow_extents(mut status: StatusExtents) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        status.finish(&to(ReplyMode::Structured), 3, true, &mut out);
        assert_eq!(&out[..8], b"\x66\x8e\x33\xef\0\x01\0\x05");
        assert_eq!(
            out[16..20],
            u32::try_from(out.len() - 20).unwrap().to_be_bytes()
        );
        assert_eq!(out[20..24], 3u32.to_be_bytes());
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        out[24..]
            .chunks(8)
            .map(|pair| (word(&pair[..4]), word(&pair[4..])))
            .collect()
    }

    #[test]
    fn both_chunks_are_written_byte_for_byte() {
        let mut status = StatusExtents::new(false, 1024, 4096, 1);
        let mut out = Vec::new();
        assert!(status.push(512, 3));
        assert!(!status.push(1024, 0));
        status.finish(&to(ReplyMode::Structured), 1, false, &mut out);
        assert_eq!(
            out,
            b"\x66\x8e\x33\xef\0\0\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x14\0\0\0\x01\
              \0\0\x02\0\0\0\0\x03\0\0\x04\0\0\0\0\0"
        );
        out.clear();
        status.push(u64::MAX, 1 << 40);
        status.finish(&to(ReplyMode::Extended), 1, true, &mut out);
        assert_eq!(
            out,
            b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x18\
              \0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\x01\0\0\0\0\0"
        );
    }

    #[test]
    fn equal_neighbours_merge_and_empty_extents_vanish() {
        let mut status = StatusExtents::new(false, 4096, 4096, 1);
        for (length, flags) in [
            (0, 1),
            (512, 0),
            (512, 0),
            (0, 3),
            (512, 3),
            (0, 0),
            (512, 3),
        ] {
            assert!(status.push(length, flags));
        }
        assert_eq!(status.covered(), 2048);
        assert_eq!(narrow_extents(status), [(1024, 0), (1024, 3)]);
    }

    #[test]
    fn only_the_last_extent_overruns_and_never_the_export() {
        let mut status = StatusExtents::new(false, 1000, 3000, 1);
        assert!(status.push(999, 0));
        assert!(!status.push(5000, 3));
        assert!(!status.push(5000, 0));
        assert_eq!(narrow_extents(status), [(999, 0), (2001, 3)]);
    }

    #[test]
    fn req_one_is_exactly_one_within_the_request() {
        let mut status = StatusExtents::new(true, 1000, 3000, 2);
        assert!(!status.push(5000, 3));
        assert_eq!(narrow_extents(status), [(1000, 3)]);
        let mut status = StatusExtents::new(true, 1000, 3000, 2);
        assert!(status.push(10, 1) && status.push(10, 1));
        assert!(!status.push(10, 0));
        assert!(!status.push(10, 1));
        assert_eq!(narrow_extents(status), [(20, 1)]);
    }

    /// CVE-2025-47711: one extent of 4 GiB or more for a request of 2^32 - 1 bytes.
    #[test]
    fn cve_2025_47711_an_extent_beyond_32_bit_is_cut_and_still_covers_the_request() {
        let requested = u64::from(u32::MAX);
        for length in [1 << 32, (1 << 32) - 1, u64::MAX] {
            let mut status = StatusExtents::new(false, requested, 1 << 40, 1);
            assert!(!status.push(length, 0));
            assert_eq!(narrow_extents(status), [(u32::MAX, 0)]);
        }
        let mut status = StatusExtents::new(false, 512, 1 << 40, 1);
        status.push(u64::MAX, 0);
        assert_eq!(narrow_extents(status), [(0xffff_0000, 0)]);
        // Merging must not wrap either.
        let mut status = StatusExtents::new(false, requested, u64::MAX, 1);
        assert!(status.push(requested - 1, 0));
        assert!(!status.push(u64::MAX, 0));
        assert_eq!(narrow_extents(status), [(u32::MAX, 0)]);
    }

    /// CVE-2025-47712: rounding a length near 2^32 up to a block wrapped to an empty extent.
    #[test]
    fn cve_2025_47712_lengths_near_the_maximum_never_become_empty() {
        for requested in [u64::from(u32::MAX), 0xffff_fe00, 0xffff_0001, 1] {
            let mut status = StatusExtents::new(false, requested, requested, 1);
            status.push(requested.next_multiple_of(0x1_0000), 3);
            assert_eq!(
                narrow_extents(status),
                [(u32::try_from(requested).unwrap(), 3)]
            );
        }
    }

    /// A length of 4294966784 (2^32 - 512) is a number to report, nothing to allocate.
    #[test]
    fn a_status_length_of_4294966784_costs_one_extent() {
        let mut status = StatusExtents::new(false, 4_294_966_784, 1 << 40, 1);
        status.push(1 << 33, 3);
        assert!(status.extents.capacity() <= 8);
        assert_eq!(narrow_extents(status), [(4_294_966_784, 3)]);
    }

    #[test]
    fn a_silent_provider_is_answered_with_status_zero() {
        assert_eq!(
            narrow_extents(StatusExtents::new(false, 777, 1000, 1)),
            [(777, 0)]
        );
    }

    #[test]
    fn extents_are_capped_over_all_contexts_of_a_reply() {
        for contexts in [1u32, 4] {
            let mut status = StatusExtents::new(false, 1 << 31, 1 << 31, contexts);
            let mut pushed = 0u64;
            while status.push(512, pushed & 1) {
                pushed += 1;
            }
            let cap = (1 << 20) / contexts as usize;
            assert_eq!(narrow_extents(status).len(), cap);
        }
    }

    #[test]
    fn an_unaligned_tail_is_reported_to_the_byte() {
        let mut status = StatusExtents::new(false, 513, 513, 1);
        assert!(status.push(512, 0));
        assert!(!status.push(512, 3));
        assert_eq!(narrow_extents(status), [(512, 0), (1, 3)]);
    }
}
