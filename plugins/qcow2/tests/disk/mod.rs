//! A host for tests: the files of an image on disk, transactions applied in
//! the contract's order, and the tools that serve as oracles.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use outport_sdk::{ByteRange, Errno, Error, Files, LogLevel, Result, Stage, Txn};
use serde_json::Value;

/// The contract's limit for one read or write.
const TRANSFER_MAX: usize = 2 << 20;

enum Op {
    Write(u64, Vec<u8>),
    Zero(ByteRange),
}

/// Files by slot, and the transaction of the running call.
pub(crate) struct Host {
    files: Vec<File>,
    queue: Vec<(u32, Stage, Op)>,
    grow: Vec<(u32, u64)>,
    truncate: Vec<(u32, u64)>,
    /// What the plugin gave back: slot and range.
    pub(crate) freed: Vec<(u32, ByteRange)>,
    /// Damage reported by the plugin.
    pub(crate) corruptions: RefCell<Vec<String>>,
    /// Metadata bytes read by the running call.
    pub(crate) read_bytes: RefCell<u64>,
    /// Most bytes that one transaction queued.
    pub(crate) queued_bytes_max: usize,
}

impl Host {
    /// Slots 0.. are these files; they are created if need be.
    pub(crate) fn open(paths: &[&Path]) -> Self {
        let open = |path: &&Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path).unwrap()
        };
        Self {
            files: paths.iter().map(open).collect(),
            queue: Vec::new(),
            grow: Vec::new(),
            truncate: Vec::new(),
            freed: Vec::new(),
            corruptions: RefCell::default(),
            read_bytes: RefCell::default(),
            queued_bytes_max: 0,
        }
    }

    /// One plugin call: applied if it returns `Ok`, forgotten otherwise.
    pub(crate) fn call<T>(&mut self, f: impl FnOnce(&mut dyn Txn) -> Result<T>) -> Result<T> {
        *self.read_bytes.borrow_mut() = 0;
        let result = f(self);
        if result.is_ok() {
            self.apply(&[Stage::Prepare, Stage::Mapping]);
        }
        self.queue.clear();
        self.grow.clear();
        self.truncate.clear();
        result
    }

    /// A call that ends in a power cut after stage `prepare`.
    pub(crate) fn cut_before_mapping(&mut self, f: impl FnOnce(&mut dyn Txn) -> Result<()>) {
        f(self).unwrap();
        self.truncate.clear();
        self.apply(&[Stage::Prepare]);
        self.queue.clear();
        self.grow.clear();
    }

    fn apply(&mut self, stages: &[Stage]) {
        let bytes = self.queue.iter().map(|(_, _, op)| match op {
            Op::Write(_, data) => data.len(),
            Op::Zero(_) => 0,
        });
        self.queued_bytes_max = self.queued_bytes_max.max(bytes.sum());
        for (slot, size) in &self.grow {
            let file = &self.files[*slot as usize];
            if file.metadata().unwrap().len() < *size {
                file.set_len(*size).unwrap();
            }
        }
        for stage in stages {
            for (slot, _, op) in self.queue.iter().filter(|(_, s, _)| s == stage) {
                let file = &self.files[*slot as usize];
                match op {
                    Op::Write(offset, data) => file.write_all_at(data, *offset).unwrap(),
                    Op::Zero(range) => zero(file, *range),
                }
            }
        }
        for (slot, size) in &self.truncate {
            self.files[*slot as usize].set_len(*size).unwrap();
        }
    }

    fn file(&self, slot: u32) -> Result<&File> {
        self.files
            .get(slot as usize)
            .ok_or_else(|| Error::new(Errno::Enoent, format!("Slot {slot} is not granted")))
    }
}

fn zero(file: &File, range: ByteRange) {
    let zeroes = vec![0; 1 << 20];
    let mut at = range.offset;
    while at < range.end() {
        let len = (range.end() - at).min(1 << 20);
        file.write_all_at(&zeroes[..len as usize], at).unwrap();
        at += len;
    }
}

/// Copy the part of `data`, which lies at `from`, that `buf` at `offset` shows.
fn overlay(buf: &mut [u8], offset: u64, from: u64, len: u64, byte: impl Fn(u64) -> u8) {
    let end = offset + buf.len() as u64;
    for at in offset.max(from)..end.min(from + len) {
        buf[(at - offset) as usize] = byte(at - from);
    }
}

impl Files for Host {
    fn size(&self, slot: u32) -> Result<u64> {
        let size = self.file(slot)?.metadata().unwrap().len();
        let grown = self
            .grow
            .iter()
            .filter(|(s, _)| *s == slot)
            .map(|(_, size)| *size);
        let written = self
            .queue
            .iter()
            .filter(|(s, _, _)| *s == slot)
            .map(|(_, _, op)| match op {
                Op::Write(offset, data) => offset + data.len() as u64,
                Op::Zero(range) => range.end(),
            });
        Ok(grown.chain(written).max().unwrap_or(0).max(size))
    }

    fn read_into(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        assert!(buf.len() <= TRANSFER_MAX, "read of {} bytes", buf.len());
        *self.read_bytes.borrow_mut() += buf.len() as u64;
        let file = self.file(slot)?;
        let mut done = 0;
        while done < buf.len() {
            match file
                .read_at(&mut buf[done..], offset + done as u64)
                .unwrap()
            {
                0 => break,
                n => done += n,
            }
        }
        buf[done..].fill(0);
        for stage in [Stage::Prepare, Stage::Mapping] {
            for (_, _, op) in self
                .queue
                .iter()
                .filter(|(s, st, _)| *s == slot && *st == stage)
            {
                match op {
                    Op::Write(from, data) => {
                        overlay(buf, offset, *from, data.len() as u64, |i| data[i as usize]);
                    }
                    Op::Zero(range) => overlay(buf, offset, range.offset, range.len, |_| 0),
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>> {
        let size = self.size(slot)?;
        Ok((offset < size).then(|| ByteRange::new(offset, size - offset)))
    }

    fn log(&self, _level: LogLevel, _message: &str) {}

    fn corrupt(&self, message: &str, _offset: Option<u64>, _size: Option<u64>, _fatal: bool) {
        self.corruptions.borrow_mut().push(message.to_owned());
    }
}

impl Txn for Host {
    fn write(&mut self, slot: u32, stage: Stage, offset: u64, data: &[u8]) -> Result<()> {
        assert!(data.len() <= TRANSFER_MAX, "write of {} bytes", data.len());
        self.file(slot)?;
        self.queue
            .push((slot, stage, Op::Write(offset, data.to_vec())));
        Ok(())
    }

    fn zero(&mut self, slot: u32, stage: Stage, range: ByteRange) -> Result<()> {
        self.file(slot)?;
        self.queue.push((slot, stage, Op::Zero(range)));
        Ok(())
    }

    fn grow(&mut self, slot: u32, size: u64) -> Result<()> {
        self.file(slot)?;
        self.grow.push((slot, size));
        Ok(())
    }

    fn free(&mut self, slot: u32, range: ByteRange) -> Result<()> {
        self.freed.push((slot, range));
        Ok(())
    }

    fn truncate(&mut self, slot: u32, size: u64) -> Result<()> {
        self.truncate.push((slot, size));
        Ok(())
    }

    fn files(&self) -> &dyn Files {
        self
    }
}

// === oracles ===

/// Whether these programs are installed; says so if not.
pub(crate) fn requires(tools: &[&str]) -> bool {
    for tool in tools {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIPPED: {tool} is not installed");
            return false;
        }
    }
    true
}

/// Run a tool in `dir`; its exit code, standard output and standard error.
pub(crate) fn run(dir: &Path, tool: &str, args: &[&str]) -> (i32, String, String) {
    let out = Command::new(tool)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        out.status.code().unwrap_or(-1),
        text(&out.stdout),
        text(&out.stderr),
    )
}

/// Run a tool that must succeed.
pub(crate) fn ok(dir: &Path, tool: &str, args: &[&str]) -> String {
    let (code, out, err) = run(dir, tool, args);
    assert_eq!(code, 0, "{tool} {args:?}: {out}{err}");
    out
}

/// `qemu-io` commands on a qcow2 image; all must succeed.
pub(crate) fn qemu_io(dir: &Path, image: &str, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command.as_str()]);
    }
    args.push(image);
    let out = ok(dir, "qemu-io", &args);
    assert!(!out.contains("failed"), "qemu-io {commands:?}: {out}");
}

/// What `qemu-img check` says of an image, and its exit code; none if it could
/// not check it.
pub(crate) fn qemu_check(dir: &Path, image: &str) -> Option<(i32, Value)> {
    let args = ["check", "-f", "qcow2", "--output=json", image];
    let (code, out, _) = run(dir, "qemu-img", &args);
    Some((code, serde_json::from_str(&out).ok()?))
}

/// A seeded generator (xorshift), so that a failure can be repeated.
pub(crate) struct Rng(u64);

impl Rng {
    /// The sequence of this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}
