//! Host files against a model, buffered and direct, on ring and pool.

use std::path::Path;

use super::*;
use crate::IoThread;
use crate::engine::Aio;
use crate::engine::buffer::{Buf, IoMem};

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
    }
    assert_eq!(std::fs::read(temp.path()).unwrap(), model);
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
