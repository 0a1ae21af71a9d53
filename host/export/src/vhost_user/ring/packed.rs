//! The packed ring (virtio 1.2, section 2.8).
//!
//! One table of descriptors, which the driver makes available and we mark used, each side with a
//! bit that changes its meaning on every round.

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{Chain, DESCRIPTOR, Descriptor};
use super::inflight::PackedRegion;
use super::{Broken, Setup, Taken, passes};
use crate::vhost_user::dirty::DirtyLog;
use crate::vhost_user::limits::QUEUE_SIZE_MAX;
use crate::vhost_user::memory::{Area, Memory, full_fence};
use outport_block::Errno;

const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// Bytes of an event suppression structure, and where its flags lie in it.
const EVENT: u64 = 4;
const EVENT_FLAGS: usize = 2;
const WRAP: u16 = 1 << 15;

/// The base of a ring that was never used.
const NEW: u32 = 0x8000_8000;

/// Where the flags lie in a descriptor.
const FLAGS: usize = 14;

/// A place in the ring, and which round it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Place {
    /// From the sixteen bits of a base.
    pub(super) const fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & !WRAP,
            wrap: bits & WRAP != 0,
        }
    }

    pub(super) const fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `by` places on, at most once around.
    pub(super) const fn plus(self, by: u16, size: u16) -> Self {
        let index = self.index as u32 + by as u32;
        if index >= size as u32 {
            Self {
                // Below `size`, since `by` is at most that.
                index: (index - size as u32) as u16,
                wrap: !self.wrap,
            }
        } else {
            Self {
                index: index as u16,
                wrap: self.wrap,
            }
        }
    }

    /// Flags of a descriptor that is available in this round.
    pub(super) const fn available(self) -> u16 {
        if self.wrap { AVAILABLE } else { USED }
    }

    /// Flags of a descriptor that was used in this round.
    const fn used(self) -> u16 {
        if self.wrap { AVAILABLE | USED } else { 0 }
    }
}

/// Both bits that tell whose a descriptor is.
pub(super) const OWNER: u16 = AVAILABLE | USED;

/// A ring that runs.
#[derive(Debug)]
pub(in super::super) struct Packed {
    ring: Area,
    /// The driver's wish to be told, and ours to be kicked.
    driver: Area,
    device: Area,
    size: u16,
    available: Place,
    used: Place,
    /// The first used descriptor that was not published: its flags are written last.
    first: Option<(u16, u16)>,
    unpublished: usize,
    /// Places that were used since the driver was asked last.
    places: u16,
    event_idx: bool,
    indirect: bool,
    /// Guest addresses of the ring and of our event structure, for the log.
    log: Option<(u64, u64)>,
    inflight: Option<PackedRegion>,
}

struct Areas(Area, Area, Area, Option<(u64, u64)>);

fn areas(setup: &Setup, memory: &Memory) -> Result<Areas, Errno> {
    if setup.size == 0 || setup.size > QUEUE_SIZE_MAX {
        return Err(Errno::Inval);
    }
    let address = &setup.address;
    let found = (
        memory.area(
            address.descriptors,
            u64::from(setup.size) * DESCRIPTOR as u64,
        ),
        memory.area(address.available, EVENT),
        memory.area(address.used, EVENT),
    );
    // The front-end tells where to log our event structure; the ring is in its memory table.
    let log = memory
        .guest_address(address.descriptors)
        .filter(|_| address.is_logged)
        .map(|ring| (ring, address.log));
    match found {
        (Some(ring), Some(driver), Some(device))
            if ring.is_aligned(8) && driver.is_aligned(4) && device.is_aligned(4) =>
        {
            Ok(Areas(ring, driver, device, log))
        }
        _ => Err(Errno::Inval),
    }
}

impl Packed {
    pub(super) fn start(
        setup: &Setup,
        memory: &Memory,
        inflight: Option<Area>,
    ) -> Result<Self, Errno> {
        let Areas(ring, driver, device, log) = areas(setup, memory)?;
        let flags = |index: u16| ring.load16(index as usize * DESCRIPTOR + FLAGS);
        let mut base = setup.base;
        if base == 0 && !setup.resumed && flags(0) & USED == 0 {
            // libblkio says 0 of a new ring, whose wrap bits are set. After an odd number of
            // rounds 0 is what it says, but then the first descriptor was used.
            base = NEW;
        }
        let mut available = Place::from_bits(base as u16);
        let mut used = Place::from_bits((base >> 16) as u16);
        let inflight = inflight
            .map(|area| PackedRegion::open(area, setup.size, used, flags))
            .transpose()
            .map_err(|_| Errno::Inval)?;
        if let Some(region) = &inflight {
            used = region.used();
            if region.was_open() {
                // What is in flight lies between the two; the front-end cannot know how much.
                available = used.plus(region.undone_places(), setup.size);
            }
        }
        if available.index >= setup.size || used.index >= setup.size {
            return Err(Errno::Inval);
        }
        Ok(Self {
            ring,
            driver,
            device,
            size: setup.size,
            available,
            used,
            first: None,
            unpublished: 0,
            places: 0,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            log,
            inflight,
        })
    }

    pub(super) fn relocate(&mut self, setup: &Setup, memory: &Memory) -> Result<(), Errno> {
        let Areas(ring, driver, device, log) = areas(setup, memory)?;
        self.ring = ring;
        self.driver = driver;
        self.device = device;
        self.log = log;
        Ok(())
    }

    fn flags(&self, place: Place) -> u16 {
        self.ring.load16(place.index as usize * DESCRIPTOR + FLAGS)
    }

    fn is_available(&self, place: Place) -> bool {
        self.flags(place) & OWNER == place.available()
    }

    pub(super) fn has_more(&self) -> bool {
        self.inflight.as_ref().is_some_and(PackedRegion::has_undone)
            || self.is_available(self.available)
    }

    pub(super) fn take(
        &mut self,
        memory: &Memory,
        chain: &mut Chain,
    ) -> Result<Option<Taken>, Broken> {
        chain.clear();
        if let Some(region) = &mut self.inflight
            && let Some(entry) = region.next_undone()
        {
            return self.take_again(entry, memory, chain).map(Some);
        }
        if !self.is_available(self.available) {
            return Ok(None);
        }
        let head = self.inflight.as_mut().map(|region| region.begin());
        let mut places = 0;
        let id = loop {
            if places >= self.size {
                return Err(Broken::Endless);
            }
            let place = self.available.plus(places, self.size);
            let at = place.index as usize * DESCRIPTOR;
            let descriptor = Descriptor::packed(self.ring.load_pair(at));
            places += 1;
            if let Some(region) = &mut self.inflight {
                region.push(descriptor).ok_or(Broken::Inflight)?;
            }
            self.push(descriptor, places, memory, chain)?;
            if !descriptor.has_next() {
                break descriptor.id;
            }
        };
        if let Some(region) = &mut self.inflight {
            region.end();
        }
        self.available = self.available.plus(places, self.size);
        Ok(Some(Taken {
            id,
            places,
            entry: head.unwrap_or(0),
        }))
    }

    fn push(
        &self,
        descriptor: Descriptor,
        places: u16,
        memory: &Memory,
        chain: &mut Chain,
    ) -> Result<(), Broken> {
        if !descriptor.is_table() {
            return chain.push(descriptor);
        }
        if !self.indirect || descriptor.has_next() || places > 1 {
            return Err(Broken::Table);
        }
        chain.push_table(memory, descriptor, true)
    }

    /// A chain that the inflight region remembers; the ring may say something else by now.
    fn take_again(
        &mut self,
        entry: u16,
        memory: &Memory,
        chain: &mut Chain,
    ) -> Result<Taken, Broken> {
        let region = self.inflight.as_ref().ok_or(Broken::Inflight)?;
        let descriptors = region.chain(entry).ok_or(Broken::Inflight)?;
        let last = descriptors.last().ok_or(Broken::Inflight)?;
        let (id, places) = (last.id, descriptors.len() as u16);
        for descriptor in descriptors {
            self.push(descriptor, places, memory, chain)?;
        }
        Ok(Taken { id, places, entry })
    }

    pub(super) fn give(&mut self, taken: Taken, written: u32) {
        let at = self.used.index as usize * DESCRIPTOR;
        let write = if written > 0 {
            VRING_DESC_F_WRITE as u16
        } else {
            0
        };
        let flags = self.used.used() | write;
        self.ring.store32(at + 8, written);
        self.ring.store16(at + 12, taken.id);
        if self.first.is_none() {
            self.first = Some((self.used.index, flags));
        } else {
            self.ring.store16(at + FLAGS, flags);
        }
        self.used = self.used.plus(taken.places, self.size);
        self.unpublished += 1;
        self.places = self.places.saturating_add(taken.places).min(self.size);
        if let Some(region) = &mut self.inflight {
            region.give(taken.entry);
        }
    }

    pub(super) const fn unpublished(&self) -> usize {
        self.unpublished
    }

    pub(super) fn publish(&mut self, log: Option<&DirtyLog>) -> bool {
        let Some((first, flags)) = self.first.take() else {
            return false;
        };
        if let Some(region) = &mut self.inflight {
            region.publishing(self.used);
        }
        self.ring
            .store16(first as usize * DESCRIPTOR + FLAGS, flags);
        if let Some(region) = &mut self.inflight {
            region.published();
        }
        if let (Some(log), Some((addr, _))) = (log, self.log) {
            self.mark(log, addr, first);
        }
        self.unpublished = 0;
        full_fence();
        let places = std::mem::replace(&mut self.places, 0);
        match u32::from(self.driver.load16(EVENT_FLAGS) & 3) {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let event = Place::from_bits(self.driver.load16(0));
                let behind = if event.wrap == self.used.wrap {
                    0
                } else {
                    self.size
                };
                let new = self.used.index;
                let event = event.index.wrapping_sub(behind);
                passes(event, new, new.wrapping_sub(places))
            }
            _ => true,
        }
    }

    /// Descriptors from `first` to where we are were written.
    fn mark(&self, log: &DirtyLog, addr: u64, first: u16) {
        let descriptor = DESCRIPTOR as u64;
        let mark = |from: u16, to: u16| {
            let start = addr.saturating_add(u64::from(from) * descriptor);
            log.mark(start, u64::from(to - from) * descriptor);
        };
        if first < self.used.index {
            mark(first, self.used.index);
        } else {
            mark(first, self.size);
            mark(0, self.used.index);
        }
    }

    pub(super) fn want_kicks(&mut self, wanted: bool, log: Option<&DirtyLog>) {
        let flags = match (wanted, self.event_idx) {
            (false, _) => VRING_PACKED_EVENT_FLAG_DISABLE,
            (true, false) => VRING_PACKED_EVENT_FLAG_ENABLE,
            (true, true) => {
                self.device.store16(0, self.available.bits());
                VRING_PACKED_EVENT_FLAG_DESC
            }
        };
        self.device.store16(EVENT_FLAGS, flags as u16);
        if let (Some(log), Some((_, event))) = (log, self.log) {
            log.mark(event, EVENT);
        }
        if wanted {
            full_fence();
        }
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.available.bits()) | u32::from(self.used.bits()) << 16
    }

    pub(super) fn retire(&self) {
        if let Some(region) = &self.inflight {
            region.retire();
        }
    }
}
