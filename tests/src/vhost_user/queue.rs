//! Virtqueues as a driver sees them, and requests of virtio-blk.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Guest;
use crate::wait::DEADLINE;

/// Flags of descriptors.
pub const NEXT: u16 = 1;
/// The device writes it.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const TABLE: u16 = 4;

/// Bytes of guest memory that one queue has for its rings, and where they lie.
const ROOM: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;

/// A descriptor of a split ring.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`TABLE`].
    pub flags: u16,
    /// The descriptor that follows.
    pub next: u16,
}

impl Desc {
    /// As it lies in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        bytes.extend_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Requests of virtio-blk.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod blk {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// A split ring.
#[derive(Debug)]
pub struct Split {
    /// Which queue.
    pub index: u32,
    /// Entries.
    pub size: u16,
    /// Where its rings lie.
    pub base: u64,
    /// The driver tells the device.
    pub kick: OwnedFd,
    /// The device tells the driver.
    pub call: OwnedFd,
    /// The device says that the ring is broken.
    pub err: OwnedFd,
    /// The driver's free-running indices.
    pub available: u16,
    used: u16,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Split {
    /// Queue `index`, at the front of guest memory; up to 1024 entries.
    pub fn new(index: u32, size: u16) -> Self {
        Self {
            index,
            size,
            base: Guest::BASE + u64::from(index) * ROOM,
            kick: event(),
            call: event(),
            err: event(),
            available: 0,
            used: 0,
        }
    }

    /// The payload of SET_VRING_ADDR.
    pub fn addresses(&self) -> Vec<u8> {
        self.addresses_with(0, 0)
    }

    /// The same, with the log.
    pub fn addresses_with(&self, flags: u32, log: u64) -> Vec<u8> {
        let mut bytes = self.index.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_ne_bytes());
        for addr in [self.base, self.used_ring(), self.base + AVAILABLE, log] {
            bytes.extend_from_slice(&addr.to_ne_bytes());
        }
        bytes
    }

    /// Where the used ring lies.
    pub fn used_ring(&self) -> u64 {
        self.base + USED
    }

    /// Where the available ring lies.
    pub fn available_ring(&self) -> u64 {
        self.base + AVAILABLE
    }

    /// Puts a descriptor into the table.
    pub fn put(&self, guest: &Guest, at: u16, desc: Desc) {
        guest.write(self.base + u64::from(at) * 16, &desc.bytes());
    }

    /// Puts a chain of descriptors from `at` on, linked; `(address, length, device writes)`.
    pub fn put_chain(&self, guest: &Guest, at: u16, buffers: &[(u64, u32, bool)]) {
        for (n, (addr, len, write)) in (at..).zip(buffers) {
            let more = usize::from(n - at) + 1 < buffers.len();
            let flags = if *write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            let (addr, len, next) = (*addr, *len, n + 1);
            self.put(
                guest,
                n,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
    }

    /// Makes the chain that begins at `head` available; the device is not told.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.available % self.size);
        guest.write16(self.available_ring() + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        guest.write16(self.available_ring() + 2, self.available);
    }

    /// Tells the device.
    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).expect("an eventfd");
    }

    /// What the device has used and was not taken: head and length.
    pub fn take(&mut self, guest: &Guest) -> Option<(u32, u32)> {
        let used = self.used_ring();
        // With EVENT_IDX: call at the next one.
        let event = self.available_ring() + 4 + 2 * u64::from(self.size);
        guest.write16(event, self.used);
        if guest.read16(used + 2) == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.size);
        let bytes = guest.read(used + 4 + 8 * slot, 8);
        self.used = self.used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        Some((word(0), word(4)))
    }

    /// The same; waits for a call.
    #[track_caller]
    pub fn wait(&mut self, guest: &Guest) -> (u32, u32) {
        loop {
            if let Some(used) = self.take(guest) {
                return used;
            }
            assert!(happens(&self.call), "the device never called");
        }
    }

    /// Waits for a call; `false`: there was none for as long as tests wait.
    pub fn is_called(&self) -> bool {
        happens(&self.call)
    }

    /// Whatever was called is forgotten: another descriptor, which nobody rang yet.
    pub fn lose_calls(&mut self) {
        self.call = event();
    }

    /// Waits until the device says that the ring is broken.
    #[track_caller]
    pub fn wait_broken(&self) {
        assert!(happens(&self.err), "the ring was not found broken");
    }
}

/// Waits for an eventfd and resets it; `false`: it never came.
fn happens(fd: &OwnedFd) -> bool {
    let timeout = Timespec {
        tv_sec: i64::try_from(DEADLINE.as_secs()).expect("half a minute"),
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let ready = poll(&mut fds, Some(&timeout)).is_ok_and(|n| n == 1);
    let _ = rustix::io::read(fd, &mut [0; 8]);
    ready
}

/// A disk behind one split ring, one request at a time.
#[derive(Debug)]
pub struct Blk {
    /// Its ring.
    pub queue: Split,
    /// Where headers, data and status bytes are put.
    pub room: u64,
}

impl Blk {
    /// A ring and room for its requests: a mebibyte per queue, from the fourth on.
    pub fn new(index: u32, size: u16) -> Self {
        Self {
            queue: Split::new(index, size),
            room: Guest::BASE + (u64::from(index) + 1) * 0x20_0000,
        }
    }

    /// Bytes of guest memory that `queues` of them need.
    pub const fn memory(queues: u64) -> u64 {
        (queues + 2) * 0x20_0000
    }

    /// The header of a request.
    pub fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        header
    }

    /// Writes a request to memory and its chain to the table.
    pub fn prepare(&self, guest: &Guest, kind: u32, sector: u64, data: &[u8], back: u32) {
        guest.write(self.room, &Self::header(kind, sector));
        guest.write(self.room + 16, &[0xee]);
        guest.write(self.room + 0x1000, data);
        let payload = (self.room + 0x1000, data.len() as u32, false);
        let answer = (self.room + 0x1000, back, true);
        let mut chain = vec![(self.room, 16, false)];
        chain.extend((payload.1 > 0).then_some(payload));
        chain.extend((back > 0).then_some(answer));
        chain.push((self.room + 16, 1, true));
        self.queue.put_chain(guest, 0, &chain);
    }

    /// Carries a request out; its status, and the length that the device told.
    #[track_caller]
    pub fn run(
        &mut self,
        guest: &Guest,
        kind: u32,
        sector: u64,
        data: &[u8],
        back: u32,
    ) -> (u8, u32) {
        self.prepare(guest, kind, sector, data, back);
        self.queue.offer(guest, 0);
        self.queue.kick();
        let (head, len) = self.queue.wait(guest);
        assert_eq!(head, 0);
        (guest.read(self.room + 16, 1)[0], len)
    }

    /// Reads.
    #[track_caller]
    pub fn read(&mut self, guest: &Guest, sector: u64, len: u32) -> Vec<u8> {
        assert_eq!(
            self.run(guest, blk::IN, sector, &[], len),
            (blk::OK, len + 1)
        );
        guest.read(self.room + 0x1000, len as usize)
    }

    /// Writes.
    #[track_caller]
    pub fn write(&mut self, guest: &Guest, sector: u64, data: &[u8]) {
        assert_eq!(self.run(guest, blk::OUT, sector, data, 0), (blk::OK, 1));
    }
}

/// A packed ring, without chains that are longer than the ring.
#[derive(Debug)]
pub struct Packed {
    /// Addresses and descriptors are those of a split ring.
    pub split: Split,
    next: u16,
    wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Places of each buffer that is with the device.
    places: BTreeMap<u16, u16>,
}

impl Packed {
    /// Queue `index`.
    pub fn new(index: u32, size: u16) -> Self {
        Self {
            split: Split::new(index, size),
            next: 0,
            wrap: true,
            used: 0,
            used_wrap: true,
            places: BTreeMap::new(),
        }
    }

    /// Makes a chain available under this id; `(address, length, device writes)`.
    pub fn offer(&mut self, guest: &Guest, id: u16, buffers: &[(u64, u32, bool)]) {
        let mut first = None;
        for (n, (addr, len, write)) in buffers.iter().enumerate() {
            let at = self.split.base + u64::from(self.next) * 16;
            let owner: u16 = if self.wrap { 1 << 7 } else { 1 << 15 };
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let flags = owner | more | if *write { WRITE } else { 0 };
            guest.write(at, &addr.to_le_bytes());
            guest.write(at + 8, &len.to_le_bytes());
            guest.write16(at + 12, id);
            match first {
                None => first = Some((at + 14, flags)),
                Some(_) => guest.write16(at + 14, flags),
            }
            self.next += 1;
            if self.next == self.split.size {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
        let (at, flags) = first.expect("a chain has a descriptor");
        guest.write16(at, flags);
        self.places.insert(id, buffers.len() as u16);
    }

    /// What the device has used: id and length.
    pub fn take(&mut self, guest: &Guest) -> Option<(u16, u32)> {
        let at = self.split.base + u64::from(self.used) * 16;
        let owner = guest.read16(at + 14) & (1 << 7 | 1 << 15);
        let wanted = if self.used_wrap { 1 << 7 | 1 << 15 } else { 0 };
        if owner != wanted {
            return None;
        }
        let len = guest.read(at + 8, 4);
        let id = guest.read16(at + 12);
        let places = self.places.remove(&id).expect("an id that was offered");
        self.used += places;
        if self.used >= self.split.size {
            (self.used, self.used_wrap) = (self.used - self.split.size, !self.used_wrap);
        }
        let len = u32::from_le_bytes(len.try_into().expect("four bytes"));
        Some((id, len))
    }
}
