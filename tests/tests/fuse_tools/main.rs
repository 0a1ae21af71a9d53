//! Other people's programs on the file of an export: all that know raw disks and nothing else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;

use outport_tests::{
    Daemon, Server, TempImage, can_mount, check_image, checksum_file, qemu_img, requires, run,
    try_run,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// An export of a fresh image.
struct Exported {
    daemon: Daemon,
    image: TempImage,
    format: &'static str,
    path: PathBuf,
}

impl Exported {
    fn new(format: &'static str, len: u64) -> Self {
        Self::with(format, len, false)
    }

    fn with(format: &'static str, len: u64, growable: bool) -> Self {
        let image = match format {
            "raw" => TempImage::zeroes(len),
            _ => TempImage::qcow2(len, ""),
        };
        let mut daemon = Daemon::builder(Server::under_test()).start();
        daemon.add_node("n", &image);
        let path = daemon.path("disk");
        std::fs::write(&path, "").unwrap();
        let export = json!({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": path,
            "writable": true, "growable": growable});
        daemon.qmp.ok("block-export-add", export);
        Self {
            daemon,
            image,
            format,
            path,
        }
    }

    fn str(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Ends it; the image holds what `expected` holds.
    fn ends_as(mut self, expected: &TempImage) {
        self.daemon.qmp.ok("block-export-del", json!({"id": "e"}));
        self.daemon.stop();
        let (image, expected) = (self.image.str(), expected.str());
        if self.format == "qcow2" {
            check_image(self.image.path(), "after all");
        }
        qemu_img(&["compare", "-f", self.format, "-F", "raw", image, expected]);
    }
}

/// For each format, where the tools are.
fn each(tools: &[&str], test: impl Fn(Exported)) {
    if !can_mount() || !tools.iter().all(|tool| requires(tool)) {
        return;
    }
    for format in ["raw", "qcow2"] {
        test(Exported::new(format, 64 * MIB));
    }
}

/// A disk with data here and there.
fn source() -> TempImage {
    let image = TempImage::zeroes(64 * MIB);
    let file = std::fs::OpenOptions::new().write(true).open(image.path());
    let file = file.unwrap();
    for (at, len) in [
        (0, 70_000),
        (5 * MIB, 1 << 20),
        (40 * MIB + 512, 300_000),
        (63 * MIB, 1 << 20),
    ] {
        let data = outport_tests::pattern(len, at);
        std::os::unix::fs::FileExt::write_all_at(&file, &data, at).unwrap();
    }
    image
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    each(&["qemu-img"], |it| {
        let source = source();
        let (from, to) = (source.str(), it.str());
        qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", from, to]);
        qemu_img(&["compare", "-f", "raw", "-F", "raw", from, to]);
        let info: Value =
            serde_json::from_str(&qemu_img(&["info", "-f", "raw", "--output=json", to])).unwrap();
        assert_eq!(info["virtual-size"], 64 * MIB);
        let map: Value =
            serde_json::from_str(&qemu_img(&["map", "-f", "raw", "--output=json", to])).unwrap();
        let data = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["data"] == true);
        let bytes: u64 = data.map(|it| it["length"].as_u64().unwrap()).sum();
        assert!(bytes < 4 * MIB, "{map}: holes stay holes");
        assert!(bytes > 2 * MIB, "{map}");
        it.ends_as(&source);
    });
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    each(&["qemu-img", "qemu-io"], |it| {
        let model = TempImage::zeroes(64 * MIB);
        let commands = [
            "write -P 1 0 1M",
            "write -P 2 700k 123k",
            "write -z 800k 100k",
            "write -P 3 63M 1M",
            "discard 10M 10M",
            "flush",
        ];
        for target in [it.str(), model.str()] {
            let mut args = vec!["-f", "raw", "-t", "none"];
            for command in commands {
                args.extend(["-c", command]);
            }
            args.push(target);
            let said = run("qemu-io", &args);
            assert!(!said.contains("failed"), "{said}");
        }
        assert_eq!(checksum_file(&it.path), checksum_file(model.path()));
        it.ends_as(&model);
    });
}

#[test]
fn coreutils_and_util_linux_see_a_file() {
    each(&["qemu-img", "dd", "cp", "fallocate", "truncate"], |it| {
        let model = source();
        let to = format!("of={}", it.str());
        let from = format!("if={}", model.str());
        run(
            "dd",
            &[&from, &to, "bs=1M", "conv=notrunc,fsync", "status=none"],
        );
        let copy = TempImage::zeroes(0);
        run("cp", &["--sparse=always", it.str(), copy.str()]);
        assert_eq!(checksum_file(copy.path()), checksum_file(model.path()));
        for target in [it.str(), model.str()] {
            run("fallocate", &["-p", "-o", "5M", "-l", "500k", target]);
            run("fallocate", &["-z", "-o", "1000", "-l", "60000", target]);
            run("truncate", &["-s", "32M", target]);
            run("truncate", &["-s", "64M", target]);
        }
        assert_eq!(checksum_file(&it.path), checksum_file(model.path()));
        it.ends_as(&model);
    });
}

/// Ways to copy a sparse file over a disk that is full of other data. All of them succeed, and the
/// disk holds what the file holds: `ARCHITECTURE-fuse.md` has the table.
const COPIES: [&[&str]; 9] = [
    &["cp", "{from}", "{to}"],
    &["cp", "--sparse=always", "{from}", "{to}"],
    &["cp", "--sparse=never", "{from}", "{to}"],
    &["dd", "if={from}", "of={to}", "bs=64k", "status=none"],
    &[
        "dd",
        "if={from}",
        "of={to}",
        "bs=64k",
        "conv=sparse",
        "status=none",
    ],
    &[
        "dd",
        "if={from}",
        "of={to}",
        "bs=1M",
        "conv=notrunc",
        "status=none",
    ],
    &["rsync", "--inplace", "{from}", "{to}"],
    &["rsync", "--sparse", "--inplace", "{from}", "{to}"],
    &[
        "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "{from}", "{to}",
    ],
];

#[test]
fn a_copy_of_a_sparse_file_leaves_no_old_bytes() {
    if !can_mount() || !COPIES.iter().all(|copy| requires(copy[0])) {
        return;
    }
    for format in ["raw", "qcow2"] {
        for growable in [false, true] {
            let it = Exported::with(format, 64 * MIB, growable);
            let source = source();
            for copy in COPIES {
                let what = format!("{copy:?} to {format}, growable={growable}");
                let full = std::fs::OpenOptions::new()
                    .write(true)
                    .open(&it.path)
                    .unwrap();
                std::os::unix::fs::FileExt::write_all_at(&full, &vec![0xee; 64 << 20], 0).unwrap();
                drop(full);
                let name = |word: &&str| {
                    word.replace("{from}", source.str())
                        .replace("{to}", it.str())
                };
                let args: Vec<String> = copy[1..].iter().map(name).collect();
                let done = try_run(copy[0], &args);
                assert_eq!(done.code, Some(0), "{what}: {}", done.err);
                let same = checksum_file(&it.path) == checksum_file(source.path());
                assert!(same, "{what}: the disk holds something else");
            }
            it.ends_as(&source);
        }
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    each(&["qemu-img", "fio"], |it| {
        for (engine, direct) in [("psync", 0), ("io_uring", 1), ("mmap", 0)] {
            let output = try_run(
                "fio",
                &[
                    "--name=verify",
                    "--rw=randwrite",
                    "--bsrange=4k-64k",
                    "--size=32M",
                    "--io_size=16M",
                    "--iodepth=16",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--randseed=7",
                    &format!("--direct={direct}"),
                    &format!("--ioengine={engine}"),
                    &format!("--filename={}", it.str()),
                ],
            );
            assert_eq!(
                output.code,
                Some(0),
                "{engine}: {}{}",
                output.out,
                output.err
            );
        }
        let model = TempImage::zeroes(0);
        run("cp", &[it.str(), model.str()]);
        it.ends_as(&model);
    });
}

/// A loop device, detached with the test.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = try_run("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn a_partitioned_disk_with_a_file_system_is_made_on_a_loop_device() {
    let tools = ["qemu-img", "losetup", "sfdisk", "mkfs.ext4", "fsck.ext4"];
    each(&tools, |it| {
        let disk = it.str().to_owned();
        std::fs::write(it.daemon.path("table"), "label: gpt\n,48M\n,\n").unwrap();
        let script = format!(
            "sfdisk --quiet {disk} < {}",
            it.daemon.path("table").display()
        );
        run("sh", &["-c", &script]);
        assert!(run("sfdisk", &["--dump", &disk]).contains("label: gpt"));
        let start = (MIB).to_string();
        let size = (48 * MIB).to_string();
        let args = [
            "--find",
            "--show",
            "--offset",
            &start,
            "--sizelimit",
            &size,
            &disk,
        ];
        let device = Loop(run("losetup", &args).trim().to_owned());
        run("mkfs.ext4", &["-q", "-F", &device.0]);
        let tree = it.daemon.path("tree");
        std::fs::create_dir(&tree).unwrap();
        let tree = tree.to_str().unwrap();
        run("mount", &[&device.0, tree]);
        let source = source();
        let copy = format!("{tree}/copy");
        run("cp", &["--sparse=always", source.str(), &copy]);
        run("sync", &[&copy]);
        let sum = checksum_file(std::path::Path::new(&copy));
        run("umount", &[tree]);
        assert_eq!(sum, checksum_file(source.path()));
        run("fsck.ext4", &["-f", "-n", &device.0]);
        drop(device);
        let model = TempImage::zeroes(0);
        run("cp", &["--sparse=always", &disk, model.str()]);
        it.ends_as(&model);
    });
}
