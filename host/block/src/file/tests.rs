//! Host files against a model, buffered and direct, on ring and pool.

use std::future::Future;
use std::path::Path;

use super::*;
use crate::IoThread;
use crate::engine::buffer::{BOUNCE_MAX, Buf, IoMem};
use crate::engine::{Aio, Completion, OpFuture, OpKind};
use crate::node::Known;

type Ask = dyn Fn(&OpKind) -> Option<OpFuture> + Send + Sync;

/// Sees every operation, and may answer it with bytes or `-errno` instead of the system.
pub(super) struct Kernel(Box<Ask>);

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

impl Inner {
    pub(super) fn answered(&self, kind: &OpKind) -> Option<OpFuture> {
        self.kernel.as_ref().and_then(|it| (it.0)(kind))
    }
}

pub(super) fn transferred(n: i32) -> std::result::Result<usize, Errno> {
    usize::try_from(n).map_err(|_| Errno::from_raw(-n))
}

/// Whoever makes something durable, and what is to be answered.
type Syncs = Arc<std::sync::Mutex<Vec<Completion>>>;

fn with_kernel(
    mut file: HostFile,
    ask: impl Fn(&OpKind) -> Option<OpFuture> + Send + Sync + 'static,
) -> HostFile {
    let inner = Arc::get_mut(&mut file.0).unwrap();
    inner.kernel = Some(Kernel(Box::new(ask)));
    file
}

/// A file whose durability the test decides about.
fn with_syncs(file: HostFile) -> (HostFile, Syncs) {
    let syncs = Syncs::default();
    let asked = syncs.clone();
    let file = with_kernel(file, move |kind| {
        matches!(kind, OpKind::Datasync | OpKind::Write(_, true)).then(|| {
            let (future, done) = OpFuture::new();
            asked.lock().unwrap().push(done);
            future
        })
    });
    (file, syncs)
}

/// Answers whoever asks first so, and all others that it is well.
async fn answer(syncs: &Syncs, first: i32, until: &AtomicBool) {
    let mut answer = first;
    while !until.load(Ordering::Relaxed) {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        for asked in std::mem::take(&mut *syncs.lock().unwrap()) {
            asked.set(std::mem::replace(&mut answer, 0));
        }
    }
}

/// To its end, while the kernel says what it lost: once, and then no word of it any more.
async fn while_losing<T>(syncs: &Syncs, work: impl Future<Output = T>) -> T {
    while_answering(syncs, -libc::EIO, work).await
}

async fn while_answering<T>(syncs: &Syncs, first: i32, work: impl Future<Output = T>) -> T {
    let over = AtomicBool::new(false);
    let work = async {
        let done = work.await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let answers = answer(syncs, first, &over);
    futures_util::future::join(work, answers).await.0
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % n
    }
}

fn open(path: &Path, direct: bool, aio: Aio) -> HostFile {
    let mut options = FileOptions::new(path);
    options.direct = direct;
    options.aio = aio;
    options.unmap = true;
    HostFile::open(options).unwrap()
}

fn temp() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

async fn read(file: &HostFile, offset: u64, len: usize) -> Vec<u8> {
    let buf = Buf::from_slice(&vec![0xee; len]);
    file.read(offset, buf.io()).await.unwrap();
    buf.as_slice().to_vec()
}

/// Any offset, any length: with `direct` most of it bounces.
async fn follow(direct: bool, aio: Aio, seed: u64) {
    let temp = temp();
    let file = open(temp.path(), direct, aio);
    let mut model = vec![0u8; 1000];
    file.set_len(1000).await.unwrap();
    let mut random = Random(seed * 77 + 1);
    for step in 0..300 {
        let unit = [1, 512, 4096][random.below(3) as usize];
        let offset = random.below(40_000) / unit * unit;
        let len = ((1 + random.below(9000)) / unit * unit).max(1);
        let end = (offset + len) as usize;
        match random.below(8) {
            0..4 => {
                let byte = step as u8 | 1;
                let buf = Buf::from_slice(&vec![byte; len as usize + 3]);
                // Also memory that is not aligned.
                let skip = random.below(3) as usize;
                let mem = buf.io_part(skip, len as usize);
                file.write(offset, mem, step % 50 == 0).await.unwrap();
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].fill(byte);
            }
            4 => {
                let range = ByteRange::between(offset, offset + len);
                match file.zero(range, random.below(2) == 0).await {
                    Err(Errno::NotSup) => {}
                    done => {
                        done.unwrap();
                        model.resize(model.len().max(end), 0);
                        model[offset as usize..end].fill(0);
                    }
                }
            }
            5 => {
                let inside = offset.min(model.len() as u64);
                file.set_len(inside).await.unwrap();
                model.truncate(inside as usize);
                file.grow(offset).await.unwrap();
                model.resize(model.len().max(offset as usize), 0);
            }
            _ => {
                let mut expected = model.clone();
                expected.resize(expected.len().max(end), 0);
                let found = read(&file, offset, len as usize).await;
                assert_eq!(found, expected[offset as usize..end]);
            }
        }
        assert_eq!(file.len(), model.len() as u64);
        assert_holes_are_zero(&file, &model);
    }
    assert_eq!(std::fs::read(temp.path()).unwrap(), model);
}

/// Whatever the file says of holes from a few places on.
fn assert_holes_are_zero(file: &HostFile, model: &[u8]) {
    for start in [0, 4096, 9999, 30_000] {
        let mut at = start;
        while at < 60_000 {
            let front = file.front(ByteRange::between(at, 60_000));
            let end = (at + front.len) as usize;
            let part = (at as usize).min(model.len())..end.min(model.len());
            if front.known == Known::Zero {
                assert!(model[part].iter().all(|byte| *byte == 0), "{at} to {end}");
            }
            at = end as u64;
        }
    }
}

#[tokio::test]
async fn holes_are_found_and_a_discard_makes_one() {
    let temp = temp();
    let file = open(temp.path(), false, Aio::Threads);
    file.set_len(1 << 20).await.unwrap();
    let (start, end) = (64 << 10, 192 << 10);
    let buf = Buf::from_slice(&vec![7; (end - start) as usize]);
    file.write(start, buf.io(), false).await.unwrap();
    let front = |offset: u64| {
        let front = file.front(ByteRange::between(offset, 2 << 20));
        (front.known, offset + front.len)
    };
    // What is data is remembered: asked in any order.
    for _ in 0..2 {
        assert_eq!(front(0), (Known::Zero, start));
        assert_eq!(front(start), (Known::Data, end));
        assert_eq!(front(start + 512), (Known::Data, end));
        assert_eq!(front(end), (Known::Zero, 2 << 20));
        assert_eq!(front((1 << 20) + 512), (Known::Zero, 2 << 20));
    }
    let middle = ByteRange::between(96 << 10, 128 << 10);
    file.discard(middle).await.unwrap();
    assert_eq!(front(start), (Known::Data, middle.offset()));
    assert_eq!(front(middle.offset()), (Known::Zero, middle.end()));
    assert_eq!(front(middle.end()), (Known::Data, end));
}

#[tokio::test]
async fn any_offset_and_length_follow_the_model() {
    for (seed, direct) in [(1, false), (2, true), (3, true)] {
        follow(direct, Aio::Threads, seed).await;
        let thread = IoThread::start("f").unwrap();
        let done = thread.run(move || follow(direct, Aio::IoUring, seed + 10));
        done.await.unwrap();
    }
}

#[tokio::test]
async fn unaligned_direct_neighbours_do_not_undo_each_other() {
    let temp = temp();
    let file = open(temp.path(), true, Aio::IoUring);
    // Ten writers of 100 bytes each, in the same blocks, past the end.
    for round in 0..20u8 {
        let writes = (0..50u64).map(|i| {
            let buf = Buf::from_slice(&[round ^ i as u8; 100]);
            let write = file.write(i * 100, buf.io(), false);
            async move {
                let done = write.await;
                drop(buf);
                done
            }
        });
        for done in futures_util::future::join_all(writes).await {
            done.unwrap();
        }
        assert_eq!(file.len(), 5000);
        let bytes = std::fs::read(temp.path()).unwrap();
        assert_eq!(bytes.len(), 5000);
        for (i, part) in bytes.chunks(100).enumerate() {
            assert_eq!(part, [round ^ i as u8; 100], "{i}");
        }
        file.set_len(u64::from(round)).await.unwrap();
    }
}

#[tokio::test]
async fn growing_never_cuts_what_somebody_writes_beyond() {
    let temp = temp();
    let file = open(temp.path(), false, Aio::Threads);
    for i in 0..200u64 {
        let buf = Buf::from_slice(&[7; 512]);
        let far = file.write(i * 4096 + 2048, buf.io(), false);
        let near = file.grow(i * 4096 + 1024);
        let (far, near) = futures_util::future::join(far, near).await;
        far.unwrap();
        near.unwrap();
        assert_eq!(read(&file, i * 4096 + 2048, 512).await, [7; 512]);
    }
}

#[tokio::test]
async fn a_request_of_more_pieces_than_the_kernel_takes() {
    for (direct, piece) in [(false, 3), (true, 4096)] {
        let temp = temp();
        let file = open(temp.path(), direct, Aio::Threads);
        let bufs: Vec<Buf> = (0..3000u64)
            .map(|i| Buf::from_slice(&i.to_le_bytes().repeat(512)[..piece]))
            .collect();
        let all = || IoMem::join(bufs.iter().map(Buf::io));
        file.write(0, all(), false).await.unwrap();
        let into: Vec<Buf> = (0..3000).map(|_| Buf::zeroed(piece)).collect();
        let mem = IoMem::join(into.iter().map(Buf::io));
        file.read(0, mem).await.unwrap();
        for (a, b) in bufs.iter().zip(&into) {
            assert_eq!(a.as_slice(), b.as_slice());
        }
    }
}

#[tokio::test]
async fn flushes_at_the_same_time_have_one_outcome() {
    let temp = temp();
    let (file, syncs) = with_syncs(open(temp.path(), false, Aio::Threads));
    let both = futures_util::future::join(file.flush(), file.flush());
    let both = while_losing(&syncs, both).await;
    assert_eq!(both, (Err(Errno::Io), Err(Errno::Io)));
    assert_eq!(file.flush().await, Err(Errno::Io), "for good");
}

#[tokio::test]
async fn flushes_that_wait_share_the_next_one() {
    let temp = temp();
    let (file, syncs) = with_syncs(open(temp.path(), true, Aio::Threads));
    let flushes = futures_util::future::join_all((0..5).map(|_| file.flush()));
    let done = while_losing(&syncs, flushes).await;
    let (first, rest) = done.split_first().unwrap();
    assert_eq!(*first, Err(Errno::Io));
    assert_eq!(rest, [Ok(()); 4], "direct writes told of their loss");
    assert_eq!(file.0.flusher.begun(), 2);
}

#[tokio::test]
async fn a_flush_that_nobody_waits_for_still_counts() {
    let temp = temp();
    let (file, syncs) = with_syncs(open(temp.path(), false, Aio::Threads));
    let mut left = file.flush();
    let begun = futures_util::future::poll_immediate(&mut left).await;
    assert_eq!(begun, None);
    drop(left);
    assert_eq!(while_losing(&syncs, file.flush()).await, Err(Errno::Io));
}

#[tokio::test]
async fn a_durable_write_does_not_hide_what_was_lost() {
    let temp = temp();
    let (file, syncs) = with_syncs(open(temp.path(), false, Aio::Threads));
    let bytes = Buf::from_slice(&[7; 512]);
    file.write(0, bytes.io(), false).await.unwrap();
    let durable = while_losing(&syncs, file.write(512, bytes.io(), true)).await;
    assert_eq!(durable, Err(Errno::Io));
    let flushed = while_answering(&syncs, 0, file.flush()).await;
    assert_eq!(flushed, Err(Errno::Io), "the first write may be gone");
}

#[tokio::test]
async fn a_durable_write_that_has_no_room_loses_nothing() {
    let temp = temp();
    let full = AtomicBool::new(true);
    let file = with_kernel(open(temp.path(), false, Aio::Threads), move |kind| {
        let refused = matches!(kind, OpKind::Write(..)) && full.swap(false, Ordering::Relaxed);
        refused.then(|| {
            let (future, done) = OpFuture::new();
            done.set(-libc::ENOSPC);
            future
        })
    });
    let bytes = Buf::from_slice(&[7; 512]);
    assert_eq!(file.write(0, bytes.io(), true).await, Err(Errno::NoSpc));
    assert_eq!(file.flush().await, Ok(()));
    assert_eq!(file.write(0, bytes.io(), true).await, Ok(()));
}

/// A direct file of which the kernel is said to want whole pages.
fn in_pages(path: &Path) -> HostFile {
    let file = open(path, true, Aio::Threads);
    file.0.align.store(4096, Ordering::Relaxed);
    file
}

#[tokio::test]
async fn zeroes_and_writes_of_one_block_do_not_undo_each_other() {
    let temp = temp();
    temp.as_file().set_len(8192).unwrap();
    let file = in_pages(temp.path());
    let owners = (0..4u64).map(|owner| {
        let file = file.clone();
        async move {
            let mut random = Random(owner + 1);
            let start = owner * 1536;
            for round in 0..150u64 {
                let byte = (round % 250) as u8 + 1;
                let range = ByteRange::between(start, start + 512 * (1 + random.below(3)));
                let mem = Buf::from_slice(&[byte; 1536]);
                let expected = match (owner + round) % 3 {
                    0 => file.zero(range, true).await.map(|()| 0),
                    1 => file.zero(range, false).await.map(|()| 0),
                    _ => {
                        let mem = mem.io_part(0, range.len() as usize);
                        file.write(range.offset(), mem, false).await.map(|()| byte)
                    }
                };
                let expected = match expected {
                    Err(Errno::NotSup) => continue,
                    other => other.unwrap(),
                };
                let found = read(&file, range.offset(), range.len() as usize).await;
                assert!(found.iter().all(|it| *it == expected), "{owner} {round}");
            }
        }
    });
    futures_util::future::join_all(owners).await;
}

#[tokio::test]
async fn what_is_not_aligned_bounces_in_pieces() {
    let temp = temp();
    let largest = Arc::new(AtomicU64::new(0));
    let seen = largest.clone();
    let file = with_kernel(in_pages(temp.path()), move |kind| {
        if let OpKind::Read(mem) | OpKind::Write(mem, _) = kind {
            seen.fetch_max(mem.len() as u64, Ordering::Relaxed);
        }
        None
    });
    let bytes: Vec<u8> = (0..3 * BOUNCE_MAX + 1000)
        .map(|i| (i % 251) as u8)
        .collect();
    for offset in [1, 512, BOUNCE_MAX - 700] {
        let buf = Buf::from_slice(&bytes);
        file.write(offset, buf.io(), false).await.unwrap();
        assert_eq!(file.len(), offset + bytes.len() as u64);
        assert!(read(&file, offset, bytes.len()).await == bytes, "{offset}");
        file.set_len(0).await.unwrap();
    }
    assert_eq!(largest.load(Ordering::Relaxed), BOUNCE_MAX);
}

#[test]
fn opening_says_what_qemu_says() {
    let missing = HostFile::open(FileOptions::new("/nonexistent/image"));
    assert_eq!(
        missing.unwrap_err().to_string(),
        "Could not open '/nonexistent/image': No such file or directory"
    );
    let dir = tempfile::tempdir().unwrap();
    let mut options = FileOptions::new(dir.path());
    options.read_only = true;
    assert_eq!(
        HostFile::open(options).unwrap_err().to_string(),
        "'file' driver requires a regular file"
    );
    let device = HostFile::open(FileOptions::new("/dev/null"));
    assert_eq!(
        device.unwrap_err().to_string(),
        "'file' driver requires '/dev/null' to be a regular file"
    );
    let mut native = FileOptions::new("/dev/null");
    native.aio = Aio::Native;
    assert_eq!(
        HostFile::open(native).unwrap_err().to_string(),
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    );
}
