//! Random requests against a model, and `qemu-img check` as the judge.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "host/mod.rs"]
mod host;
#[path = "node/mod.rs"]
mod node;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use node::{Node, Rng, qemu_img, qemu_io};
use outport_sdk::{ByteRange, DiscardKind, WritableFormat, WriteIntent, WriteKind};

/// An image made by qemu-img, and what belongs to it.
struct Case {
    dir: tempfile::TempDir,
    data_file: Option<PathBuf>,
    backing: Option<PathBuf>,
    zstd: bool,
}

impl Case {
    fn new(options: &str, size: u64) -> Self {
        Self::make(options, size, None)
    }

    fn make(options: &str, size: u64, backing_size: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut case = Self {
            dir,
            data_file: None,
            backing: None,
            zstd: options.contains("zstd"),
        };
        let mut options = options.to_owned();
        if options.contains("data_file=x") {
            let data = case.dir.path().join("data.raw");
            options = options.replace("data_file=x", &format!("data_file={}", data.display()));
            case.data_file = Some(data);
        }
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let base = case.dir.path().join("base.img");
        if let Some(size) = backing_size {
            let mut rng = Rng(size);
            let content: Vec<u8> = (0..size).map(|_| rng.next() as u8 | 1).collect();
            fs::write(&base, content).unwrap();
            case.backing = Some(base.clone());
            args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
        }
        let (image, size) = (case.image(), size.to_string());
        args.extend([image.to_str().unwrap(), &size]);
        qemu_img(&args);
        case
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    fn open(&self, options: &str) -> Node {
        let mut files = vec![fs::read(self.image()).unwrap()];
        files.extend(self.data_file.iter().map(|p| fs::read(p).unwrap()));
        let backing = self.backing.as_ref().map(|p| fs::read(p).unwrap());
        Node::open(files, backing, options, true).unwrap()
    }

    fn snapshot(&self, name: &str) {
        qemu_img(&["snapshot", "-c", name, self.image().to_str().unwrap()]);
    }

    fn snapshot_content(&self, name: &str) -> Vec<u8> {
        let out = self.dir.path().join("snapshot.raw");
        let (image, to) = (self.image(), out.clone());
        let (image, to) = (image.to_str().unwrap(), to.to_str().unwrap());
        qemu_img(&["convert", "-l", name, "-O", "raw", image, to]);
        fs::read(out).unwrap()
    }

    /// Close the node; qemu-img finds no error, no leak, and the same bytes.
    fn judge(&self, node: Node, model: &[u8]) {
        self.save(&node.close().unwrap());
        self.judge_file(model);
    }

    fn save(&self, files: &[Vec<u8>]) {
        fs::write(self.image(), &files[0]).unwrap();
        if let Some(path) = &self.data_file {
            fs::write(path, &files[1]).unwrap();
        }
    }

    fn judge_file(&self, model: &[u8]) {
        let image = self.image();
        let path = image.to_str().unwrap();
        qemu_img(&["check", "-q", path]);
        assert!(content(&image) == model, "qemu-img reads other bytes");
    }
}

fn content(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    fs::read(raw).unwrap()
}

/// Random requests; `model` follows.
fn play(node: &mut Node, model: &mut Vec<u8>, zstd: bool, seed: u64, rounds: u32) {
    let mut rng = Rng(seed);
    let cluster = u64::from(node.geometry.cluster_size);
    for round in 0..rounds {
        let size = model.len() as u64;
        match rng.below(10) {
            0..5 => {
                // A queue of requests that do not overlap, most of them small.
                let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
                let start = rng.below(size / 512) * 512;
                let mut at = start;
                for _ in 0..rng.below(12) + 1 {
                    let max = if rng.below(6) == 0 { 5 * cluster } else { 8192 };
                    let len = (rng.below(max / 512) + 1) * 512;
                    let len = len.min(size - at);
                    if len == 0 {
                        break;
                    }
                    let byte = rng.next() as u8;
                    writes.push((at, vec![byte; len as usize]));
                    at += len;
                    if rng.below(2) == 0 {
                        at = (at + rng.below(3 * cluster / 512) * 512).min(size);
                    }
                }
                if rng.below(2) == 0 {
                    writes.reverse();
                }
                node.write_all(&writes, &mut rng).unwrap();
                for (offset, data) in writes {
                    model[offset as usize..][..data.len()].copy_from_slice(&data);
                }
            }
            kind @ 5..8 => discard(node, model, &mut rng, kind),
            8 => compress(node, model, zstd, &mut rng),
            _ => node.flush().unwrap(),
        }
        if round % 16 == 0 {
            assert!(node.content() == *model, "round {round} of seed {seed}");
        }
    }
    assert!(node.content() == *model);
    assert!(
        node.host.corruptions.borrow().is_empty(),
        "{:?}",
        node.host.corruptions
    );
}

fn discard(node: &mut Node, model: &mut [u8], rng: &mut Rng, kind: u64) {
    let (kind, granularity) = match kind {
        5 => (DiscardKind::Discard, node.geometry.discard_granularity),
        6 => (DiscardKind::ZeroUnmap, node.geometry.zero_granularity),
        _ => (DiscardKind::ZeroKeep, node.geometry.zero_granularity),
    };
    if granularity == 0 {
        return;
    }
    let size = model.len() as u64;
    let g = u64::from(granularity);
    let offset = rng.below(size.div_ceil(g)) * g;
    let len = ((rng.below(20) + 1) * g).min(size - offset);
    let possible = node.discard(ByteRange::new(offset, len), kind).unwrap();
    let part = &mut model[offset as usize..][..len as usize];
    if kind == DiscardKind::Discard || !possible {
        let now = node.read(offset, len as usize).unwrap();
        for (old, new) in part.iter_mut().zip(now) {
            assert!(new == 0 || new == *old);
            *old = new;
        }
    } else {
        part.fill(0);
    }
}

fn compress(node: &mut Node, model: &mut [u8], zstd: bool, rng: &mut Rng) {
    if node.host.files.len() > 1 {
        return; // no compression with a data file
    }
    let size = model.len() as u64;
    let cluster = u64::from(node.geometry.cluster_size);
    for _ in 0..rng.below(6) + 1 {
        let offset = rng.below(size.div_ceil(cluster)) * cluster;
        let len = cluster.min(size - offset) as usize;
        let (a, b) = (rng.next() as u8, rng.below(200) + 1);
        let data: Vec<u8> = (0..len as u64)
            .map(|i| if i % b == 0 { i as u8 } else { a })
            .collect();
        if node.write_compressed(offset, &data, zstd).unwrap() {
            model[offset as usize..][..len].copy_from_slice(&data);
        }
    }
}

fn play_case(case: &Case, options: &str, seed: u64, rounds: u32) {
    let mut node = case.open(options);
    let mut model = content(&case.image());
    assert!(node.content() == model);
    play(&mut node, &mut model, case.zstd, seed, rounds);
    case.judge(node, &model);
    // And once more over what the plugin wrote.
    let mut node = case.open(options);
    play(&mut node, &mut model, case.zstd, seed + 1000, rounds);
    case.judge(node, &model);
}

#[test]
fn clusters_of_every_size() {
    for bits in 9..=21 {
        let cluster: u64 = 1 << bits;
        let size = (cluster * 50 + 512).clamp(1 << 20, 12 << 20);
        let case = Case::new(&format!("cluster_size={cluster}"), size);
        play_case(&case, "{}", bits, 60);
    }
}

#[test]
fn subclusters() {
    for bits in [14, 15, 16, 18, 21] {
        let cluster: u64 = 1 << bits;
        let size = (cluster * 50 + 512).clamp(1 << 20, 12 << 20);
        let case = Case::new(&format!("cluster_size={cluster},extended_l2=on"), size);
        play_case(&case, "{}", bits, 120);
    }
}

#[test]
fn refcounts_of_every_width() {
    for bits in [1, 2, 4, 8, 32, 64] {
        for cluster in [512, 4096] {
            let options = format!("refcount_bits={bits},cluster_size={cluster}");
            play_case(&Case::new(&options, 2 << 20), "{}", bits, 80);
        }
    }
}

#[test]
fn old_lazy_and_preallocated_images() {
    for options in [
        "compat=0.10,cluster_size=4096",
        "compat=0.10,cluster_size=512",
        "lazy_refcounts=on",
        "preallocation=metadata,cluster_size=8k",
        "preallocation=full,cluster_size=8k",
    ] {
        play_case(&Case::new(options, 3 << 20), "{}", 3, 80);
        play_case(
            &Case::new(options, 3 << 20),
            r#"{"discard-no-unref": true}"#,
            4,
            80,
        );
    }
}

#[test]
fn backing_files() {
    for backing_size in [1000 * 512, 1 << 20, 5 << 20] {
        for options in [
            "cluster_size=4k",
            "cluster_size=64k,extended_l2=on",
            "compat=0.10,cluster_size=4k",
            "cluster_size=512",
            "compression_type=zstd",
        ] {
            play_case(
                &Case::make(options, 3 << 20, Some(backing_size)),
                "{}",
                5,
                80,
            );
        }
    }
}

#[test]
fn external_data_files() {
    for options in [
        "data_file=x",
        "data_file=x,data_file_raw=on",
        "data_file=x,extended_l2=on,cluster_size=32k",
    ] {
        let case = Case::new(options, 3 << 20);
        play_case(&case, "{}", 6, 100);
        if options.contains("raw=on") {
            let raw = fs::read(case.data_file.as_ref().unwrap()).unwrap();
            assert!(
                raw == content(&case.image()),
                "the data file is not the raw image"
            );
        }
    }
}

#[test]
fn snapshots_keep_their_content() {
    for options in [
        "cluster_size=4k",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=512",
        "compat=0.10",
        "refcount_bits=8,cluster_size=4k,compression_type=zstd",
    ] {
        let case = Case::new(options, 2 << 20);
        let mut model = vec![0; 2 << 20];
        let mut kept = Vec::new();
        for i in 0..4 {
            let mut node = case.open("{}");
            play(&mut node, &mut model, case.zstd, i, 60);
            case.judge(node, &model);
            let name = format!("snap{i}");
            case.snapshot(&name);
            kept.push((name, model.clone()));
        }
        let mut node = case.open("{}");
        play(&mut node, &mut model, case.zstd, 77, 100);
        case.judge(node, &model);
        for (name, content) in &kept {
            assert!(case.snapshot_content(name) == *content, "{name} changed");
        }
        // Deleting them leaves an image without leaks.
        for (name, _) in &kept {
            qemu_img(&["snapshot", "-d", name, case.image().to_str().unwrap()]);
        }
        case.judge_file(&model);
        play_case(&case, "{}", 78, 60);
    }
}

#[test]
fn images_change_their_length() {
    for (options, backing) in [
        ("cluster_size=512", None),
        ("cluster_size=4k", None),
        ("cluster_size=16k,extended_l2=on", None),
        ("cluster_size=64k", Some(6 << 20)),
        ("cluster_size=4k", Some(2 << 20)),
        ("compat=0.10,cluster_size=4k", None),
        ("data_file=x", None),
        ("data_file=x,data_file_raw=on", None),
    ] {
        let case = Case::make(options, 1 << 20, backing);
        let mut node = case.open("{}");
        let mut model = content(&case.image());
        let mut rng = Rng(9);
        for i in 0..12 {
            play(&mut node, &mut model, false, 20 + i, 20);
            let size = (rng.below(12 << 20) + 512) & !511;
            node.resize(size).unwrap();
            model.resize(size as usize, 0);
            assert!(
                node.content() == model,
                "{options}: after resize {i} to {size}"
            );
        }
        case.judge(node, &model);
        if options.contains("raw=on") {
            let raw = fs::read(case.data_file.as_ref().unwrap()).unwrap();
            assert_eq!(raw.len(), model.len());
        }
    }
}

#[test]
fn an_image_with_snapshots_grows_but_does_not_shrink() {
    let case = Case::new("cluster_size=4k", 1 << 20);
    case.snapshot("one");
    let mut node = case.open("{}");
    assert!(
        node.resize(1 << 19)
            .unwrap_err()
            .message
            .contains("snapshots")
    );
    node.resize(9 << 20).unwrap();
    let mut model = vec![0; 9 << 20];
    play(&mut node, &mut model, false, 1, 50);
    case.judge(node, &model);
    assert!(case.snapshot_content("one").iter().all(|b| *b == 0));
}

#[test]
fn contiguous_requests_get_contiguous_clusters() {
    let case = Case::new("cluster_size=64k", 64 << 20);
    let mut node = case.open("{}");
    let mut rng = Rng(0);
    for i in 0..8_u64 {
        node.write_all(&[(i << 20, vec![1; 1 << 20])], &mut rng)
            .unwrap();
    }
    let extents = node.resolve(0).unwrap();
    assert!(extents.len() <= 12, "{} extents for 8 MiB", extents.len());
}

#[test]
fn what_cannot_be_opened_says_why() {
    let open = |case: &Case, writable| {
        let files = vec![fs::read(case.image()).unwrap()];
        Node::open(files, None, "{}", writable)
            .map(|_| ())
            .map_err(|e| e.message)
    };
    let case = Case::new("cluster_size=64k", 1 << 20);
    let path = case.image();
    qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "b0"]);
    open(&case, true).unwrap();
    open(&case, false).unwrap();

    let patch = |at: usize, byte: u8| {
        let mut bytes = fs::read(case.image()).unwrap();
        bytes[at] = byte;
        fs::write(case.image(), bytes).unwrap();
    };
    patch(95, 0); // bitmaps are no longer consistent
    open(&case, true).unwrap();
    patch(79, 2);
    assert!(open(&case, true).unwrap_err().contains("corrupt"));
    open(&case, false).unwrap();
    patch(79, 32);
    assert!(open(&case, false).unwrap_err().contains("bit 5"));
    patch(79, 0);
    patch(35, 2);
    assert!(open(&case, false).unwrap_err().contains("ncrypt"));
    patch(35, 0);
    // Unknown autoclear bits go, unknown compatible bits stay.
    patch(94, 0x80);
    patch(86, 0x80);
    let node = case.open("{}");
    assert_eq!(node.host.files[0][94], 0);
    assert_eq!(node.host.files[0][86], 0x80);
}

#[test]
fn a_zeroed_cluster_is_reused_in_place() {
    let case = Case::new("cluster_size=64k", 1 << 20);
    let mut node = case.open("{}");
    let mut rng = Rng(0);
    node.write_all(&[(0, vec![1; 65536])], &mut rng).unwrap();
    let before = node.resolve(0).unwrap()[0];
    node.discard(ByteRange::new(0, 65536), DiscardKind::ZeroKeep)
        .unwrap();
    assert_eq!(node.read(0, 512).unwrap(), vec![0; 512]);
    node.write_all(&[(512, vec![2; 512])], &mut rng).unwrap();
    assert_eq!(node.resolve(0).unwrap()[0].at, before.at);
    let mut model = vec![0; 1 << 20];
    model[512..1024].fill(2);
    case.judge(node, &model);
}

#[test]
fn writes_into_a_cluster_that_moves_wait_for_the_move() {
    let case = Case::new("cluster_size=64k,extended_l2=on", 1 << 20);
    qemu_io(&case.image(), &["write -P 1 0 4k".into()]);
    case.snapshot("one");
    let mut node = case.open("{}");
    let intent = |offset| WriteIntent {
        range: ByteRange::new(offset, 2048),
        kind: WriteKind::Data,
        stored_len: 0,
    };
    // Both want a place in the copy of the cluster; the first brings its content
    // along, so the second must not be mapped without it.
    let (image, host) = (&mut node.image, &mut node.host);
    let intents = [intent(8192), intent(32768)];
    let first = host.call(|txn| image.prepare_write(txn, &intents)).unwrap();
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].covers, ByteRange::new(0, 8192 + 2048));
    host.call(|txn| image.abort_write(txn, &[first[0].token]))
        .unwrap();
    let mut model = vec![0; 1 << 20];
    model[..4096].fill(1);
    assert!(node.content() == model);
    // Nothing moves in a new cluster: both get their place at once.
    let (image, host) = (&mut node.image, &mut node.host);
    let intents = [intent(1 << 19), intent((1 << 19) + 32768)];
    let both = host.call(|txn| image.prepare_write(txn, &intents)).unwrap();
    assert_eq!(both[1].offset, both[0].offset + 32768);
    for p in &both {
        host.payload(p.slot, p.offset, &[7; 2048]);
        model[p.covers.offset as usize..][..2048].fill(7);
    }
    host.call(|txn| image.commit_write(txn, &[both[1].token]))
        .unwrap();
    host.call(|txn| image.commit_write(txn, &[both[0].token]))
        .unwrap();
    case.judge(node, &model);
}

#[test]
fn qemu_goes_on_where_the_plugin_stopped() {
    let case = Case::new("cluster_size=4k,compression_type=zstd", 2 << 20);
    let mut model = vec![0; 2 << 20];
    for i in 0..3 {
        let mut node = case.open("{}");
        play(&mut node, &mut model, true, 40 + i, 60);
        case.judge(node, &model);
        qemu_io(
            &case.image(),
            &["write -P 5 100k 200k".into(), "write -z 600k 64k".into()],
        );
        model[100 << 10..300 << 10].fill(5);
        model[600 << 10..664 << 10].fill(0);
        case.judge_file(&model);
    }
}

/// A number for people: `cargo test --release --test write -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn random_allocating_writes_cost_little() {
    let case = Case::new("cluster_size=64k", 8 << 30);
    let mut node = case.open("{}");
    let (image, host) = (&mut node.image, &mut node.host);
    let mut rng = Rng(1);
    let mut seen = std::collections::HashSet::new();
    let (mut prepare, mut commit, mut resolve) = (0, 0, 0);
    for _ in 0..1000 {
        let mut intents = Vec::new();
        while intents.len() < 32 {
            let cluster = rng.below(8 << 14);
            if seen.insert(cluster) {
                let range = ByteRange::new(cluster << 16, 4096);
                intents.push(WriteIntent {
                    range,
                    kind: WriteKind::Data,
                    stored_len: 0,
                });
            }
        }
        let start = Instant::now();
        let placements = host.call(|txn| image.prepare_write(txn, &intents)).unwrap();
        prepare += start.elapsed().as_nanos();
        let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
        assert_eq!(tokens.len(), 32);
        let start = Instant::now();
        host.call(|txn| image.commit_write(txn, &tokens)).unwrap();
        commit += start.elapsed().as_nanos();
        let start = Instant::now();
        outport_sdk::Format::resolve(image, host, intents[0].range).unwrap();
        resolve += start.elapsed().as_nanos();
    }
    println!(
        "prepare {} ns, commit {} ns an intent; resolve {} ns",
        prepare / 32_000,
        commit / 32_000,
        resolve / 1000
    );
}
