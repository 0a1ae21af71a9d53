//! The lives of one image: a seed chooses everything, a daemon lives, and is judged.

use std::fs;
use std::path::PathBuf;

use outport_tests::{Daemon, Rng, Server, check_image, eventually, qemu_img, run, try_run};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::model::{BLOCK, Model};
use super::storage::{Kind, Storage, is_mounted, text};
use super::writer::{Front, Refusal, STEP, Writer};

/// Bytes of the disk: more than the storage has at first.
const DISK: u64 = 24 << 20;

/// The dirty bitmap of images that keep some.
const BITMAP: &str = "changes";

/// Requests in one life.
const REQUESTS: u64 = 60;

/// Images: format, options of `qemu-img create`, whether it has a backing file.
const IMAGES: [(&str, &str, bool); 9] = [
    ("raw", "", false),
    ("qcow2", "cluster_size=64k", false),
    ("qcow2", "cluster_size=4k", false),
    ("qcow2", "cluster_size=512", false),
    ("qcow2", "cluster_size=2M", false),
    ("qcow2", "cluster_size=128k,extended_l2=on", false),
    ("qcow2", "compat=0.10", false),
    ("qcow2", "cluster_size=64k", true),
    ("qcow2", "cluster_size=32k,extended_l2=on", true),
];

/// All that a seed decides before the first life.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    kind: Kind,
    image: (&'static str, &'static str, bool),
    front: Front,
    direct: bool,
    aio: &'static str,
    rng: Rng,
}

impl Case {
    pub(crate) fn new(kind: Kind, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        Self {
            kind,
            image: *rng.pick(&IMAGES),
            front: *rng.pick(&[Front::Nbd, Front::VhostUser, Front::Fuse]),
            direct: rng.one_in(2),
            aio: *rng.pick::<&str>(&["threads", "io_uring"]),
            rng,
        }
    }

    /// Goes through `lives` daemons.
    pub(crate) fn live(mut self, lives: u64) {
        let storage = Storage::new(self.kind);
        let folder = tempfile::Builder::new().prefix("outport-full-").tempdir();
        let mut bench = Bench {
            storage,
            folder: folder.expect("a temp folder can be made"),
            model: Model::new(DISK / BLOCK, |n| if self.image.2 { n + 1 } else { 0 }),
            keeps_bitmaps: self.image.0 == "qcow2" && self.image.1 != "compat=0.10",
            has_bitmap: false,
        };
        bench.create(self.image);
        bench.add_bitmap();
        for life in 0..lives {
            let daemon = self.start(&mut bench);
            let (status, said) = self.run(&mut bench, daemon);
            bench.storage.close();
            bench.judge(self.image.0, status, &said, life);
        }
    }

    fn start(&self, bench: &mut Bench) -> Daemon {
        let file = bench.storage.open(self.direct, self.aio);
        let mut node = json!({"driver": self.image.0, "node-name": "disk", "file": file,
                              "discard": "unmap"});
        if self.image.2 {
            let backing = json!({"driver": "file", "filename": bench.base()});
            node["backing"] = json!({"driver": "raw", "file": backing});
        }
        let mut daemon = Daemon::builder(Server::under_test()).nbd().start();
        // Locks of a daemon that was killed go when the kernel has ended its last operation.
        eventually("the node opens", || open(&mut daemon, &node));
        daemon
    }

    /// One life; its exit status, `None` if it was killed, and its log.
    fn run(&mut self, bench: &mut Bench, mut daemon: Daemon) -> (Option<i32>, String) {
        let mountpoint = bench.mountpoint();
        let mut writer = Writer::attach(self.front, &mut daemon, &mountpoint);
        let content = writer.read(DISK);
        let same = bench.model.compare(&content, false);
        assert_eq!(same, Ok(()), "what {:?} reads after opening", self.front);
        for _ in 0..REQUESTS {
            self.request(bench, &mut writer);
        }
        let killed = self.rng.one_in(2);
        if killed {
            self.in_flight(bench, &mut writer);
            drop(daemon);
            drop(writer);
            // The file of a killed daemon's export; it is not mounted for the other clients.
            if is_mounted(&mountpoint) {
                run("umount", &["-l", text(&mountpoint)]);
            }
            return (None, String::new());
        }
        drop(writer);
        run("kill", &["-TERM", &daemon.pid().to_string()]);
        let status = daemon.wait();
        (Some(status.code().unwrap_or(-1)), daemon.stderr())
    }

    fn request(&mut self, bench: &mut Bench, writer: &mut Writer) {
        match self.rng.below(20) {
            0..=9 => {
                self.write(bench, writer);
            }
            10..=12 => self.flush(bench, writer),
            13 => self.zero(bench, writer),
            14 => self.trim(bench, writer),
            15 => {
                let len = self.rng.between(1, 2048) * BLOCK;
                bench.storage.press(len, 0);
            }
            16 | 17 => self.fill(bench, writer),
            _ => self.recover(bench, writer),
        }
    }

    /// A range of blocks: where, and how many.
    fn range(&mut self) -> (u64, u64) {
        let most = if self.rng.one_in(3) { STEP / BLOCK } else { 16 };
        let count = self.rng.between(1, most);
        (self.rng.below(DISK / BLOCK - count + 1), count)
    }

    /// True if it was acknowledged.
    fn write(&mut self, bench: &mut Bench, writer: &mut Writer) -> bool {
        let (at, count) = self.range();
        let (first, data) = bench.model.data(count);
        match writer.write(at * BLOCK, &data) {
            Ok(()) => {
                bench.model.written(at, count, first);
                true
            }
            Err(refusal) => {
                assert_eq!(
                    refusal,
                    Refusal::NoSpace,
                    "a write of {count} blocks at {at}"
                );
                bench.model.perhaps_written(at, count, first);
                false
            }
        }
    }

    fn flush(&mut self, bench: &mut Bench, writer: &mut Writer) {
        assert_eq!(writer.flush(), Ok(()), "a flush failed");
        bench.model.flushed();
    }

    fn zero(&mut self, bench: &mut Bench, writer: &mut Writer) {
        let (at, count) = self.range();
        match writer.zero(at * BLOCK, count * BLOCK) {
            Ok(()) => bench.model.zeroed(at, count),
            Err(refusal) => {
                assert_eq!(refusal, Refusal::NoSpace, "zeroes: {count} blocks at {at}");
                bench.model.perhaps_zeroed(at, count);
            }
        }
    }

    fn trim(&mut self, bench: &mut Bench, writer: &mut Writer) {
        let (at, count) = self.range();
        let done = writer.trim(at * BLOCK, count * BLOCK);
        assert!(
            matches!(done, Ok(()) | Err(Refusal::NoSpace)),
            "trim: {done:?}"
        );
        bench.model.perhaps_zeroed(at, count);
    }

    /// Writes until there is no room.
    fn fill(&mut self, bench: &mut Bench, writer: &mut Writer) {
        let spare = self.rng.below(512) * BLOCK;
        bench.storage.press(u64::MAX, spare);
        for _ in 0..8 {
            if !self.write(bench, writer) {
                return;
            }
        }
    }

    /// The same client goes on when there is room again.
    fn recover(&mut self, bench: &mut Bench, writer: &mut Writer) {
        bench.storage.recover();
        self.flush(bench, writer);
        assert!(
            self.write(bench, writer),
            "a write is refused though there is room"
        );
    }

    /// Leaves writes unanswered.
    fn in_flight(&mut self, bench: &mut Bench, writer: &mut Writer) {
        for _ in 0..self.rng.below(8) {
            let (at, count) = self.range();
            let (first, data) = bench.model.data(count);
            if !writer.send(at * BLOCK, &data) {
                return;
            }
            bench.model.perhaps_written(at, count, first);
        }
    }
}

fn open(daemon: &mut Daemon, node: &Value) -> Option<()> {
    match daemon.qmp.execute("blockdev-add", node.clone()) {
        Ok(_) => Some(()),
        Err(error) if error.desc.contains("lock") => None,
        Err(error) => panic!("blockdev-add {node}: {error}"),
    }
}

/// One image with its storage and its model.
struct Bench {
    storage: Storage,
    folder: TempDir,
    model: Model,
    /// Images of this format keep dirty bitmaps.
    keeps_bitmaps: bool,
    /// The image has the dirty bitmap [`BITMAP`], and its bits are whole.
    has_bitmap: bool,
}

impl Bench {
    fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    /// The file that a FUSE export covers.
    fn mountpoint(&self) -> PathBuf {
        let path = self.folder.path().join("disk");
        fs::write(&path, b"").expect("the folder is ours");
        path
    }

    fn create(&self, (format, options, backed): (&str, &str, bool)) {
        let (image, size) = (self.storage.image(), DISK.to_string());
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let base = self.base();
        if backed {
            let block = |n: u64| n.to_le_bytes().repeat(BLOCK as usize / 8);
            let content: Vec<u8> = (1..=DISK / BLOCK).flat_map(block).collect();
            fs::write(&base, content).expect("the folder is ours");
            args.extend(["-b", text(&base), "-F", "raw"]);
        }
        args.extend([text(&image), &size]);
        qemu_img(&args);
        self.storage.lengthen();
    }

    /// Exit status, consistency and content of a life that is over.
    fn judge(&mut self, format: &str, status: Option<i32>, said: &str, life: u64) {
        let image = self.storage.image();
        // Acknowledged writes may be missing, and nobody was deceived.
        let told = match status {
            None => true,
            Some(0) => false,
            Some(3) => {
                let bitmap = said.contains("has lost its persistent bitmaps");
                let data = said.contains("since its last flush is lost");
                assert!(
                    bitmap || data,
                    "life {life}: status 3 without a word: {said}"
                );
                data
            }
            Some(other) => panic!("life {life} ended with status {other}: {said}"),
        };
        if format == "qcow2" {
            self.check(status != Some(0), life);
            self.judge_bitmap(status, life);
        }
        let copy = self.folder.path().join("copy");
        let args = [
            "convert",
            "-U",
            "-f",
            format,
            "-O",
            "raw",
            text(&image),
            text(&copy),
        ];
        qemu_img(&args);
        let mut content = fs::read(&copy).expect("qemu-img has just written it");
        // The file of a server is longer than a raw disk in it.
        content.truncate(DISK as usize);
        let same = self.model.compare(&content, told);
        assert_eq!(
            same,
            Ok(()),
            "life {life}, status {status:?}, by qemu-img: {said}"
        );
    }

    /// Gives the image a new dirty bitmap, if there is room for one.
    fn add_bitmap(&mut self) {
        if !self.keeps_bitmaps {
            return;
        }
        let image = self.storage.image();
        try_run("qemu-img", &["bitmap", "--remove", text(&image), BITMAP]);
        let added = try_run("qemu-img", &["bitmap", "--add", text(&image), BITMAP]);
        self.has_bitmap = added.code == Some(0);
    }

    /// A bitmap survives an orderly end, or its loss was told.
    fn judge_bitmap(&mut self, status: Option<i32>, life: u64) {
        if !self.has_bitmap {
            return self.add_bitmap();
        }
        let image = self.storage.image();
        let info = qemu_img(&["info", "--output=json", text(&image)]);
        let info: Value = serde_json::from_str(&info).expect("qemu-img prints JSON");
        let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
        let whole = *flags == json!(["auto"]);
        if status == Some(0) {
            assert!(
                whole,
                "life {life}: a bitmap was lost without a word: {info}"
            );
        }
        if !whole {
            self.add_bitmap();
        }
    }

    /// No error ever; leaks only where an end may leave them, and they are taken away.
    fn check(&self, leaks: bool, life: u64) {
        let image = self.storage.image();
        if !leaks {
            return check_image(&image, &format!("life {life}"));
        }
        let repair = ["check", "-q", "-r", "leaks", "-f", "qcow2", text(&image)];
        // A killed daemon has its locks until the kernel has ended its last operation.
        let done = eventually("the image is free", || {
            Some(try_run("qemu-img", &repair)).filter(|done| !done.err.contains("lock"))
        });
        let what = format!("life {life}, leaks taken away");
        assert_eq!(done.code, Some(0), "{what}: {}{}", done.out, done.err);
        check_image(&image, &what);
    }
}
