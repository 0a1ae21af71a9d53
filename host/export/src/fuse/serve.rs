//! Carrying out requests: at once where the node can, in a task where it must wait.
//!
//! On the queue's iothread. Invariant: every request that the kernel waits for gets exactly one
//! answer, unless the connection ends first.

use std::future::Future;
use std::io::IoSlice;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use outport_block::authz::{Decision, Facts, Grant, Peer, Transport};
use outport_block::{Buf, ByteRange, Errno};

use super::queue::{DATA_MAX, Queue, Shared};
use super::reply::{HEADER, Message, header};
use super::request::{Operation, Request};
use super::wire::{
    InitFlags, InitOut, LseekOut, MAJOR, MINOR, MINOR_MIN, OpenFlags, OpenOut, SetFlags, SetattrIn,
    StatfsOut, WriteOut,
};
use crate::access::Occasion;
use crate::pool;
use crate::stats::Waited;

/// Asynchronous requests that the kernel sends at a time; more wait in the kernel.
const BACKGROUND_MAX: u16 = 256;

/// A megabyte, in the kernel's pages.
const PAGES_MAX: u16 = (DATA_MAX / 4096) as u16;

/// Data of a write up to this is copied; with more, the whole buffer goes to the task.
const COPIED_MAX: usize = 64 << 10;

/// What is asked of every kernel.
const WANTED: InitFlags = InitFlags::ASYNC_READ
    .union(InitFlags::ATOMIC_O_TRUNC)
    .union(InitFlags::BIG_WRITES)
    .union(InitFlags::ASYNC_DIO)
    .union(InitFlags::MAX_PAGES)
    .union(InitFlags::INIT_EXT)
    .union(InitFlags::DIRECT_IO_ALLOW_MMAP);

/// Begins a request; most end here, too.
pub(super) fn request(queue: &mut Queue, request: &Request) {
    let shared = &queue.shared;
    let unique = request.unique;
    match request.operation {
        Operation::Read { offset, size } => read(queue, unique, offset, size),
        Operation::Write { offset, size } => write(queue, unique, offset, size),
        Operation::Init {
            major,
            minor,
            max_readahead,
            flags,
        } => {
            let offer = Offer {
                major,
                minor,
                max_readahead,
                flags,
            };
            shared.answer(&init(shared, unique, &offer));
        }
        Operation::Destroy => shared.answer(&Message::done(unique)),
        Operation::Unanswered => {}
        Operation::Getattr => shared.answer(&Message::with(unique, &shared.file.attributes())),
        Operation::Setattr(set) => set_attributes(shared, request, set),
        Operation::Open { flags } => open(shared, request, flags),
        Operation::Release { fh } => {
            shared.file.release(fh);
            shared.answer(&Message::done(unique));
        }
        Operation::Flush => {
            count(&shared.file.export().stats().flushes, 1);
            spawn(shared, unique, 0, move |shared| async move {
                shared.file.node().flush().await?;
                Ok(Message::done(unique))
            });
        }
        Operation::Fallocate { mode, offset, len } => allocate(shared, unique, mode, offset, len),
        Operation::Lseek { offset, whence } => seek(shared, unique, offset, whence),
        Operation::Statfs => {
            // As libfuse answers for those who do not: there is no file system to speak of.
            let body = StatfsOut {
                bsize: 512,
                namelen: 255,
                frsize: 512,
                ..StatfsOut::default()
            };
            shared.answer(&Message::with(unique, &body));
        }
        Operation::Unknown => shared.answer(&Message::error(unique, libc::ENOSYS)),
    }
}

/// What a kernel can.
struct Offer {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: InitFlags,
}

fn init(shared: &Shared, unique: u64, offer: &Offer) -> Message {
    if offer.major != MAJOR || offer.minor < MINOR_MIN {
        return Message::error(unique, libc::EPROTO);
    }
    let mut wanted = WANTED;
    if let Some(passthrough) = &shared.file.passthrough {
        wanted |= InitFlags::PASSTHROUGH;
        if !offer.flags.contains(InitFlags::PASSTHROUGH) {
            passthrough.refuse(&"the kernel does not know it (Linux 6.9 does)");
        }
    }
    let taken = wanted & offer.flags;
    let flags = taken.bits();
    let body = InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead: offer.max_readahead,
        flags: flags as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_MAX,
        max_write: DATA_MAX as u32,
        time_gran: 1,
        max_pages: PAGES_MAX,
        map_alignment: 0,
        flags2: (flags >> 32) as u32,
        // The file below must not be of a stacked file system itself.
        max_stack_depth: u32::from(taken.contains(InitFlags::PASSTHROUGH)),
        request_timeout: 0,
        unused: [0; 11],
    };
    Message::with(unique, &body)
}

/// Asks the policy, then opens. Nobody waits for this who has the file open already.
fn open(shared: &Rc<Shared>, request: &Request, flags: u32) {
    let request = *request;
    spawn(shared, request.unique, 0, move |shared| async move {
        let truncates = flags & libc::O_TRUNC as u32 != 0;
        let reads = flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
        let writes = truncates || !reads;
        // The mount is read-only, too, but an administrator can remount it.
        if writes && !shared.file.export().is_writable() {
            return Err(Errno::RoFs);
        }
        may_open(&shared, &request, writes).await?;
        let fh = shared.file.open(&request, writes)?;
        let served = OpenFlags::DIRECT_IO | OpenFlags::PARALLEL_DIRECT_WRITES;
        let backing = shared.backing();
        let body = OpenOut {
            fh,
            open_flags: backing.map_or(served, |_| OpenFlags::PASSTHROUGH).bits(),
            backing_id: backing.unwrap_or(0),
        };
        if truncates && let Err(errno) = shared.file.clear().await {
            shared.file.release(fh);
            return Err(errno);
        }
        Ok(Message::with(request.unique, &body))
    });
}

/// The policy's decision. What it grants within bounds that a file cannot keep is denied.
async fn may_open(shared: &Shared, who: &Request, wants_write: bool) -> Result<(), Errno> {
    let export = shared.file.export();
    let peer = Peer {
        transport: Transport::Fuse,
        uid: Some(who.uid),
        gid: Some(who.gid),
        pid: Some(who.pid),
        ..Peer::default()
    };
    let facts = Facts {
        peer,
        export_name: Some(export.name().to_owned()),
        wants_write,
    };
    match export
        .options()
        .access
        .decide(&facts, Occasion::Entry)
        .await
    {
        Decision::Allow(grant) if grant == Grant::default() => Ok(()),
        Decision::Allow(grant) if grant.read_only && !wants_write => {
            let rest = Grant {
                read_only: false,
                ..grant
            };
            match rest == Grant::default() {
                true => Ok(()),
                false => Err(Errno::Access),
            }
        }
        Decision::Allow(_) | Decision::Deny(_) => Err(Errno::Access),
    }
}

/// Asks the policy as for a file that is opened to write: `truncate` and `chmod` come without an
/// open.
fn set_attributes(shared: &Rc<Shared>, request: &Request, set: SetattrIn) {
    let request = *request;
    let flags = SetFlags::from_bits_retain(set.valid);
    let resizes = flags.contains(SetFlags::SIZE);
    if resizes && !shared.file.export().is_writable() {
        return fail(shared, request.unique, Errno::RoFs);
    }
    spawn(shared, request.unique, 0, move |shared| async move {
        if !is_granted(&shared, &set) {
            may_open(&shared, &request, true).await?;
        }
        if let Err(errno) = shared.file.set_attributes(&set) {
            return Ok(Message::error(request.unique, errno));
        }
        if resizes {
            if set.size > ByteRange::END_MAX {
                return Err(Errno::FBig);
            }
            match set.size {
                0 => shared.file.clear().await?,
                len => shared.file.set_len(len).await?,
            }
        }
        Ok(Message::with(request.unique, &shared.file.attributes()))
    });
}

/// Is it `ftruncate` of a file that the policy let be opened to write?
fn is_granted(shared: &Shared, set: &SetattrIn) -> bool {
    let flags = SetFlags::from_bits_retain(set.valid);
    let owner = SetFlags::MODE | SetFlags::UID | SetFlags::GID;
    flags.contains(SetFlags::SIZE | SetFlags::FH)
        && !flags.intersects(owner)
        && shared.file.may_write(set.fh)
}

fn read(queue: &mut Queue, unique: u64, offset: u64, size: u32) {
    let shared = &queue.shared;
    let left = shared.file.len().saturating_sub(offset);
    // A request is at most as long as INIT allowed.
    let len = left.min(u64::from(size)).min(DATA_MAX as u64) as usize;
    let stats = shared.file.export().stats();
    count(&stats.reads, 1);
    count(&stats.read_bytes, len as u64);
    let out = &mut queue.out[..HEADER + len];
    match shared.file.node().try_read(offset, &mut out[HEADER..]) {
        Some(Ok(())) => {
            out[..HEADER].copy_from_slice(&header(unique, 0, len));
            shared.write(&[IoSlice::new(out)]);
        }
        Some(Err(errno)) => fail(shared, unique, errno),
        None => {
            let task = Task::begin(shared, len as u64, Waited::Read);
            tokio::task::spawn_local(async move {
                let shared = &task.shared;
                let buf = pool::take(len);
                match shared.file.node().read(offset, buf).await {
                    Ok(buf) => {
                        let header = header(unique, 0, len);
                        shared.write(&[IoSlice::new(&header), IoSlice::new(buf.as_slice())]);
                        pool::give_back(buf);
                    }
                    Err(errno) => fail(shared, unique, errno),
                }
            });
        }
    }
}

fn write(queue: &mut Queue, unique: u64, offset: u64, size: u32) {
    let shared = &queue.shared;
    let file = &shared.file;
    if !file.export().is_writable() {
        return fail(shared, unique, Errno::RoFs);
    }
    let end = file.len();
    let asked = size;
    let mut size = size;
    if !file.is_growable() {
        size = size.min(u32::try_from(end.saturating_sub(offset)).unwrap_or(u32::MAX));
    }
    let written = Message::with(unique, &WriteOut { size, padding: 0 });
    let stats = file.export().stats();
    count(&stats.writes, 1);
    count(&stats.write_bytes, u64::from(size));
    let len = size as usize;
    let target = offset + len as u64;
    let writethrough = file.export().options().writethrough;
    let grows = target > end && !file.node().grows_by_writing();
    if len == 0 {
        // Somebody who is told that nothing was written tries again, or invents a reason.
        return match asked {
            0 => shared.answer(&written),
            _ => fail(shared, unique, Errno::NoSpc),
        };
    }
    if !writethrough && !grows {
        let data = &queue.payload.as_slice()[..len];
        match file.node().try_write(offset, data) {
            Some(Ok(())) => {
                file.touch();
                return shared.answer(&written);
            }
            Some(Err(errno)) => return fail(shared, unique, errno),
            None => {}
        }
    }
    let data = take_payload(&mut queue.payload, len);
    spawn(
        &queue.shared,
        unique,
        len as u64,
        move |shared| async move {
            let file = &shared.file;
            if grows {
                file.extend(target).await?;
            }
            let result = file.node().write(offset, &data, writethrough).await;
            pool::give_back(data);
            file.touch();
            result?;
            file.reached(target);
            Ok(written)
        },
    );
}

/// The data of a write, for a task.
fn take_payload(payload: &mut Buf, len: usize) -> Buf {
    if len <= COPIED_MAX {
        let mut copy = pool::take(len);
        copy.as_mut_slice()
            .copy_from_slice(&payload.as_slice()[..len]);
        return copy;
    }
    let mut taken = std::mem::replace(payload, pool::take(DATA_MAX));
    taken.set_len(len);
    taken
}

/// What QEMU's exports can: growing, punching, zeroing; and reserving, where that is true.
fn allocate(shared: &Rc<Shared>, unique: u64, mode: u32, offset: u64, len: u64) {
    const KEEP: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
    const PUNCH: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32 | KEEP;
    const ZERO: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;
    const ZERO_KEEP: u32 = ZERO | KEEP;
    if !shared.file.export().is_writable() {
        return fail(shared, unique, Errno::RoFs);
    }
    let stats = shared.file.export().stats();
    match mode {
        PUNCH => count(&stats.discards, 1),
        _ => count(&stats.writes, 1),
    }
    spawn(shared, unique, 0, move |shared| async move {
        let file = &shared.file;
        let target = offset + len;
        let end = file.len();
        match mode {
            0 | KEEP => {
                // Before the file grows, as this refuses what could not be kept. Images give no
                // such promise.
                file.node()
                    .reserve(ByteRange::between(offset, target))
                    .await?;
                if mode == 0 && target > end {
                    file.extend(target).await?;
                    file.reached(target);
                }
            }
            PUNCH | ZERO_KEEP | ZERO => {
                if mode == ZERO && target > end {
                    file.extend(target).await?;
                    file.reached(target);
                }
                let range = ByteRange::between(offset, target.min(file.len()));
                if !range.is_empty() {
                    file.node().write_zeroes(range, mode == PUNCH).await?;
                }
            }
            _ => return Err(Errno::NotSup),
        }
        file.touch();
        file.write_through().await?;
        Ok(Message::done(unique))
    });
}

/// The next data or hole. What reads as zeroes is a hole, and the end is one.
fn seek(shared: &Rc<Shared>, unique: u64, offset: u64, whence: u32) {
    const DATA: u32 = libc::SEEK_DATA as u32;
    const HOLE: u32 = libc::SEEK_HOLE as u32;
    let no_such = Message::error(unique, libc::ENXIO);
    if whence != DATA && whence != HOLE {
        return shared.answer(&Message::error(unique, libc::EINVAL));
    }
    spawn(shared, unique, 0, move |shared| async move {
        let end = shared.file.len();
        let mut at = offset;
        while at < end {
            let status = shared
                .file
                .node()
                .status(ByteRange::between(at, end))
                .await?;
            if status.zero == (whence == HOLE) {
                break;
            }
            at += status.len.max(1);
        }
        let at = at.min(end.max(offset));
        if at > end || at == end && whence == DATA {
            return Ok(no_such);
        }
        Ok(Message::with(unique, &LseekOut { offset: at }))
    });
}

/// Carries out in a task and answers.
fn spawn<F, Fut>(shared: &Rc<Shared>, unique: u64, bytes: u64, work: F)
where
    F: FnOnce(Rc<Shared>) -> Fut + 'static,
    Fut: Future<Output = Result<Message, Errno>>,
{
    let task = Task::begin(shared, bytes, Waited::Other);
    tokio::task::spawn_local(async move {
        match work(task.shared.clone()).await {
            Ok(message) => task.shared.answer(&message),
            Err(errno) => fail(&task.shared, unique, errno),
        }
    });
}

/// A request in flight: accounted for while it lives.
struct Task {
    shared: Rc<Shared>,
    bytes: u64,
    since: Instant,
    what: Waited,
}

impl Task {
    fn begin(shared: &Rc<Shared>, bytes: u64, what: Waited) -> Self {
        shared.begin(bytes);
        shared.file.export().stats().begin();
        Self {
            shared: shared.clone(),
            bytes,
            since: Instant::now(),
            what,
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let stats = self.shared.file.export().stats();
        stats.end(self.what, self.since.elapsed());
        self.shared.end(self.bytes);
    }
}

fn fail(shared: &Shared, unique: u64, errno: Errno) {
    count(&shared.file.export().stats().errors, 1);
    shared.answer(&Message::error(unique, errno.raw()));
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
