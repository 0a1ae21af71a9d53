//! The split ring (virtio 1.2, section 2.7).

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{Chain, DESCRIPTOR, Descriptor};
use super::inflight::SplitRegion;
use super::{Broken, Setup, Taken, passes};
use crate::vhost_user::dirty::DirtyLog;
use crate::vhost_user::limits::QUEUE_SIZE_MAX;
use crate::vhost_user::memory::{Area, Memory, full_fence};
use outport_block::Errno;

/// Where the entries of the available and used rings begin, and their index lies before them.
const ENTRIES: usize = 4;
const INDEX: usize = 2;
/// Bytes of an entry of the used ring.
const USED: usize = 8;

/// A ring that runs.
#[derive(Debug)]
pub(in super::super) struct Split {
    descriptors: Area,
    available: Area,
    used: Area,
    size: u16,
    /// The driver's index as it was seen last: loading it is a cache miss.
    seen: u16,
    next_available: u16,
    next_used: u16,
    published: u16,
    /// The used index when the driver was asked last whether it wants to be told.
    asked: u16,
    event_idx: bool,
    indirect: bool,
    /// Guest address of the used ring, for the log.
    log: Option<u64>,
    inflight: Option<SplitRegion>,
}

struct Areas(Area, Area, Area);

fn areas(setup: &Setup, memory: &Memory) -> Result<Areas, Errno> {
    let size = u64::from(setup.size);
    if !setup.size.is_power_of_two() || setup.size > QUEUE_SIZE_MAX {
        return Err(Errno::Inval);
    }
    let address = &setup.address;
    // Each of the rings ends with the other side's event index.
    let found = (
        memory.area(address.descriptors, size * DESCRIPTOR as u64),
        memory.area(address.available, size * 2 + ENTRIES as u64 + 2),
        memory.area(address.used, size * USED as u64 + ENTRIES as u64 + 2),
    );
    match found {
        (Some(descriptors), Some(available), Some(used))
            // Not the sixteen bytes of the specification: eight are what is needed here.
            if descriptors.is_aligned(8) && available.is_aligned(2) && used.is_aligned(4) =>
        {
            Ok(Areas(descriptors, available, used))
        }
        _ => Err(Errno::Inval),
    }
}

impl Split {
    pub(super) fn start(
        setup: &Setup,
        memory: &Memory,
        inflight: Option<Area>,
    ) -> Result<Self, Errno> {
        let Areas(descriptors, available, used) = areas(setup, memory)?;
        let next_used = used.load16(INDEX);
        let mut next_available = setup.base as u16;
        let inflight = inflight.map(|area| SplitRegion::open(area, setup.size, next_used));
        if let Some(region) = &inflight
            && region.has_undone()
        {
            // What was taken and not given back is there; the front-end cannot know how much.
            next_available = next_used.wrapping_add(region.undone());
        }
        Ok(Self {
            seen: next_available,
            next_available,
            next_used,
            published: next_used,
            asked: next_used,
            descriptors,
            available,
            used,
            size: setup.size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            log: setup.address.is_logged.then_some(setup.address.log),
            inflight,
        })
    }

    pub(super) fn relocate(&mut self, setup: &Setup, memory: &Memory) -> Result<(), Errno> {
        let Areas(descriptors, available, used) = areas(setup, memory)?;
        self.descriptors = descriptors;
        self.available = available;
        self.used = used;
        self.log = setup.address.is_logged.then_some(setup.address.log);
        Ok(())
    }

    /// Index of a free-running counter in the ring.
    const fn place(&self, counter: u16) -> usize {
        (counter & (self.size - 1)) as usize
    }

    pub(super) fn has_more(&self) -> bool {
        self.inflight.as_ref().is_some_and(SplitRegion::has_undone)
            || self.seen != self.next_available
            || self.available.load16(INDEX) != self.next_available
    }

    pub(super) fn take(
        &mut self,
        memory: &Memory,
        chain: &mut Chain,
    ) -> Result<Option<Taken>, Broken> {
        chain.clear();
        let undone = self.inflight.as_mut().and_then(SplitRegion::next_undone);
        let id = if let Some(id) = undone {
            id
        } else {
            if self.seen == self.next_available {
                self.seen = self.available.load16(INDEX);
                if self.seen == self.next_available {
                    return Ok(None);
                }
            }
            if self.seen.wrapping_sub(self.next_available) > self.size {
                return Err(Broken::Available);
            }
            let at = ENTRIES + 2 * self.place(self.next_available);
            let id = self.available.load16(at);
            if id >= self.size {
                return Err(Broken::Index(id, self.size));
            }
            self.next_available = self.next_available.wrapping_add(1);
            if let Some(region) = &mut self.inflight {
                region.take(id);
            }
            id
        };
        self.walk(id, memory, chain)?;
        Ok(Some(Taken {
            id,
            places: 1,
            entry: 0,
        }))
    }

    fn walk(&self, id: u16, memory: &Memory, chain: &mut Chain) -> Result<(), Broken> {
        let mut index = id;
        for _ in 0..self.size {
            let at = index as usize * DESCRIPTOR;
            let descriptor = Descriptor::split(self.descriptors.load_pair(at));
            if descriptor.is_table() {
                if !self.indirect || descriptor.has_next() {
                    return Err(Broken::Table);
                }
                return chain.push_table(memory, descriptor, false);
            }
            chain.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
            if index >= self.size {
                return Err(Broken::Index(index, self.size));
            }
        }
        Err(Broken::Endless)
    }

    pub(super) fn give(&mut self, taken: Taken, written: u32) {
        let at = ENTRIES + USED * self.place(self.next_used);
        let element = u64::from(taken.id) | u64::from(written) << 32;
        self.store_element(at, element);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(region) = &mut self.inflight {
            region.give(taken.id);
        }
    }

    /// The ring is aligned to four bytes, its elements have eight.
    fn store_element(&self, at: usize, element: u64) {
        for (n, half) in [element as u32, (element >> 32) as u32]
            .into_iter()
            .enumerate()
        {
            self.used.store32(at + 4 * n, half);
        }
    }

    pub(super) const fn unpublished(&self) -> usize {
        self.next_used.wrapping_sub(self.published) as usize
    }

    pub(super) fn publish(&mut self, log: Option<&DirtyLog>) -> bool {
        if self.unpublished() == 0 {
            return false;
        }
        self.used.store16(INDEX, self.next_used);
        if let Some(region) = &mut self.inflight {
            region.published(self.next_used);
        }
        if let (Some(log), Some(addr)) = (log, self.log) {
            let mut counter = self.published;
            while counter != self.next_used {
                let at = ENTRIES + USED * self.place(counter);
                log.mark(addr.saturating_add(at as u64), USED as u64);
                counter = counter.wrapping_add(1);
            }
            log.mark(addr, ENTRIES as u64);
        }
        self.published = self.next_used;
        // The driver writes what it wants and looks at the index; we do it the other way round.
        full_fence();
        let old = std::mem::replace(&mut self.asked, self.next_used);
        if self.event_idx {
            let event = self.available.load16(ENTRIES + 2 * self.size as usize);
            passes(event, self.next_used, old)
        } else {
            self.available.load16(0) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    pub(super) fn want_kicks(&mut self, wanted: bool, log: Option<&DirtyLog>) {
        let at = if self.event_idx {
            let at = ENTRIES + USED * self.size as usize;
            // Not wanting them needs no word: the driver kicks once it passes the index.
            if wanted {
                self.used.store16(at, self.next_available);
            }
            at
        } else {
            let flags = if wanted { 0 } else { VRING_USED_F_NO_NOTIFY };
            self.used.store16(0, flags as u16);
            0
        };
        if let (Some(log), Some(addr)) = (log, self.log) {
            log.mark(addr.saturating_add(at as u64), 2);
        }
        if wanted {
            full_fence();
        }
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_available)
    }
}
