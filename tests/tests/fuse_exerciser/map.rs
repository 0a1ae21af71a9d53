//! A file through a shared mapping.

use std::fs::File;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

const PAGE: u64 = 4096;

/// What is there.
pub(crate) fn load(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut seen = vec![0; len];
    mapped(file, at, len, |memory| {
        // SAFETY: the caller maps `len` bytes from `memory`, inside the file, which nobody changes
        // meanwhile.
        unsafe { memory.copy_to_nonoverlapping(seen.as_mut_ptr(), len) };
    });
    seen
}

/// Puts it there.
pub(crate) fn store(file: &File, at: u64, data: &[u8]) {
    mapped(file, at, data.len(), |memory| {
        // SAFETY: as above, for writing.
        unsafe { memory.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    });
}

fn mapped(file: &File, at: u64, len: usize, work: impl FnOnce(*mut u8)) {
    let skip = (at % PAGE) as usize;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses; unmapped below, and nothing
    // refers to it then.
    unsafe {
        let start = std::ptr::null_mut();
        let (size, from) = (skip + len, at - skip as u64);
        let memory = mmap(start, size, access, MapFlags::SHARED, file, from).unwrap();
        work(memory.cast::<u8>().add(skip));
        msync(memory, size, MsyncFlags::SYNC).unwrap();
        munmap(memory, size).unwrap();
    }
}
