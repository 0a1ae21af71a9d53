//! Random operations on the file of an export, against a model: what `fsx` does, in our harness.
//!
//! `OUTPORT_TEST_OPERATIONS` says how many for each kind of export (a million in all is
//! 250000), `OUTPORT_TEST_SEED` with which seed. A failure names seed and operation.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod map;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use outport_tests::{Daemon, Rng, Server, TempImage, check_image, qemu_img, requires};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use serde_json::json;

const SECTOR: u64 = 512;

/// No file grows longer.
const LEN_MAX: u64 = 2 << 20;

/// No operation touches more.
const STEP_MAX: u64 = 200_000;

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// One export and what must be in it.
struct Exerciser {
    path: PathBuf,
    file: File,
    direct: File,
    model: Vec<u8>,
    rng: Rng,
    growable: bool,
    /// Lengths are multiples of this.
    unit: u64,
    /// Space can be promised.
    reserves: bool,
    said: String,
}

impl Exerciser {
    fn new(path: &Path, model: Vec<u8>, growable: bool, unit: u64, seed: u64) -> Self {
        Self {
            path: path.to_owned(),
            file: open(path, 0),
            direct: open(path, libc::O_DIRECT),
            model,
            rng: Rng::new(seed),
            growable,
            unit,
            reserves: false,
            said: String::new(),
        }
    }

    fn len(&self) -> u64 {
        self.model.len() as u64
    }

    /// A place up to `end`, and how much from there.
    fn range(&mut self, end: u64) -> (u64, u64) {
        let at = self.rng.below(end.max(1));
        let len = match self.rng.below(3) {
            0 => self.rng.below(SECTOR * 2),
            1 => self.rng.below(20_000),
            _ => self.rng.below(STEP_MAX),
        };
        (at, len.min(LEN_MAX - at.min(LEN_MAX)))
    }

    fn say(&mut self, what: String) {
        self.said = what;
    }

    /// Grows the model with zeroes.
    fn reach(&mut self, end: u64) {
        let end = end.next_multiple_of(self.unit) as usize;
        if end > self.model.len() {
            self.model.resize(end, 0);
        }
    }

    fn step(&mut self) {
        match self.rng.below(15) {
            0..=3 => self.read(),
            4..=7 => self.write(),
            8 => self.direct_io(),
            9 => self.truncate(),
            10 => self.punch(),
            11 => self.zero(),
            12 => self.map(),
            13 => self.holes(),
            _ => self.rare(),
        }
    }

    fn read(&mut self) {
        let (at, len) = self.range(self.len() + 1000);
        self.say(format!("read {len} at {at}"));
        let mut data = vec![0xee; len as usize];
        let mut done = 0;
        while done < data.len() {
            match self
                .file
                .read_at(&mut data[done..], at + done as u64)
                .unwrap()
            {
                0 => break,
                n => done += n,
            }
        }
        let start = self.model.len().min(at as usize);
        let end = self.model.len().min((at + len) as usize);
        let model = &self.model[start..end];
        let same = model.iter().zip(&data[..done]).take_while(|(a, b)| a == b);
        let same = same.count();
        assert!(
            same == model.len() && same == done,
            "{}: {done} of {} bytes, differs at {}",
            self.said,
            model.len(),
            start + same
        );
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.rng.fill(&mut data);
        data
    }

    fn write(&mut self) {
        let beyond = if self.growable { 50_000 } else { 0 };
        let end = (self.len() + beyond).min(LEN_MAX);
        let (at, len) = self.range(end);
        self.say(format!("write {len} at {at}"));
        let data = self.data(len);
        let wanted = match self.growable {
            true => len,
            false => len.min(self.len().saturating_sub(at)),
        };
        let mut done = 0;
        while done < wanted {
            let n = self
                .file
                .write_at(&data[done as usize..], at + done)
                .unwrap();
            assert!(n > 0, "{}", self.said);
            done += n as u64;
        }
        assert_eq!(done, wanted, "{}", self.said);
        if done > 0 {
            self.reach(at + done);
            self.model[at as usize..(at + done) as usize].copy_from_slice(&data[..done as usize]);
        }
    }

    /// Whole pages past the cache of whoever has one, inside the file.
    fn direct_io(&mut self) {
        let pages = self.len() / 4096;
        if pages == 0 {
            return;
        }
        let first = self.rng.below(pages);
        let count = 1 + self.rng.below((pages - first).min(32));
        self.say(format!("direct I/O of {count} pages at page {first}"));
        let mut space = vec![0; (count as usize + 1) * 4096];
        let skip = space.as_ptr().align_offset(4096);
        let part = &mut space[skip..skip + count as usize * 4096];
        let at = first as usize * 4096;
        if self.rng.below(2) == 0 {
            self.direct.read_exact_at(part, at as u64).unwrap();
            assert!(*part == self.model[at..at + part.len()], "{}", self.said);
        } else {
            self.rng.fill(part);
            self.direct.write_all_at(part, at as u64).unwrap();
            self.model[at..at + part.len()].copy_from_slice(part);
        }
    }

    fn truncate(&mut self) {
        let len = self.rng.below(LEN_MAX) / self.unit * self.unit;
        self.say(format!("truncate to {len}"));
        self.file.set_len(len).unwrap();
        match (len, self.growable) {
            // A disk keeps its length.
            (0, false) => self.model.fill(0),
            _ => self.model.resize(len as usize, 0),
        }
    }

    fn punch(&mut self) {
        let (at, len) = self.range(self.len() + 1000);
        self.say(format!("punch {len} at {at}"));
        if len > 0 {
            fallocate(&self.file, PUNCH, at, len).unwrap();
            self.blank(at, len);
        }
    }

    fn blank(&mut self, at: u64, len: u64) {
        let start = self.model.len().min(at as usize);
        let end = self.model.len().min((at + len) as usize);
        self.model[start..end].fill(0);
    }

    fn zero(&mut self) {
        let keep = self.rng.below(2) == 0;
        let (at, len) = self.range(self.len());
        let len = len / self.unit * self.unit;
        let at = at / self.unit * self.unit;
        self.say(format!("zero {len} at {at}, keep {keep}"));
        if len == 0 {
            return;
        }
        let mut flags = FallocateFlags::ZERO_RANGE;
        flags.set(FallocateFlags::KEEP_SIZE, keep);
        fallocate(&self.file, flags, at, len).unwrap();
        if !keep {
            self.reach(at + len);
        }
        self.blank(at, len);
    }

    /// Through a mapping, within the file.
    fn map(&mut self) {
        if self.model.is_empty() {
            return;
        }
        let (at, len) = self.range(self.len());
        let len = len.min(self.len() - at);
        if len == 0 {
            return;
        }
        let store = self.rng.below(2) == 0;
        self.say(format!("map {len} at {at}, store {store}"));
        let (start, end) = (at as usize, (at + len) as usize);
        if store {
            let data = self.data(len);
            map::store(&self.file, at, &data);
            self.model[start..end].copy_from_slice(&data);
        } else {
            let seen = map::load(&self.file, at, len as usize);
            assert!(seen == self.model[start..end], "{}", self.said);
        }
    }

    /// What is told to be a hole is one.
    fn holes(&mut self) {
        let mut at = self.rng.below(self.len() + 1);
        self.say(format!("holes from {at}"));
        let mut rounds = 0;
        while at < self.len() && rounds < 50 {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => self.len(),
                Err(e) => panic!("{}: {e}", self.said),
            };
            let hole = &self.model[at as usize..data as usize];
            assert!(hole.iter().all(|byte| *byte == 0), "{}", self.said);
            if data == self.len() {
                break;
            }
            at = seek(&self.file, SeekFrom::Hole(data)).unwrap();
            assert!(at > data && at <= self.len(), "{}", self.said);
            rounds += 1;
        }
    }

    fn rare(&mut self) {
        match self.rng.below(6) {
            0 => self.file.sync_data().unwrap(),
            1 => {
                self.file = open(&self.path, 0);
                self.direct = open(&self.path, libc::O_DIRECT);
            }
            2 if self.growable && self.len() < LEN_MAX - 5000 => {
                let len = 1 + self.rng.below(5000);
                let data = self.data(len);
                self.say(format!("append {len}"));
                let at = self.model.len();
                let file = OpenOptions::new().append(true).open(&self.path).unwrap();
                std::io::Write::write_all(&mut &file, &data).unwrap();
                self.reach(at as u64 + len);
                self.model[at..at + len as usize].copy_from_slice(&data);
            }
            3 => {
                let at = self.len().next_multiple_of(self.unit);
                let len = (1 + self.rng.below(5000)).next_multiple_of(self.unit);
                if at + len <= LEN_MAX {
                    self.say(format!("allocate {len} at {at}"));
                    match fallocate(&self.file, FallocateFlags::empty(), at, len) {
                        Ok(()) => self.reach(at + len),
                        // Nobody can promise space inside an image.
                        Err(error) => {
                            assert_eq!(error, rustix::io::Errno::OPNOTSUPP);
                            assert!(!self.reserves, "a raw file reserves space");
                        }
                    }
                }
            }
            _ => {
                let len = self.file.metadata().unwrap().len();
                assert_eq!(len, self.len(), "after {}", self.said);
            }
        }
    }
}

fn open(path: &Path, flags: i32) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).custom_flags(flags);
    options.open(path).unwrap()
}

/// Runs it over an image of a format.
fn exercise(format: &str, growable: bool, queues: usize) {
    if !outport_tests::can_mount() || !requires("qemu-img") {
        return;
    }
    let len: u64 = 1 << 20;
    let image = match format {
        "raw" => TempImage::zeroes(len),
        _ => TempImage::qcow2(len, ""),
    };
    let mut builder = Daemon::builder(Server::under_test());
    let names: Vec<_> = (0..queues).map(|at| format!("io{at}")).collect();
    for name in &names {
        builder = builder.option("--object", format!("iothread,id={name}"));
    }
    let mut daemon = builder.start();
    daemon.add_node("n", &image);
    let path = daemon.path("file");
    std::fs::write(&path, "").unwrap();
    let export = json!({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": path,
        "writable": true, "growable": growable, "iothread": names});
    daemon.qmp.ok("block-export-add", export);

    let unit = match (format, growable) {
        // To the byte, as any file.
        (_, true) => 1,
        (_, false) => SECTOR,
    };
    let seed = number("OUTPORT_TEST_SEED", 1);
    let operations = number("OUTPORT_TEST_OPERATIONS", 5000);
    let model = vec![0; len as usize];
    let mut it = Exerciser::new(&path, model, growable, unit, seed);
    it.reserves = format == "raw";
    for operation in 0..operations {
        let before = it.said.clone();
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| it.step()));
        if let Err(panic) = done {
            eprintln!(
                "seed {seed}, operation {operation}: {}, after {before}",
                it.said
            );
            std::panic::resume_unwind(panic);
        }
    }
    assert!(
        std::fs::read(&path).unwrap() == it.model,
        "all of it, at the end"
    );
    let model = std::mem::take(&mut it.model);
    drop(it);
    daemon.qmp.ok("block-export-del", json!({"id": "e"}));
    daemon.stop();
    if format == "raw" {
        assert!(std::fs::read(image.path()).unwrap() == model, "the image");
    } else {
        let mut model = model;
        model.resize(model.len().next_multiple_of(SECTOR as usize), 0);
        check_image(image.path(), "after all");
        let copy = TempImage::zeroes(0);
        qemu_img(&[
            "convert",
            "-f",
            format,
            "-O",
            "raw",
            image.str(),
            copy.str(),
        ]);
        assert!(std::fs::read(copy.path()).unwrap() == model, "the image");
    }
}

#[test]
fn a_fixed_raw_export_is_what_the_model_is() {
    exercise("raw", false, 1);
}

#[test]
fn a_growable_raw_export_is_what_the_model_is() {
    exercise("raw", true, 2);
}

#[test]
fn a_fixed_qcow2_export_is_what_the_model_is() {
    exercise("qcow2", false, 2);
}

#[test]
fn a_growable_qcow2_export_is_what_the_model_is() {
    exercise("qcow2", true, 1);
}
