//! Memory of a guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::MemfdFlags;

/// A memfd that is the guest's memory from [`Guest::BASE`] on, in both kinds of address.
#[derive(Debug)]
pub struct Guest {
    fd: OwnedFd,
    len: u64,
}

impl Guest {
    /// Where it lies.
    pub const BASE: u64 = 0x10_0000;

    /// `len` bytes of zeroes.
    pub fn new(len: u64) -> Self {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory");
        rustix::fs::ftruncate(&fd, len).expect("memory");
        Self { fd, len }
    }

    /// Memory that another one has made.
    pub const fn of(fd: OwnedFd, len: u64) -> Self {
        Self { fd, len }
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Nothing?
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The payload of ADD_MEM_REG and REM_MEM_REG.
    pub fn region(&self) -> Vec<u8> {
        Self::region_of(Self::BASE, self.len, Self::BASE, 0)
    }

    /// The same for any region.
    pub fn region_of(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
        let words = [0, guest, size, user, offset];
        words.into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    /// Writes at a guest address.
    #[track_caller]
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let at = addr - Self::BASE;
        assert!(at + bytes.len() as u64 <= self.len, "inside guest memory");
        let n = rustix::io::pwrite(&self.fd, bytes, at).expect("memory");
        assert_eq!(n, bytes.len());
    }

    /// Reads at a guest address.
    #[track_caller]
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let n = rustix::io::pread(&self.fd, &mut bytes, addr - Self::BASE).expect("memory");
        assert_eq!(n, len);
        bytes
    }

    /// Writes a number of sixteen bits.
    #[track_caller]
    pub fn write16(&self, addr: u64, value: u16) {
        self.write(addr, &value.to_le_bytes());
    }

    /// Reads a number of sixteen bits.
    #[track_caller]
    pub fn read16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read(addr, 2).try_into().expect("two bytes"))
    }
}
