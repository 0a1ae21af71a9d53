//! The device, its queues, and the memory that they share with the server.

use std::fs::File;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, OFlags};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use crate::args::Args;

/// A connected device.
pub(crate) struct Disk {
    /// First: it refers to memory of the transport.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: Arc<MmapRegion>,
    slot: usize,
    depth: usize,
}

/// One queue and its buffers.
pub(crate) struct Lane<'a> {
    queue: &'a mut VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    memory: Arc<MmapRegion>,
    first: usize,
    slot: usize,
}

impl Disk {
    /// Connect and set everything up.
    pub(crate) fn open(args: &Args) -> io::Result<Self> {
        let mut features = VirtioFeatureFlags::VERSION_1;
        features.set(VirtioFeatureFlags::RING_PACKED, args.packed);
        features.set(VirtioFeatureFlags::RING_EVENT_IDX, args.event_idx);
        let blk = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::MQ;
        let path = args.socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let wanted = features.bits() | blk.bits();
        let transport = VhostUser::new(path, wanted)?;
        if transport_features(&transport) & features.bits() != features.bits() {
            return Err(Error::other("the server does not offer what was asked for"));
        }
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        // Header, data and status of each request.
        let entries = (args.depth * 3).next_power_of_two() as u16;
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, args.queues, entries)?;
        let slot = args.block_size;
        let len = (slot * args.depth * args.queues).next_multiple_of(4096);
        let file = File::from(rustix::fs::memfd_create("buffers", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        let fd = file.as_raw_fd();
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(Error::other)?;
        transport.map_mem_region(memory.as_ptr().addr(), len, fd, 0)?;
        Ok(Self {
            queues,
            transport,
            memory: Arc::new(memory),
            slot,
            depth: args.depth,
        })
    }

    /// Bytes of the disk.
    pub(crate) fn capacity(&self) -> u64 {
        let config = self.transport.get_config().expect("the server answers");
        config.capacity.to_native() * 512
    }

    /// Its queues.
    pub(crate) fn lanes(&mut self) -> Vec<Lane<'_>> {
        let (transport, memory) = (&self.transport, &self.memory);
        let (slot, depth) = (self.slot, self.depth);
        let lane = |(index, queue)| Lane {
            queue,
            notifier: transport.get_submission_notifier(index),
            completed: transport.get_completion_fd(index),
            memory: memory.clone(),
            first: index * depth,
            slot,
        };
        self.queues.iter_mut().enumerate().map(lane).collect()
    }
}

fn transport_features<T>(transport: &T) -> u64
where
    T: virtio_driver::VirtioTransport<
            virtio_driver::VirtioBlkConfig,
            virtio_driver::VirtioBlkReqBuf,
        >,
{
    transport.get_features()
}

impl Lane<'_> {
    fn buffer(&self, slot: usize) -> *mut u8 {
        let at = (self.first + slot) * self.slot;
        assert!(at + self.slot <= self.memory.size());
        self.memory.as_ptr().wrapping_add(at)
    }

    /// Start a read into a slot's buffer.
    pub(crate) fn read(&mut self, offset: u64, slot: usize) -> io::Result<()> {
        let (buffer, len) = (self.buffer(slot), self.slot);
        // SAFETY: the buffer lies in memory that lives as long as the queue and that nobody has
        // a reference to; a slot is used by one request at a time.
        unsafe { self.queue.read_raw(offset, buffer, len, slot) }
    }

    /// Start a write of a slot's buffer.
    pub(crate) fn write(&mut self, offset: u64, slot: usize) -> io::Result<()> {
        let (buffer, len) = (self.buffer(slot), self.slot);
        // SAFETY: as above.
        unsafe { self.queue.write_raw(offset, buffer, len, slot) }
    }

    /// Fill a slot's buffer; nothing of it is in flight.
    pub(crate) fn fill(&self, slot: usize, words: impl Fn(u64) -> u64) {
        let buffer = self.buffer(slot).cast::<u64>();
        for n in 0..self.slot / 8 {
            // SAFETY: inside the buffer, which is aligned to its block size.
            unsafe { buffer.add(n).write_volatile(words(n as u64)) };
        }
    }

    /// Is that what the buffer holds?
    pub(crate) fn holds(&self, slot: usize, words: impl Fn(u64) -> u64) -> bool {
        let buffer = self.buffer(slot).cast::<u64>();
        // SAFETY: as above.
        (0..self.slot / 8).all(|n| unsafe { buffer.add(n).read_volatile() } == words(n as u64))
    }

    /// Tell the device of what was started, if it wants to know.
    pub(crate) fn kick(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    /// Be told of completions, or not.
    pub(crate) fn want_calls(&mut self, wanted: bool) {
        self.queue.set_used_notif_enabled(wanted);
    }

    /// Slots whose requests have completed, and their results.
    pub(crate) fn completed(&mut self, into: &mut Vec<(usize, i32)>) {
        into.extend(self.queue.completions().map(|it| (it.context, it.ret)));
    }

    /// Wait for a call.
    pub(crate) fn wait(&self) -> io::Result<()> {
        match self.completed.read() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // QSD makes the descriptor that it is given one that does not wait.
                // SAFETY: it is open as long as we have it.
                let fd = unsafe { BorrowedFd::borrow_raw(self.completed.as_raw_fd()) };
                rustix::fs::fcntl_setfl(fd, OFlags::empty())?;
                self.completed.read().map(|_| ())
            }
            read => read.map(|_| ()),
        }
    }
}
