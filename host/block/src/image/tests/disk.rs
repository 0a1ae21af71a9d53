//! A disk under test: a temporary file, a toy image in it, and a model.

use std::sync::Arc;

use super::toy::{Told, ToyFactory, create_toy, open_toy};
use crate::engine::Aio;
use crate::engine::buffer::Buf;
use crate::file::{FileOptions, HostFile};
use crate::format::Repair;
use crate::node::{Kind, Node};
use crate::trace::Trace;
use crate::{ByteRange, Errno};

/// Small, fast, the same every time.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }

    /// A range within `size`, often aligned to `unit`, at most `max` long.
    pub(super) fn range(&mut self, size: u64, unit: u64, max: u64) -> ByteRange {
        let align = match self.below(3) {
            0 => 1,
            1 => 512,
            _ => unit,
        };
        let start = self.below(size) / align * align;
        let len = (self.below(max) / align * align).max(align.min(max));
        ByteRange::between(start, (start + len).min(size))
    }

    pub(super) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let fill = self.next();
        (0..len)
            .map(|i| (fill.wrapping_add(i / 8) >> (8 * (i % 8))) as u8 | 1)
            .collect()
    }
}

/// How a disk is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) bits: u32,
    pub(super) size: u64,
    /// File clusters at most; 0: more than enough.
    pub(super) capacity: u64,
    pub(super) direct: bool,
    pub(super) aio: Aio,
    pub(super) unmap: bool,
    pub(super) backing: Option<u64>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            bits: 12,
            size: 256 << 10,
            capacity: 0,
            direct: false,
            aio: Aio::IoUring,
            unmap: true,
            backing: None,
        }
    }
}

/// A disk.
pub(super) struct Disk {
    pub(super) setup: Setup,
    dir: tempfile::TempDir,
    pub(super) factory: Arc<ToyFactory>,
    pub(super) told: Told,
    pub(super) node: Arc<Node>,
    pub(super) model: Vec<u8>,
    backing: Option<Arc<Node>>,
    pub(super) trace: Option<Arc<Trace>>,
    /// What was done, for whoever reads a failure.
    pub(super) log: Vec<String>,
}

fn file_node(setup: &Setup, path: std::path::PathBuf, trace: Option<Arc<Trace>>) -> Arc<Node> {
    let mut options = FileOptions::new(path);
    options.direct = setup.direct;
    options.aio = setup.aio;
    options.unmap = setup.unmap;
    let mut file = HostFile::open(options).unwrap();
    if let Some(trace) = trace {
        file = file.with_trace(trace);
    }
    Node::new("file0", "file", false, Kind::File(file))
}

impl Disk {
    pub(super) async fn new(setup: Setup) -> Self {
        Self::with_trace(setup, None).await
    }

    /// `trace` records what happens after the image was made.
    pub(super) async fn with_trace(setup: Setup, trace: Option<Arc<Trace>>) -> Self {
        let dir = tempfile::TempDir::new_in(std::env::temp_dir()).unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"").unwrap();
        let clusters = setup.size.div_ceil(1 << setup.bits);
        let capacity = match setup.capacity {
            // The metadata's own clusters come on top.
            0 => clusters * 3 + 64,
            n => n,
        };
        let plain = file_node(&setup, path, None);
        create_toy(&plain, setup.bits, setup.size, capacity).await;
        drop(plain);
        let mut model = vec![0; setup.size as usize];
        let backing = setup.backing.map(|len| {
            let content = Random::new(7).bytes(len);
            let shared = model.len().min(content.len());
            model[..shared].copy_from_slice(&content[..shared]);
            let path = dir.path().join("backing");
            std::fs::write(&path, content).unwrap();
            let mut options = FileOptions::new(path);
            options.read_only = true;
            let file = HostFile::open(options).unwrap();
            Node::new("backing0", "file", true, Kind::File(file))
        });
        let factory = Arc::new(ToyFactory::default());
        let told = Told::default();
        let file = file_node(&setup, dir.path().join("image"), trace.clone());
        let node = open_toy(&factory, &file, backing.clone(), &told)
            .await
            .unwrap();
        Self {
            setup,
            dir,
            factory,
            told,
            node,
            model,
            backing,
            trace,
            log: Vec::new(),
        }
    }

    pub(super) fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("image")
    }

    /// Close cleanly and open again.
    pub(super) async fn reopen(&mut self) {
        self.node.close().await.unwrap();
        self.open_again().await;
    }

    /// Open again as after a kill: what was not flushed may be lost.
    pub(super) async fn open_again(&mut self) {
        let file = file_node(&self.setup, self.path(), self.trace.clone());
        self.node = open_toy(&self.factory, &file, self.backing.clone(), &self.told)
            .await
            .unwrap();
    }

    pub(super) async fn write(&mut self, at: u64, bytes: &[u8], fua: bool) -> Result<(), Errno> {
        self.model[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        if !fua && let Some(done) = self.node.try_write(at, bytes) {
            return done;
        }
        self.node.write(at, &Buf::from_slice(bytes), fua).await
    }

    pub(super) async fn zero(&mut self, range: ByteRange, unmap: bool) -> Result<(), Errno> {
        self.model[range.offset() as usize..range.end() as usize].fill(0);
        self.node.write_zeroes(range, unmap).await
    }

    /// The toy's discards read as zeroes, for whole clusters.
    pub(super) async fn discard(&mut self, range: ByteRange) -> Result<(), Errno> {
        let cluster = 1 << self.setup.bits;
        let start = range.offset().next_multiple_of(cluster);
        let end = if range.end() == self.node.len_bytes() {
            range.end()
        } else {
            range.end() / cluster * cluster
        };
        if start < end {
            self.model[start as usize..end as usize].fill(0);
        }
        self.node.discard(range).await
    }

    pub(super) async fn resize(&mut self, size: u64) {
        self.node.resize(size).await.unwrap();
        let old = self.model.len();
        self.model.resize(size as usize, 0);
        if let Some(backing) = &self.backing
            && size as usize > old
        {
            // A cluster that was never written shows the backing file again.
            let cluster = 1usize << self.setup.bits;
            let from = old.next_multiple_of(cluster);
            let to = (backing.len_bytes() as usize).min(size as usize);
            if from < to {
                let buf = Buf::zeroed(to - from);
                let buf = backing.read(from as u64, buf).await.unwrap();
                self.model[from..to].copy_from_slice(buf.as_slice());
            }
        }
    }

    pub(super) async fn compare(&self, range: ByteRange) {
        let expected = &self.model[range.offset() as usize..range.end() as usize];
        let mut inline = vec![0xee; range.len() as usize];
        match self.node.try_read(range.offset(), &mut inline) {
            Some(done) => done.unwrap(),
            None => {
                let buf = Buf::from_slice(&inline);
                let buf = self.node.read(range.offset(), buf).await.unwrap();
                inline.copy_from_slice(buf.as_slice());
            }
        }
        if inline != expected {
            let at = inline.iter().zip(expected).position(|(a, b)| a != b);
            let at = at.unwrap();
            panic!(
                "{:#?}\n{range:?} differs at {:#x}: read {:#x}, wrote {:#x}; {:?}",
                self.log,
                range.offset() + at as u64,
                inline[at],
                expected[at],
                self.setup
            );
        }
    }

    pub(super) async fn compare_all(&self) {
        assert_eq!(self.node.len_bytes(), self.model.len() as u64);
        let mut at = 0;
        while at < self.model.len() as u64 {
            let end = (at + 100_000).min(self.model.len() as u64);
            self.compare(ByteRange::between(at, end)).await;
            at = end;
        }
    }

    /// No corruption; gives the number of leaked clusters.
    pub(super) async fn check(&self) -> u64 {
        let image = self.node.image().unwrap();
        let report = image.check(Repair::default(), |_| {}).await.unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
        report.leaks
    }
}
