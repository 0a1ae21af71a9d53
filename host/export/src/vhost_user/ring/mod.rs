//! A virtqueue as a device sees it: chains out, used buffers back.
//!
//! One data thread owns each ring. Split and packed rings ([`split`], [`packed`]) do the same work
//! on different memory; the inflight region is theirs, because its order against the used ring is
//! all that it is good for. Invariants: each field of a descriptor is read once; whatever the
//! driver writes into its ring, the outcome is a chain or a [`Broken`] ring; used buffers become
//! visible in batches, by [`Ring::publish`] alone.

mod chain;
mod inflight;
mod packed;
mod split;

use outport_block::Errno;

use super::dirty::DirtyLog;
use super::memory::{Area, Memory};
use super::wire::RingAddress;

pub(super) use chain::{Chain, Segment};
pub(super) use inflight::bytes_per_queue;

use packed::Packed;
use split::Split;

/// Why a ring cannot be served any longer: what its driver wrote makes no sense, and there is no
/// status byte to say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("more buffers available than the ring has")]
    Available,
    #[error("descriptor {0} of a ring of {1}")]
    Index(u16, u16),
    #[error("a chain that never ends")]
    Endless,
    #[error("a chain of more than {} descriptors", super::limits::CHAIN_MAX)]
    Long,
    #[error("an indirect table of {0} bytes")]
    TableLength(u32),
    #[error("an indirect table outside of guest memory")]
    TableAddress,
    #[error("an indirect table inside another, or one that was not negotiated")]
    Table,
    #[error("a request without a status byte")]
    NoStatus,
    #[error("an inflight region that makes no sense")]
    Inflight,
}

/// What was taken from a ring and must be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Head of the chain (split), or id of the buffer (packed).
    pub(super) id: u16,
    /// Places in the ring that it had (packed).
    pub(super) places: u16,
    /// Where the inflight region holds it (packed).
    entry: u16,
}

/// What a ring is started with.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Setup {
    /// Entries.
    pub(super) size: u16,
    pub(super) address: RingAddress,
    /// Where to go on, in the form of its kind.
    pub(super) base: u32,
    /// We said so ourselves when the ring was stopped.
    pub(super) resumed: bool,
    pub(super) packed: bool,
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
}

/// A running ring.
#[derive(Debug)]
pub(super) enum Ring {
    Split(Split),
    Packed(Packed),
}

impl Ring {
    /// Find the ring in memory, and in the inflight region what was left undone.
    ///
    /// # Errors
    /// `Inval`: a size or an address that cannot be.
    pub(super) fn start(
        setup: &Setup,
        memory: &Memory,
        inflight: Option<Area>,
    ) -> Result<Self, Errno> {
        if setup.packed {
            Packed::start(setup, memory, inflight).map(Self::Packed)
        } else {
            Split::start(setup, memory, inflight).map(Self::Split)
        }
    }

    /// The next chain, oldest first.
    ///
    /// # Errors
    /// The ring is broken.
    #[inline]
    pub(super) fn take(
        &mut self,
        memory: &Memory,
        chain: &mut Chain,
    ) -> Result<Option<Taken>, Broken> {
        match self {
            Self::Split(ring) => ring.take(memory, chain),
            Self::Packed(ring) => ring.take(memory, chain),
        }
    }

    /// A chain was used; `written` bytes of it were written.
    #[inline]
    pub(super) fn give(&mut self, taken: Taken, written: u32) {
        match self {
            Self::Split(ring) => ring.give(taken, written),
            Self::Packed(ring) => ring.give(taken, written),
        }
    }

    /// The driver sees what was given; `true`: it wants to be told.
    pub(super) fn publish(&mut self, log: Option<&DirtyLog>) -> bool {
        match self {
            Self::Split(ring) => ring.publish(log),
            Self::Packed(ring) => ring.publish(log),
        }
    }

    /// Used buffers that were not published.
    pub(super) fn unpublished(&self) -> usize {
        match self {
            Self::Split(ring) => ring.unpublished(),
            Self::Packed(ring) => ring.unpublished(),
        }
    }

    /// Ask the driver to kick, or not to. After asking, look again with [`Ring::has_more`].
    pub(super) fn want_kicks(&mut self, wanted: bool, log: Option<&DirtyLog>) {
        match self {
            Self::Split(ring) => ring.want_kicks(wanted, log),
            Self::Packed(ring) => ring.want_kicks(wanted, log),
        }
    }

    /// Is there something to take?
    #[inline]
    pub(super) fn has_more(&self) -> bool {
        match self {
            Self::Split(ring) => ring.has_more(),
            Self::Packed(ring) => ring.has_more(),
        }
    }

    /// Where another device would go on. Nothing is in flight.
    pub(super) fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => ring.base(),
            Self::Packed(ring) => ring.base(),
        }
    }

    /// Nothing is in flight and the front-end was told where to go on: the inflight region says
    /// nothing any more.
    pub(super) fn retire(&self) {
        if let Self::Packed(ring) = self {
            ring.retire();
        }
    }

    /// The ring moves to other memory, between two requests.
    ///
    /// # Errors
    /// `Inval`: the ring is not there.
    pub(super) fn relocate(&mut self, setup: &Setup, memory: &Memory) -> Result<(), Errno> {
        match self {
            Self::Split(ring) => ring.relocate(setup, memory),
            Self::Packed(ring) => ring.relocate(setup, memory),
        }
    }
}

/// Does a step from `old` to `new` pass `event`? (virtio: "vring_need_event")
const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
