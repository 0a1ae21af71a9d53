//! Holes inside a read: which chunks a reply has, beside QEMU's server, and whether they are true.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use outport_tests::nbd::wire::{chunk, cmd, cmd_flag};
use outport_tests::nbd::{Chunk, Client};
use outport_tests::{Daemon, Server, TempImage, assert_same, pattern, requires};
use serde_json::{Value, json};

use super::{Disk, MIB};

const KIB: usize = 1 << 10;

/// A chunk's range, and whether it is a hole.
type Shape = (u64, u64, bool);

fn shape(chunk: &Chunk) -> Shape {
    let number = |at: usize, len: usize| {
        let bytes = &chunk.data[at..at + len];
        bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
    };
    match chunk.kind {
        chunk::OFFSET_DATA => (number(0, 8), chunk.data.len() as u64 - 8, false),
        chunk::OFFSET_HOLE => (number(0, 8), number(8, 4), true),
        other => panic!("chunk type {other:x} in a read reply"),
    }
}

fn chunks(client: &mut Client, flags: u16, offset: usize, len: usize) -> Vec<Shape> {
    let request = client.request(flags, cmd::READ, offset as u64, len as u32);
    client.send(&request, &[]).expect("it is connected");
    let chunks = client.chunks().expect("a structured reply");
    chunks.iter().map(shape).collect()
}

/// In order, neighbours of one kind joined: how a server cuts them is its own affair.
fn joined(mut chunks: Vec<Shape>) -> Vec<Shape> {
    chunks.sort_unstable();
    let mut joined: Vec<Shape> = Vec::new();
    for (at, len, zero) in chunks {
        match joined.last_mut() {
            Some(last) if last.2 == zero && last.0 + last.1 == at => last.1 += len,
            _ => joined.push((at, len, zero)),
        }
    }
    joined
}

#[test]
fn a_hole_inside_a_read_travels_without_its_zeroes() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    let mib = MIB as u64;
    let whole = [
        (0, 2 * mib, false),
        (2 * mib, mib, true),
        (3 * mib, mib, false),
    ];
    assert_eq!(chunks(&mut client, 0, 0, 4 * MIB), whole);
    let one = chunks(&mut client, cmd_flag::DF, 0, 4 * MIB);
    assert_eq!(one, [(0, 4 * mib, false)], "DF is one chunk");
    let read = client.read(0, 4 * MIB as u32).unwrap().unwrap();
    assert_same(&read, &disk.content, "with holes");
}

#[test]
fn a_trimmed_range_is_a_hole_of_the_next_read_and_a_written_one_is_not() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    let (at, len) = (512 * KIB as u64, 64 * KIB as u64);
    chunks(&mut client, 0, 0, MIB);
    let trimmed = client.command(0, cmd::TRIM, at, len as u32, &[]).unwrap();
    assert_eq!(trimmed, Ok(()));
    let mib = MIB as u64;
    let around = [
        (0, at, false),
        (at, len, true),
        (at + len, mib - at - len, false),
    ];
    assert_eq!(chunks(&mut client, 0, 0, MIB), around);
    assert_eq!(client.write(at, &[7; 64 * KIB]).unwrap(), Ok(()));
    assert_eq!(chunks(&mut client, 0, 0, MIB), [(0, mib, false)]);
}

/// More pieces than a reply has chunks.
#[test]
fn a_range_of_countless_holes_is_read_right() {
    let len = 16 * MIB;
    let mut content = pattern(len, 5);
    let image = TempImage::zeroes(len as u64);
    let file = OpenOptions::new().write(true).open(image.path()).unwrap();
    for at in (0..len).step_by(64 * KIB) {
        content[at + 32 * KIB..at + 64 * KIB].fill(0);
        file.write_all_at(&content[at..at + 32 * KIB], at as u64)
            .unwrap();
    }
    let mut daemon = Daemon::start();
    daemon.serve("disk", &image);
    let mut client = daemon.client("disk");
    for at in [0, 96 * KIB] {
        let read = client.read(at as u64, (len - at) as u32).unwrap().unwrap();
        assert_same(&read, &content[at..], "many holes");
    }
    assert!(chunks(&mut client, 0, 0, len).iter().any(|it| it.2));
}

/// Whole clusters of data, zero clusters, and nothing.
fn fill(image: &TempImage, commands: &[&str]) {
    let mut io = Command::new("qemu-io");
    for command in commands {
        io.args(["-c", command]);
    }
    let done = io.args(["-f", image.format(), image.str()]).output();
    let done = done.expect("qemu-io runs");
    assert!(done.status.success(), "{done:?}");
}

fn node(image: &TempImage, backing: Option<Value>) -> Value {
    let file = json!({"driver": "file", "filename": image.str()});
    match (image.format(), backing) {
        ("raw", _) => json!({"driver": "raw", "file": file}),
        (format, backing) => json!({"driver": format, "file": file, "backing": backing}),
    }
}

/// A sparse file, an image with holes, and chains over both, shorter ones too: what is asked to be
/// exported, by name.
fn graphs() -> (Vec<TempImage>, Vec<(&'static str, Value)>) {
    let raw = TempImage::zeroes(4 * MIB as u64);
    fill(
        &raw,
        &[
            "write -P 7 0 64k",
            "write -P 7 128k 4k",
            "write -P 7 1M 1M",
            "write -P 0 2M 64k",
        ],
    );
    let plain = TempImage::qcow2(4 * MIB as u64, "");
    fill(
        &plain,
        &[
            "write -P 7 0 64k",
            "write -P 7 128k 64k",
            "write -P 7 1M 1M",
            "write -z 2M 64k",
            "write -P 7 3M 64k",
            "discard 1536k 64k",
        ],
    );
    let base = TempImage::qcow2(2 * MIB as u64, "");
    fill(&base, &["write -P 1 0 64k", "write -P 1 512k 64k"]);
    let middle = TempImage::qcow2(4 * MIB as u64, "");
    fill(
        &middle,
        &[
            "write -P 2 64k 64k",
            "write -z 512k 64k",
            "write -P 2 2M 64k",
        ],
    );
    let top = TempImage::qcow2(4 * MIB as u64, "");
    fill(&top, &["write -P 3 256k 64k", "write -P 3 3M 64k"]);
    let below = node(&middle, Some(node(&base, None)));
    let graphs = vec![
        ("raw", node(&raw, None)),
        ("plain", node(&plain, None)),
        ("chain", node(&top, Some(below))),
        ("over-raw", node(&top, Some(node(&raw, None)))),
    ];
    (vec![raw, plain, base, middle, top], graphs)
}

/// The chunks of every read of every graph. Each graph is read cold first.
fn shapes(server: Server, graphs: &[(&str, Value)]) -> Vec<(String, Vec<Shape>)> {
    let reads = [
        (0, MIB),
        (0, MIB),
        (MIB, MIB),
        (2 * MIB, MIB),
        (0, 4 * MIB),
        (96 * KIB, 64 * KIB),
        (0, 160 * KIB),
        (130 * KIB, 16 * KIB),
        (64 * KIB - 3, 17 * KIB),
    ];
    let mut all = Vec::new();
    for (name, graph) in graphs {
        let mut daemon = Daemon::builder(server).nbd().start();
        let mut graph = graph.clone();
        graph["node-name"] = json!("disk");
        daemon.qmp.ok("blockdev-add", graph);
        daemon.add_export("disk", false);
        let mut client = daemon.client("disk");
        for (offset, len) in reads {
            let what = format!("{name}: {offset}+{len}");
            all.push((what, joined(chunks(&mut client, 0, offset, len))));
        }
    }
    all
}

#[test]
fn holes_are_told_where_qemu_tells_them() {
    if !requires("qemu-storage-daemon") || !requires("qemu-io") {
        return;
    }
    let (_images, graphs) = graphs();
    let [theirs, ours] = [Server::Qsd, Server::Outport].map(|it| shapes(it, &graphs));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs, ours);
    }
}

/// One client fills a hole block by block while another reads: what was acknowledged before a read
/// began is no hole of it.
fn holes_are_true(image: &TempImage) {
    const BLOCK: usize = 16 * KIB;
    const LEN: usize = 8 * MIB;
    let mut daemon = Daemon::start();
    daemon.serve("disk", image);
    let (mut writer, mut reader) = (daemon.client("disk"), daemon.client("disk"));
    let written = AtomicUsize::new(0);
    // Neighbours are far apart in time, so that there are holes everywhere to the end.
    let order = |n: usize| (n * 37) % (LEN / BLOCK);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..LEN / BLOCK {
                let block = vec![1 + (n % 255) as u8; BLOCK];
                let at = (order(n) * BLOCK) as u64;
                assert_eq!(writer.write(at, &block).expect("an answer"), Ok(()));
                written.store(n + 1, Ordering::Release);
            }
        });
        let mut done = 0;
        while done < LEN / BLOCK {
            done = written.load(Ordering::Acquire);
            for at in (0..LEN).step_by(MIB) {
                let read = reader
                    .read(at as u64, MIB as u32)
                    .expect("an answer")
                    .expect("bytes");
                for n in (0..done).filter(|n| (at..at + MIB).contains(&(order(*n) * BLOCK))) {
                    let start = order(n) * BLOCK - at;
                    let wanted = [1 + (n % 255) as u8; BLOCK];
                    assert_same(
                        &read[start..start + BLOCK],
                        &wanted,
                        "a write acknowledged before",
                    );
                }
            }
        }
    });
}

#[test]
fn a_write_is_no_hole_of_a_later_read() {
    holes_are_true(&TempImage::zeroes(8 * MIB as u64));
}

#[test]
fn a_write_to_an_image_is_no_hole_of_a_later_read() {
    if requires("qemu-img") {
        holes_are_true(&TempImage::qcow2(8 * MIB as u64, "cluster_size=16k"));
    }
}
