//! Guest memory: regions that the front-end shares with us, and access to them.
//!
//! A [`Memory`] never changes: adding or removing a region makes another one, and whoever still
//! works with the old one keeps its mappings. Used by the session and, through [`Gather`] and
//! [`Area`], by the data plane. Invariant: every pointer that leaves this file lies in a mapping
//! that its holder keeps, and nothing makes a reference to the bytes behind it, because the guest
//! changes them whenever it likes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use outport_block::Errno;
use outport_block::engine::buffer::{Iov, Keep, Piece, SharedMem};
use rustix::fs::SealFlags;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use super::wire::RegionInfo;

/// `f_type` of hugetlbfs: mappings of its files come in huge pages.
const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// The smallest page.
const PAGE: u64 = 4096;

/// A mapping of `len` bytes of a file, from any offset.
#[derive(Debug)]
struct Mapping {
    map: MmapRegion,
    /// The first byte that was asked for.
    skip: usize,
    len: usize,
}

impl Mapping {
    fn of_file(fd: OwnedFd, offset: u64, len: u64) -> Result<Self, Errno> {
        let end = offset.checked_add(len).ok_or(Errno::Inval)?;
        // What lies past the end of its file kills whoever touches it. A file that cannot be
        // sealed is as long as its owner keeps it.
        let _ = rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK);
        let stat = rustix::fs::fstat(&fd)?;
        if u64::try_from(stat.st_size).is_ok_and(|size| size < end) {
            return Err(Errno::Inval);
        }
        let huge = rustix::fs::fstatfs(&fd)?.f_type == HUGETLBFS_MAGIC;
        let page = match u64::try_from(stat.st_blksize) {
            Ok(size) if huge && size.is_power_of_two() => size.max(PAGE),
            _ => PAGE,
        };
        let start = offset & !(page - 1);
        let end = end.checked_next_multiple_of(page).ok_or(Errno::Inval)?;
        let size = usize::try_from(end - start).map_err(|_| Errno::NoMem)?;
        let file = FileOffset::new(File::from(fd), start);
        let map = MmapRegion::from_file(file, size).map_err(|_| Errno::NoMem)?;
        Ok(Self {
            map,
            skip: usize::try_from(offset - start).map_err(|_| Errno::Inval)?,
            len: usize::try_from(len).map_err(|_| Errno::Inval)?,
        })
    }

    fn ptr(&self, at: usize) -> *mut u8 {
        self.map.as_ptr().wrapping_add(self.skip + at)
    }
}

/// One region of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    info: RegionInfo,
    mapping: Arc<Mapping>,
}

impl Region {
    /// Map it.
    ///
    /// # Errors
    /// `Inval`: longer than its file, or no sensible addresses; the system's.
    pub(super) fn map(info: RegionInfo, fd: OwnedFd) -> Result<Self, Errno> {
        if info.size == 0
            || info.guest.checked_add(info.size).is_none()
            || info.user.checked_add(info.size).is_none()
        {
            return Err(Errno::Inval);
        }
        let mapping = Arc::new(Mapping::of_file(fd, info.offset, info.size)?);
        Ok(Self { info, mapping })
    }

    const fn guest_end(&self) -> u64 {
        self.info.guest + self.info.size
    }
}

/// All regions, sorted by guest address.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// How many regions there are.
    pub(super) fn len(&self) -> usize {
        self.regions.len()
    }

    /// The same with one more.
    ///
    /// # Errors
    /// `Inval`: it overlaps another one.
    pub(super) fn with(&self, region: Region) -> Result<Self, Errno> {
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|other| other.info.guest < region.info.guest);
        let before = at.checked_sub(1).and_then(|at| regions.get(at));
        let overlaps = before.is_some_and(|before| before.guest_end() > region.info.guest)
            || regions
                .get(at)
                .is_some_and(|after| region.guest_end() > after.info.guest);
        if overlaps {
            return Err(Errno::Inval);
        }
        regions.insert(at, Arc::new(region));
        Ok(Self { regions })
    }

    /// The same without the region at these addresses.
    ///
    /// # Errors
    /// `NoEnt`: there is none.
    pub(super) fn without(&self, info: RegionInfo) -> Result<Self, Errno> {
        let mut regions = self.regions.clone();
        let is = |it: &Arc<Region>| {
            (it.info.guest, it.info.user, it.info.size) == (info.guest, info.user, info.size)
        };
        let at = regions.iter().position(is).ok_or(Errno::NoEnt)?;
        regions.remove(at);
        Ok(Self { regions })
    }

    /// The region of a guest address, and how far into it.
    fn find(&self, addr: u64) -> Option<(&Arc<Region>, u64)> {
        let region = match self.regions.as_slice() {
            [only] => only,
            many => {
                let at = many.partition_point(|region| region.info.guest <= addr);
                &many[at.checked_sub(1)?]
            }
        };
        let into = addr.checked_sub(region.info.guest)?;
        (into < region.info.size).then_some((region, into))
    }

    /// Memory of a ring at the front-end's own address, wholly in one region.
    pub(super) fn area(&self, user: u64, len: u64) -> Option<Area> {
        let inside = |region: &&Arc<Region>| {
            user.checked_sub(region.info.user)
                .is_some_and(|into| len <= region.info.size && into <= region.info.size - len)
        };
        let region = self.regions.iter().find(inside)?;
        let into = usize::try_from(user - region.info.user).ok()?;
        Some(Area {
            ptr: region.mapping.ptr(into),
            len: usize::try_from(len).ok()?,
            _keep: region.mapping.clone(),
        })
    }

    /// Is the byte at a guest address mapped?
    pub(super) fn holds(&self, addr: u64) -> bool {
        self.find(addr).is_some()
    }

    /// The guest's address of what the front-end has at `user`.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let into = user.checked_sub(region.info.user)?;
            (into < region.info.size).then_some(region.info.guest + into)
        })
    }

    /// Copy out of guest memory; `None`: not all of it is mapped.
    pub(super) fn load(&self, mut addr: u64, mut into: &mut [u8]) -> Option<()> {
        while !into.is_empty() {
            let (region, at) = self.find(addr)?;
            let len = usize::try_from(region.info.size - at)
                .unwrap_or(usize::MAX)
                .min(into.len());
            let (head, tail) = into.split_at_mut(len);
            slice(region, at, len)?.copy_to(head);
            addr = addr.checked_add(len as u64)?;
            into = tail;
        }
        Some(())
    }

    /// Copy into guest memory; `None`: not all of it is mapped.
    pub(super) fn store(&self, mut addr: u64, mut from: &[u8]) -> Option<()> {
        while !from.is_empty() {
            let (region, at) = self.find(addr)?;
            let len = usize::try_from(region.info.size - at)
                .unwrap_or(usize::MAX)
                .min(from.len());
            let (head, tail) = from.split_at(len);
            slice(region, at, len)?.copy_from(head);
            addr = addr.checked_add(len as u64)?;
            from = tail;
        }
        Some(())
    }

    /// Memory of nobody's but ours, for tests and fuzzing: `len` bytes at guest and user
    /// address `at`.
    pub(super) fn anonymous(at: u64, len: usize) -> Option<Self> {
        let map = MmapRegion::new(len).ok()?;
        let info = RegionInfo {
            guest: at,
            user: at,
            size: len as u64,
            offset: 0,
        };
        let mapping = Arc::new(Mapping { map, skip: 0, len });
        Self::default().with(Region { info, mapping }).ok()
    }
}

fn slice(region: &Region, at: u64, len: usize) -> Option<VolatileSlice<'_>> {
    let at = region.mapping.skip + usize::try_from(at).ok()?;
    region.mapping.map.get_slice(at, len).ok()
}

/// The payload of one request, as pieces of guest memory; used again for the next.
#[derive(Debug)]
pub(super) struct Gather {
    memory: Arc<Memory>,
    pieces: Vec<Piece>,
    len: u64,
}

impl Gather {
    pub(super) const fn new(memory: Arc<Memory>) -> Self {
        Self {
            memory,
            pieces: Vec::new(),
            len: 0,
        }
    }

    /// Begin another request.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Bytes.
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes more, from a guest address on; `None`: not all of it is mapped.
    pub(super) fn add(&mut self, mut addr: u64, len: u64) -> Option<()> {
        let mut left = len;
        while left > 0 {
            let (region, at) = self.memory.find(addr)?;
            let len = left.min(region.info.size - at);
            let ptr = region.mapping.ptr(usize::try_from(at).ok()?);
            // SAFETY: inside the region's mapping, which `memory` keeps as long as the pieces
            // are used (`iov` borrows us, `keep` keeps it); nothing makes references to it.
            let piece = unsafe { Piece::new(ptr, usize::try_from(len).ok()?) };
            self.pieces.push(piece);
            self.len += len;
            addr = addr.checked_add(len)?;
            left -= len;
        }
        Some(())
    }

    /// For a transfer that ends before this changes.
    pub(super) fn iov(&self) -> Iov<'_> {
        Iov::new(&self.pieces)
    }

    /// For a transfer that takes its time.
    pub(super) fn shared(&self) -> SharedMem {
        let keep: Keep = self.memory.clone();
        // SAFETY: all pieces lie in mappings of `memory`, which `keep` is.
        unsafe { SharedMem::new(&self.pieces, keep) }
    }
}

/// Contiguous memory that both sides use at the same time: a ring, an inflight region, a log.
#[derive(Debug)]
pub(super) struct Area {
    ptr: *mut u8,
    len: usize,
    _keep: Arc<Mapping>,
}

// SAFETY: plain shared memory, accessed by atomic or volatile operations only.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// A part of a file of its own.
    ///
    /// # Errors
    /// As [`Region::map`].
    pub(super) fn of_file(fd: OwnedFd, offset: u64, len: u64) -> Result<Self, Errno> {
        let mapping = Arc::new(Mapping::of_file(fd, offset, len)?);
        Ok(Self {
            ptr: mapping.ptr(0),
            len: mapping.len,
            _keep: mapping,
        })
    }

    /// Bytes.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// A part of it.
    pub(super) fn part(&self, at: usize, len: usize) -> Option<Self> {
        (at <= self.len && len <= self.len - at).then(|| Self {
            ptr: self.ptr.wrapping_add(at),
            len,
            _keep: self._keep.clone(),
        })
    }

    /// Aligned to a power of two?
    pub(super) fn is_aligned(&self, to: usize) -> bool {
        self.ptr.addr().is_multiple_of(to)
    }

    fn at<T>(&self, at: usize) -> *mut T {
        let ptr = self.ptr.wrapping_add(at);
        assert!(
            at <= self.len && size_of::<T>() <= self.len - at,
            "access inside its area"
        );
        assert!(ptr.addr().is_multiple_of(align_of::<T>()), "aligned access");
        ptr.cast()
    }

    /// A little-endian number, and everything that was written before it.
    pub(super) fn load16(&self, at: usize) -> u16 {
        // SAFETY: `at` checked bounds and alignment; the mapping lives as long as we do.
        let number = unsafe { &*self.at::<AtomicU16>(at) };
        u16::from_le(number.load(Ordering::Acquire))
    }

    /// The number, after everything that was written before.
    pub(super) fn store16(&self, at: usize, value: u16) {
        // SAFETY: as in `load16`.
        let number = unsafe { &*self.at::<AtomicU16>(at) };
        number.store(value.to_le(), Ordering::Release);
    }

    /// The number; ordered by what is stored after it.
    pub(super) fn store32(&self, at: usize, value: u32) {
        // SAFETY: as in `load16`.
        let number = unsafe { &*self.at::<AtomicU32>(at) };
        number.store(value.to_le(), Ordering::Relaxed);
    }

    /// A number that is read once.
    pub(super) fn load64(&self, at: usize) -> u64 {
        // SAFETY: as in `load16`.
        let number = unsafe { &*self.at::<AtomicU64>(at) };
        u64::from_le(number.load(Ordering::Relaxed))
    }

    /// Eight bytes at once.
    pub(super) fn store64(&self, at: usize, value: u64) {
        // SAFETY: as in `load16`.
        let number = unsafe { &*self.at::<AtomicU64>(at) };
        number.store(value.to_le(), Ordering::Release);
    }

    /// One byte.
    pub(super) fn load8(&self, at: usize) -> u8 {
        // SAFETY: as in `load16`.
        unsafe { &*self.at::<AtomicU8>(at) }.load(Ordering::Acquire)
    }

    /// One byte, after everything that was written before.
    pub(super) fn store8(&self, at: usize, value: u8) {
        // SAFETY: as in `load16`.
        unsafe { &*self.at::<AtomicU8>(at) }.store(value, Ordering::Release);
    }

    /// Set bits that others set as well.
    pub(super) fn or8(&self, at: usize, bits: u8) {
        // SAFETY: as in `load16`.
        unsafe { &*self.at::<AtomicU8>(at) }.fetch_or(bits, Ordering::AcqRel);
    }

    /// Sixteen bytes, each read once: a descriptor.
    pub(super) fn load_pair(&self, at: usize) -> (u64, u64) {
        (self.load64(at), self.load64(at + 8))
    }
}

/// What was stored before is seen by whoever stores what is loaded after.
pub(super) fn full_fence() {
    fence(Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, size: u64) -> Region {
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&fd, size + PAGE + 100).unwrap();
        let info = RegionInfo {
            guest,
            user: guest + 0x1000_0000,
            size,
            offset: 100,
        };
        Region::map(info, fd).unwrap()
    }

    #[test]
    fn buffers_may_span_regions_that_touch() {
        let memory = Memory::default();
        let memory = memory.with(region(0x3000, 0x1000)).unwrap();
        let memory = memory.with(region(0x1000, 0x2000)).unwrap();
        memory.store(0x2ffe, b"over").unwrap();
        let mut seen = [0; 4];
        memory.load(0x2ffe, &mut seen).unwrap();
        assert_eq!(&seen, b"over");
        assert_eq!(memory.store(0x3ffe, b"over"), None, "past the last one");
        assert_eq!(memory.load(0xfff, &mut seen), None, "before the first one");
        let mut gather = Gather::new(Arc::new(memory));
        gather.add(0x2000, 0x2000).unwrap();
        assert_eq!((gather.len(), gather.pieces.len()), (0x2000, 2));
        assert_eq!(gather.add(u64::MAX - 1, 4), None);
    }

    #[test]
    fn overlaps_holes_and_short_files_are_refused() {
        let memory = Memory::default().with(region(0x1000, 0x2000)).unwrap();
        for guest in [0x1000, 0x2fff, 0x800] {
            assert_eq!(
                memory.with(region(guest, 0x1000)).unwrap_err(),
                Errno::Inval
            );
        }
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&fd, 0x1000).unwrap();
        for (guest, size, offset) in [
            (0, 0x1001, 0),
            (0, 0, 0),
            (u64::MAX, 2, 0),
            (0, 1, u64::MAX),
        ] {
            let info = RegionInfo {
                guest,
                user: 0,
                size,
                offset,
            };
            assert!(Region::map(info, fd.try_clone().unwrap()).is_err());
        }
        let removed = memory.without(RegionInfo {
            guest: 0x1000,
            user: 0x1000_1000,
            size: 0x2000,
            offset: 0,
        });
        assert_eq!(removed.unwrap().len(), 0);
    }

    #[test]
    fn a_file_that_is_mapped_stays_as_long_as_it_is() {
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("t", flags).unwrap();
        rustix::fs::ftruncate(&fd, 0x2000).unwrap();
        let info = RegionInfo {
            guest: 0,
            user: 0,
            size: 0x2000,
            offset: 0,
        };
        Region::map(info, fd.try_clone().unwrap()).unwrap();
        let cut = rustix::fs::ftruncate(&fd, 0x1000);
        assert_eq!(cut, Err(rustix::io::Errno::PERM));
        rustix::fs::ftruncate(&fd, 0x3000).unwrap();
    }

    #[test]
    fn an_area_lies_in_one_region() {
        let memory = Memory::default().with(region(0x1000, 0x2000)).unwrap();
        assert!(memory.area(0x1000_1000, 0x2000).is_some());
        assert!(memory.area(0x1000_1000, 0x2001).is_none());
        assert!(memory.area(0x1000_0fff, 1).is_none());
        assert!(memory.area(u64::MAX, u64::MAX).is_none());
        let area = memory.area(0x1000_1004, 64).unwrap();
        area.store16(2, 0x1234);
        let mut seen = [0; 2];
        memory.load(0x1006, &mut seen).unwrap();
        assert_eq!(seen, [0x34, 0x12]);
    }
}
