//! The inflight region: what a daemon that was killed had taken and not given back.
//!
//! Memory that outlives us, laid out as the protocol's document says ("Inflight I/O tracking"),
//! one part per queue. The order of the stores is the point: whenever we stop between two of them,
//! [`SplitRegion::open`] and [`PackedRegion::open`] find exactly the requests whose end the driver
//! has not seen. The front-end can write here as well, so nothing that is read is used as an index
//! before it was compared with the size.

use std::collections::VecDeque;

use super::Broken;
use super::chain::Descriptor;
use super::packed::{OWNER, Place};
use crate::vhost_user::memory::Area;

/// Where both kinds tell which layout they have.
const VERSION: usize = 8;
const VERSION_1: u16 = 1;
const DESC_NUM: usize = 10;

/// Parts begin at cache lines.
const ALIGN: u64 = 64;

mod split {
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const HEADER: usize = 16;
    pub(super) const ENTRY: usize = 16;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

mod packed {
    pub(super) const FREE_HEAD: usize = 12;
    pub(super) const OLD_FREE_HEAD: usize = 14;
    pub(super) const USED_IDX: usize = 16;
    pub(super) const OLD_USED_IDX: usize = 18;
    pub(super) const WRAP: usize = 20;
    pub(super) const OLD_WRAP: usize = 21;
    pub(super) const HEADER: usize = 32;
    pub(super) const ENTRY: usize = 32;
    pub(super) const NEXT: usize = 2;
    pub(super) const LAST: usize = 4;
    pub(super) const NUM: usize = 6;
    pub(super) const COUNTER: usize = 8;
    pub(super) const REST: usize = 16;
    pub(super) const ADDR: usize = 24;
}

/// Bytes of the part of one queue.
pub(in super::super) fn bytes_per_queue(size: u16, packed: bool) -> u64 {
    let bytes = if packed {
        packed::HEADER + packed::ENTRY * size as usize
    } else {
        split::HEADER + split::ENTRY * size as usize
    };
    (bytes as u64).next_multiple_of(ALIGN)
}

/// The part of a split ring.
#[derive(Debug)]
pub(super) struct SplitRegion {
    area: Area,
    counter: u64,
    /// Given and not published.
    batch: Vec<u16>,
    /// Taken by a daemon before us, oldest first.
    undone: VecDeque<u16>,
}

impl SplitRegion {
    /// Find what was left undone; `used` is the index of the used ring.
    pub(super) fn open(area: Area, size: u16, used: u16) -> Self {
        let mut region = Self {
            area,
            counter: 0,
            batch: Vec::new(),
            undone: VecDeque::new(),
        };
        if region.area.load16(VERSION) != VERSION_1 {
            region.area.store16(DESC_NUM, size);
            region.area.store16(split::LAST_BATCH_HEAD, 0);
            region.area.store16(split::USED_IDX, used);
            region.area.store16(VERSION, VERSION_1);
            return region;
        }
        // The last batch was published, and we were stopped before this was written down.
        let behind = used.wrapping_sub(region.area.load16(split::USED_IDX));
        let mut head = region.area.load16(split::LAST_BATCH_HEAD);
        for _ in 0..behind.min(size) {
            if head >= size {
                break;
            }
            let at = Self::entry(head);
            region.area.store8(at, 0);
            head = region.area.load16(at + split::NEXT);
        }
        region.area.store16(split::USED_IDX, used);
        let mut undone: Vec<_> = (0..size)
            .filter(|id| region.area.load8(Self::entry(*id)) != 0)
            .map(|id| (region.area.load64(Self::entry(id) + split::COUNTER), id))
            .collect();
        undone.sort_unstable();
        region.counter = undone.last().map_or(0, |last| last.0.wrapping_add(1));
        region.undone = undone.into_iter().map(|(_, id)| id).collect();
        region
    }

    fn entry(id: u16) -> usize {
        split::HEADER + split::ENTRY * id as usize
    }

    /// How many were left undone and not taken again.
    pub(super) fn undone(&self) -> u16 {
        // No more than the ring has entries.
        self.undone.len() as u16
    }

    pub(super) fn has_undone(&self) -> bool {
        !self.undone.is_empty()
    }

    pub(super) fn next_undone(&mut self) -> Option<u16> {
        self.undone.pop_front()
    }

    pub(super) fn take(&mut self, id: u16) {
        let at = Self::entry(id);
        self.area.store64(at + split::COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.area.store8(at, 1);
    }

    pub(super) fn give(&mut self, id: u16) {
        let last = self.area.load16(split::LAST_BATCH_HEAD);
        self.area.store16(Self::entry(id) + split::NEXT, last);
        self.area.store16(split::LAST_BATCH_HEAD, id);
        self.batch.push(id);
    }

    /// The used ring has this index now.
    pub(super) fn published(&mut self, used: u16) {
        for id in self.batch.drain(..) {
            self.area.store8(Self::entry(id), 0);
        }
        self.area.store16(split::USED_IDX, used);
    }
}

/// The part of a packed ring. Its descriptors are overwritten as the ring goes round, so they are
/// kept here, in entries that are linked to chains and a free list.
#[derive(Debug)]
pub(super) struct PackedRegion {
    area: Area,
    size: u16,
    was_open: bool,
    counter: u64,
    used: Place,
    free: u16,
    /// Entry that follows each entry, in its chain or in the free list.
    next: Vec<u16>,
    /// Last entry of the chain that begins at each.
    last: Vec<u16>,
    /// The chain that is being taken: its first and its latest entry, and how many.
    taking: (u16, u16, u16),
    /// Given and not published: not free yet, or the next chain would overwrite what a daemon
    /// after us may have to do again.
    batch: Vec<u16>,
    undone: VecDeque<u16>,
    undone_places: u16,
}

impl PackedRegion {
    /// Find what was left undone. `used` counts if nobody wrote here before; `flags` are those of
    /// the descriptor at an index of the ring.
    ///
    /// # Errors
    /// It makes no sense.
    pub(super) fn open(
        area: Area,
        size: u16,
        used: Place,
        flags: impl Fn(u16) -> u16,
    ) -> Result<Self, Broken> {
        let was_open = area.load16(VERSION) == VERSION_1;
        let mut region = Self {
            area,
            size,
            was_open,
            counter: 0,
            used,
            free: 0,
            next: (1..=size).collect(),
            last: vec![0; size as usize],
            taking: (0, 0, 0),
            batch: Vec::new(),
            undone: VecDeque::new(),
            undone_places: 0,
        };
        if was_open {
            region.recover(flags)?;
        } else {
            region.area.store16(DESC_NUM, size);
            for (entry, next) in (0..size).zip(1..) {
                region.area.store8(Self::entry(entry), 0);
                region.area.store16(Self::entry(entry) + packed::NEXT, next);
            }
            region.area.store16(packed::FREE_HEAD, 0);
            region.publishing(used);
            region.published();
            region.area.store16(VERSION, VERSION_1);
        }
        Ok(region)
    }

    fn recover(&mut self, flags: impl Fn(u16) -> u16) -> Result<(), Broken> {
        let area = &self.area;
        if area.load16(DESC_NUM) != self.size {
            return Err(Broken::Inflight);
        }
        let place = |index: usize, wrap: usize| Place {
            index: area.load16(index),
            wrap: area.load8(wrap) != 0,
        };
        let new = place(packed::USED_IDX, packed::WRAP);
        let old = place(packed::OLD_USED_IDX, packed::OLD_WRAP);
        if new.index >= self.size || old.index >= self.size {
            return Err(Broken::Inflight);
        }
        // The first descriptor of a batch is written last: it tells whether the driver saw it.
        let committed = new != old && flags(old.index) & OWNER != old.available();
        (self.used, self.free) = if committed {
            (new, area.load16(packed::FREE_HEAD))
        } else {
            (old, area.load16(packed::OLD_FREE_HEAD))
        };
        for entry in 0..self.size {
            let next = area.load16(Self::entry(entry) + packed::NEXT);
            self.next[entry as usize] = next.min(self.size);
        }
        let mut free = self.free;
        for _ in 0..self.size {
            if free >= self.size {
                break;
            }
            area.store8(Self::entry(free), 0);
            free = self.next[free as usize];
        }
        self.area.store16(packed::FREE_HEAD, self.free);
        self.publishing(self.used);
        self.published();
        self.collect()
    }

    /// The chains that are in flight, oldest first.
    fn collect(&mut self) -> Result<(), Broken> {
        let area = &self.area;
        let mut undone: Vec<_> = (0..self.size)
            .filter(|entry| area.load8(Self::entry(*entry)) != 0)
            .map(|entry| (area.load64(Self::entry(entry) + packed::COUNTER), entry))
            .collect();
        undone.sort_unstable();
        self.counter = undone.last().map_or(0, |last| last.0.wrapping_add(1));
        for (_, head) in undone {
            let places = self.chain(head).ok_or(Broken::Inflight)?.len();
            let last = self.area.load16(Self::entry(head) + packed::LAST);
            self.undone_places = u16::try_from(places)
                .ok()
                .and_then(|places| self.undone_places.checked_add(places))
                .filter(|sum| *sum <= self.size && last < self.size)
                .ok_or(Broken::Inflight)?;
            self.last[head as usize] = last;
            self.undone.push_back(head);
        }
        Ok(())
    }

    fn entry(entry: u16) -> usize {
        packed::HEADER + packed::ENTRY * entry as usize
    }

    /// Was it written by a daemon before us?
    pub(super) const fn was_open(&self) -> bool {
        self.was_open
    }

    /// Where the used descriptors go on.
    pub(super) const fn used(&self) -> Place {
        self.used
    }

    /// Places in the ring of all that was left undone.
    pub(super) const fn undone_places(&self) -> u16 {
        self.undone_places
    }

    pub(super) fn has_undone(&self) -> bool {
        !self.undone.is_empty()
    }

    pub(super) fn next_undone(&mut self) -> Option<u16> {
        self.undone.pop_front()
    }

    /// The descriptors of a chain; `None`: its entries make no sense.
    pub(super) fn chain(&self, head: u16) -> Option<Vec<Descriptor>> {
        let num = self.area.load16(Self::entry(head) + packed::NUM);
        let mut entry = head;
        let mut chain = Vec::new();
        for _ in 0..num.min(self.size) {
            if entry >= self.size {
                return None;
            }
            let at = Self::entry(entry);
            let rest = self.area.load64(at + packed::REST);
            // Id and flags come first here, then the length.
            chain.push(Descriptor {
                addr: self.area.load64(at + packed::ADDR),
                len: (rest >> 32) as u32,
                id: rest as u16,
                flags: (rest >> 16) as u16,
                next: 0,
            });
            entry = self.next[entry as usize];
        }
        Some(chain)
    }

    /// A chain is being taken; returns the entry that it will be known by.
    pub(super) fn begin(&mut self) -> u16 {
        let head = self.free;
        self.taking = (head, head, 0);
        if head < self.size {
            let at = Self::entry(head);
            self.area.store16(at + packed::NUM, 0);
            self.area.store64(at + packed::COUNTER, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.area.store8(at, 1);
        }
        head
    }

    /// The next descriptor of the chain; `None`: there is no free entry.
    pub(super) fn push(&mut self, descriptor: Descriptor) -> Option<()> {
        let entry = self.free;
        let next = *self.next.get(entry as usize)?;
        let at = Self::entry(entry);
        let rest = u64::from(descriptor.id)
            | u64::from(descriptor.flags) << 16
            | u64::from(descriptor.len) << 32;
        self.area.store64(at + packed::REST, rest);
        self.area.store64(at + packed::ADDR, descriptor.addr);
        let (head, _, num) = self.taking;
        self.taking = (head, entry, num + 1);
        self.area.store16(Self::entry(head) + packed::NUM, num + 1);
        self.free = next;
        self.area.store16(packed::FREE_HEAD, next);
        Some(())
    }

    /// The chain was taken.
    pub(super) fn end(&mut self) {
        let (head, last, _) = self.taking;
        self.last[head as usize] = last;
        self.area.store16(Self::entry(head) + packed::LAST, last);
        self.area.store16(packed::OLD_FREE_HEAD, self.free);
    }

    pub(super) fn give(&mut self, head: u16) {
        self.batch.push(head);
    }

    /// The used descriptors are about to go on here.
    pub(super) fn publishing(&mut self, used: Place) {
        for head in &self.batch {
            let Some(last) = self.last.get(*head as usize).copied() else {
                continue;
            };
            self.next[last as usize] = self.free;
            let at = Self::entry(last) + packed::NEXT;
            self.area.store16(at, self.free);
            self.free = *head;
        }
        self.area.store16(packed::FREE_HEAD, self.free);
        self.used = used;
        self.area.store16(packed::USED_IDX, used.index);
        self.area.store8(packed::WRAP, u8::from(used.wrap));
    }

    /// The driver sees what was given.
    pub(super) fn published(&mut self) {
        for head in self.batch.drain(..) {
            self.area.store8(Self::entry(head), 0);
        }
        self.area.store16(packed::OLD_FREE_HEAD, self.free);
        self.area.store16(packed::OLD_USED_IDX, self.used.index);
        self.area.store8(packed::OLD_WRAP, u8::from(self.used.wrap));
    }

    /// Whoever opens it next begins anew.
    pub(super) fn retire(&self) {
        self.area.store16(VERSION, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::memory::Memory;

    const SIZE: u16 = 8;
    const START: Place = Place {
        index: 0,
        wrap: true,
    };

    fn take(region: &mut PackedRegion, id: u16) -> u16 {
        let head = region.begin();
        let descriptor = Descriptor {
            addr: u64::from(id) << 12,
            len: 1,
            id,
            flags: 0,
            next: 0,
        };
        region.push(descriptor).unwrap();
        region.end();
        head
    }

    /// Buffer 1 is given back, 2 and 3 are taken before that is published, and the daemon is
    /// killed after so many steps: the ids that the next one finds undone.
    fn undone_after(steps: usize) -> Vec<u16> {
        let len = bytes_per_queue(SIZE, true);
        let memory = Memory::anonymous(0x1000, 0x1000).unwrap();
        let open = |flags: u16| {
            let area = memory.area(0x1000, len).unwrap();
            PackedRegion::open(area, SIZE, START, |_| flags).unwrap()
        };
        let mut flags = START.available();
        let mut region = open(flags);
        let first = take(&mut region, 1);
        for step in 0..steps {
            match step {
                0 => region.give(first),
                1 | 2 => assert_ne!(take(&mut region, step as u16 + 1), first),
                3 => region.publishing(START.plus(1, SIZE)),
                4 => flags = OWNER,
                _ => region.published(),
            }
        }
        let mut next = open(flags);
        let mut undone = Vec::new();
        while let Some(head) = next.next_undone() {
            undone.push(next.chain(head).unwrap()[0].id);
        }
        assert_eq!(usize::from(next.undone_places()), undone.len());
        undone
    }

    #[test]
    fn what_is_taken_before_a_publication_is_found_after_it() {
        let undone: Vec<_> = (0..=6).map(undone_after).collect();
        let (all, left) = (vec![1, 2, 3], vec![2, 3]);
        assert_eq!(undone[..2], [vec![1], vec![1]]);
        assert_eq!(
            undone[2..],
            [vec![1, 2], all.clone(), all, left.clone(), left]
        );
    }
}
