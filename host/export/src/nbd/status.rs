//! The extents of a block status reply: whatever a provider reports, the chunk is legal.
//!
//! Written on the connection's iothread straight into the reply, once per context: of a million
//! extents none is kept anywhere else. Invariant: at least one extent, none empty, all but the last
//! inside the request, none past the export, and never more of them than [`EXTENTS_MAX`] over the
//! contexts of one reply, nor than the request has sectors and two.
//! NBD proto: `NBD_REPLY_TYPE_BLOCK_STATUS`.

use outport_block::metacontext::ContextExtent;

use super::limits::{EXTENT_CLAMP, EXTENTS_MAX};
use super::reply::{ReplyMode, ReplyTo};
use super::wire::ChunkType;

/// What a client asked for.
#[derive(Clone, Copy, Debug)]
pub struct StatusAsked {
    /// One extent, not longer than the request.
    pub one: bool,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes from the request's offset to the end of the export.
    pub available: u64,
    /// How many contexts the reply reports.
    pub contexts: u32,
}

impl StatusAsked {
    /// Extents of each context: what a client that is told of sectors needs, so that a reply is in
    /// proportion to the request.
    fn extents_max(&self) -> usize {
        if self.one {
            return 1;
        }
        let share = EXTENTS_MAX / self.contexts.max(1) as usize;
        let sectors = usize::try_from(self.requested / 512 + 2).unwrap_or(usize::MAX);
        share.min(sectors).max(1)
    }

    /// Bytes that the reply takes at most.
    #[must_use]
    pub fn reply_max(&self) -> u64 {
        let extents = self.extents_max() as u64;
        u64::from(self.contexts) * (HEADER_MAX + extents * EXTENT_MAX)
    }
}

/// Bytes of a chunk before its extents, at most.
const HEADER_MAX: u64 = 40;

/// Flags that fit clients without extended headers.
const MASK_32: u64 = u32::MAX as u64;

/// Bytes of an extent, at most.
const EXTENT_MAX: u64 = 16;

/// Writes the chunk of one context.
#[derive(Debug)]
pub struct StatusExtents<'a> {
    out: &'a mut Vec<u8>,
    to: ReplyTo,
    id: u32,
    asked: StatusAsked,
    /// Where the chunk begins.
    start: usize,
    extents_max: usize,
    /// Extents so far, with the one that may still grow.
    count: usize,
    open: Option<(u64, u64)>,
    covered: u64,
    full: bool,
}

impl<'a> StatusExtents<'a> {
    /// The chunk of the context `id`, at the end of `out`.
    #[must_use]
    pub fn begin(to: ReplyTo, id: u32, mut asked: StatusAsked, out: &'a mut Vec<u8>) -> Self {
        asked.available = asked.available.max(asked.requested);
        let extents = Self {
            start: out.len(),
            out,
            to,
            id,
            asked,
            extents_max: asked.extents_max(),
            count: 0,
            open: None,
            covered: 0,
            full: asked.requested == 0,
        };
        let header = extents.header(false);
        extents.out.extend_from_slice(&header);
        extents
    }

    fn header(&self, last: bool) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_MAX as usize);
        let count = self.count as u64;
        if self.to.mode() == ReplyMode::Extended {
            let length = 8 + 16 * count;
            self.to
                .chunk(&mut header, last, ChunkType::BlockStatusExt, length);
            header.extend_from_slice(&self.id.to_be_bytes());
            header.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
        } else {
            let length = 4 + 8 * count;
            self.to
                .chunk(&mut header, last, ChunkType::BlockStatus, length);
            header.extend_from_slice(&self.id.to_be_bytes());
        }
        header
    }

    /// Adds what follows the extents so far; `false` once there is no use in more.
    ///
    /// Empty extents count for nothing, and equal neighbours become one.
    #[inline]
    pub fn push(&mut self, length: u64, flags: u64) -> bool {
        let end = if self.asked.one {
            self.asked.requested
        } else {
            self.asked.available
        };
        let length = length.min(end - self.covered);
        if self.full || length == 0 {
            return !self.full;
        }
        match &mut self.open {
            Some((open, same)) if *same == flags => *open += length,
            Some(_) if self.count == self.extents_max => self.full = true,
            _ => {
                self.write_open();
                self.open = Some((length, flags));
                self.count += 1;
            }
        }
        if !self.full {
            self.covered += length;
            self.full = self.covered >= self.asked.requested;
        }
        !self.full
    }

    /// Adds all of these, in order; `false` once there is no use in more.
    ///
    /// Most replies with many extents have nothing to merge or to cut and fit a client with 32-bit
    /// extents. So far as that is so they are written in one go, a few nanoseconds each.
    pub fn push_all(&mut self, extents: &[ContextExtent]) -> bool {
        let plain = self.write_plain(extents);
        extents[plain..]
            .iter()
            .all(|it| self.push(it.len, it.flags))
            && !self.full
    }

    /// Writes the first of these that need no second look, and how many they are.
    fn write_plain(&mut self, extents: &[ContextExtent]) -> usize {
        let Some((mut len, mut flags)) = self.open else {
            return 0;
        };
        if self.to.mode() == ReplyMode::Extended || self.full {
            return 0;
        }
        let start = self.out.len();
        let room = extents.len().min(self.extents_max - self.count);
        self.out.resize(start + 8 * room, 0);
        let (slots, _) = self.out[start..].as_chunks_mut::<8>();
        let mut left = self.asked.requested - self.covered;
        let mut written = 0;
        for (slot, next) in slots.iter_mut().zip(extents) {
            // The last one of a reply, and what is to be merged, are for `push`.
            if next.len == 0 || next.len >= left || next.flags == flags || flags > MASK_32 {
                break;
            }
            *slot = (len << 32 | flags).to_be_bytes();
            (len, flags) = (next.len, next.flags);
            left -= next.len;
            written += 1;
        }
        self.out.truncate(start + 8 * written);
        self.open = Some((len, flags));
        self.covered = self.asked.requested - left;
        self.count += written;
        written
    }

    /// Writes the extent that may still grow: it does no more.
    #[inline]
    fn write_open(&mut self) {
        let Some((length, flags)) = self.open else {
            return;
        };
        if self.to.mode() == ReplyMode::Extended {
            let both = u128::from(length) << 64 | u128::from(flags);
            self.out.extend_from_slice(&both.to_be_bytes());
        } else {
            let left = self.asked.requested.saturating_sub(self.covered - length);
            // Contexts with wider flags are never selected without extended headers.
            let flags = u32::try_from(flags).unwrap_or(0);
            let both = u64::from(narrow(length, left)) << 32 | u64::from(flags);
            self.out.extend_from_slice(&both.to_be_bytes());
        }
    }

    /// How many more extents are of use: one too many shows where the last one ends.
    #[must_use]
    pub fn room(&self) -> usize {
        self.extents_max + 1 - self.count
    }

    /// Bytes covered so far, from the request's offset: where the next extent begins.
    #[must_use]
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// The chunk is complete; the `last` one ends the reply.
    ///
    /// A provider that reported nothing is answered for: status 0 is always safe.
    pub fn finish(mut self, last: bool) {
        if self.open.is_none() {
            self.covered = self.asked.requested.max(1);
            self.open = Some((self.covered, 0));
            self.count = 1;
        }
        self.write_open();
        let header = self.header(last);
        self.out[self.start..self.start + header.len()].copy_from_slice(&header);
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

    fn asked(one: bool, requested: u64, available: u64, contexts: u32) -> StatusAsked {
        StatusAsked {
            one,
            requested,
            available,
            contexts,
        }
    }

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

    /// The chunk after these were pushed, and what the pushes returned.
    fn written(asked: StatusAsked, extents: &[(u64, u64)]) -> (Vec<u8>, Vec<bool>) {
        let mut out = b"before".to_vec();
        let mut status = StatusExtents::begin(to(ReplyMode::Structured), 3, asked, &mut out);
        let push = |(length, flags): &(u64, u64)| status.push(*length, *flags);
        let wanted = extents.iter().map(push).collect();
        status.finish(true);
        assert_eq!(&out[..6], b"before");
        let len = (out.len() - 6) as u64;
        assert!(len <= asked.reply_max(), "{len} {}", asked.reply_max());
        (out.split_off(6), wanted)
    }

    /// The extents as a client with 32-bit extents reads them.
    fn narrow_extents(asked: StatusAsked, extents: &[(u64, u64)]) -> Vec<(u32, u32)> {
        let (out, _) = written(asked, extents);
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
        let asked = asked(false, 1024, 4096, 1);
        let mut out = Vec::new();
        let mut status = StatusExtents::begin(to(ReplyMode::Structured), 1, asked, &mut out);
        assert!(status.push(512, 3));
        assert!(!status.push(1024, 0));
        status.finish(false);
        assert_eq!(
            out,
            b"\x66\x8e\x33\xef\0\0\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x14\0\0\0\x01\
              \0\0\x02\0\0\0\0\x03\0\0\x04\0\0\0\0\0"
        );
        out.clear();
        let mut status = StatusExtents::begin(to(ReplyMode::Extended), 1, asked, &mut out);
        status.push(u64::MAX, 1 << 40);
        status.finish(true);
        assert_eq!(
            out,
            b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x18\
              \0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\x01\0\0\0\0\0"
        );
    }

    #[test]
    fn equal_neighbours_merge_and_empty_extents_vanish() {
        let extents = [
            (0, 1),
            (512, 0),
            (512, 0),
            (0, 3),
            (512, 3),
            (0, 0),
            (512, 3),
        ];
        let asked = asked(false, 4096, 4096, 1);
        assert_eq!(written(asked, &extents).1, [true; 7]);
        assert_eq!(narrow_extents(asked, &extents), [(1024, 0), (1024, 3)]);
    }

    #[test]
    fn only_the_last_extent_overruns_and_never_the_export() {
        let extents = [(999, 0), (5000, 3), (5000, 0)];
        let asked = asked(false, 1000, 3000, 1);
        assert_eq!(written(asked, &extents).1, [true, false, false]);
        assert_eq!(narrow_extents(asked, &extents), [(999, 0), (2001, 3)]);
    }

    #[test]
    fn req_one_is_exactly_one_within_the_request() {
        let asked = asked(true, 1000, 3000, 2);
        assert_eq!(written(asked, &[(5000, 3)]).1, [false]);
        assert_eq!(narrow_extents(asked, &[(5000, 3)]), [(1000, 3)]);
        let extents = [(10, 1), (10, 1), (10, 0), (10, 1)];
        assert_eq!(written(asked, &extents).1, [true, true, false, false]);
        assert_eq!(narrow_extents(asked, &extents), [(20, 1)]);
    }

    /// CVE-2025-47711: one extent of 4 GiB or more for a request of 2^32 - 1 bytes.
    #[test]
    fn cve_2025_47711_an_extent_beyond_32_bit_is_cut_and_still_covers_the_request() {
        let requested = u64::from(u32::MAX);
        for length in [1 << 32, (1 << 32) - 1, u64::MAX] {
            let asked = asked(false, requested, 1 << 40, 1);
            assert_eq!(written(asked, &[(length, 0)]).1, [false]);
            assert_eq!(narrow_extents(asked, &[(length, 0)]), [(u32::MAX, 0)]);
        }
        let small = asked(false, 512, 1 << 40, 1);
        assert_eq!(narrow_extents(small, &[(u64::MAX, 0)]), [(0xffff_0000, 0)]);
        // Merging must not wrap either.
        let large = asked(false, requested, u64::MAX, 1);
        let extents = [(requested - 1, 0), (u64::MAX, 0)];
        assert_eq!(written(large, &extents).1, [true, false]);
        assert_eq!(narrow_extents(large, &extents), [(u32::MAX, 0)]);
    }

    /// CVE-2025-47712: rounding a length near 2^32 up to a block wrapped to an empty extent.
    #[test]
    fn cve_2025_47712_lengths_near_the_maximum_never_become_empty() {
        for requested in [u64::from(u32::MAX), 0xffff_fe00, 0xffff_0001, 1] {
            let extents = [(requested.next_multiple_of(0x1_0000), 3)];
            assert_eq!(
                narrow_extents(asked(false, requested, requested, 1), &extents),
                [(u32::try_from(requested).unwrap(), 3)]
            );
        }
    }

    /// A length of 4294966784 (2^32 - 512) is a number to report, nothing to allocate.
    #[test]
    fn a_status_length_of_4294966784_costs_one_extent() {
        let asked = asked(false, 4_294_966_784, 1 << 40, 1);
        let (out, _) = written(asked, &[(1 << 33, 3)]);
        assert!(out.capacity() <= 128);
        assert_eq!(narrow_extents(asked, &[(1 << 33, 3)]), [(4_294_966_784, 3)]);
    }

    #[test]
    fn a_silent_provider_is_answered_with_status_zero() {
        assert_eq!(narrow_extents(asked(false, 777, 1000, 1), &[]), [(777, 0)]);
    }

    #[test]
    fn extents_are_capped_over_all_contexts_of_a_reply() {
        for contexts in [1u32, 4] {
            let asked = asked(false, 1 << 31, 1 << 31, contexts);
            let extents: Vec<_> = (0..(1 << 20) + 2).map(|at| (512, at & 1)).collect();
            let cap = (1 << 20) / contexts as usize;
            assert_eq!(narrow_extents(asked, &extents).len(), cap);
        }
    }

    /// As `push` would have it, whatever comes.
    #[test]
    fn many_at_once_are_as_one_by_one() {
        let mut random = crate::nbd::haggle::testing::Random::new(5);
        for round in 0..2000 {
            let mut number = |below: u64| random.next() % below;
            let requested = 1 + number(100_000);
            let asked = asked(number(9) == 0, requested, requested + number(5000), 1);
            let extents: Vec<_> = (0..number(200))
                .map(|_| (number(1200), [0, 1, 3, 1 << 33][number(4) as usize]))
                .collect();
            let listed = extents
                .iter()
                .map(|&(len, flags)| ContextExtent { len, flags });
            let listed: Vec<_> = listed.collect();
            for mode in [ReplyMode::Structured, ReplyMode::Extended] {
                let (mut one, mut all) = (Vec::new(), Vec::new());
                let mut status = StatusExtents::begin(to(mode), 3, asked, &mut one);
                let more = extents.iter().all(|it| status.push(it.0, it.1));
                let covered = status.covered();
                status.finish(true);
                let mut status = StatusExtents::begin(to(mode), 3, asked, &mut all);
                let cut = listed.len() / 3;
                let wanted = status.push_all(&listed[..cut]) && status.push_all(&listed[cut..]);
                assert_eq!((wanted, status.covered()), (more, covered), "round {round}");
                status.finish(true);
                assert!(one == all, "round {round}");
            }
        }
    }

    #[test]
    fn an_unaligned_tail_is_reported_to_the_byte() {
        let asked = asked(false, 513, 513, 1);
        let extents = [(512, 0), (512, 3)];
        assert_eq!(written(asked, &extents).1, [true, false]);
        assert_eq!(narrow_extents(asked, &extents), [(512, 0), (1, 3)]);
    }
}
