//! Damaged images: our report against that of `qemu-img check`, and what our
//! repair leaves.
#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod disk;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use disk::{Host, Rng, ok, qemu_check, requires, run};
use outport_plugin_qcow2::Qcow2;
use outport_sdk::{
    CheckReport, Files, Format, Grant, Granted, Repair, Result, SlotRange, Stage, WritableFormat,
};
use serde_json::Value;

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

const NONE: Repair = Repair {
    leaks: false,
    errors: false,
};
const ALL: Repair = Repair {
    leaks: true,
    errors: true,
};

/// A whole check, slice by slice.
fn check(image: &Path, fix: Repair) -> Result<CheckReport> {
    let data = image.with_file_name("d.raw");
    let mut paths = vec![image];
    if data.exists() {
        paths.push(&data);
    }
    let mut host = Host::open(&paths);
    let writable = fix != NONE;
    let (mut node, children) = Qcow2::open(&host, "{}", writable)?;
    let grants: Vec<Grant> = children
        .into_iter()
        .map(|child| Grant {
            what: if child.id == "data-file" {
                Granted::Slot(1)
            } else {
                Granted::None
            },
            id: child.id,
        })
        .collect();
    if writable {
        host.call(|txn| node.activate_writable(txn, &grants))?;
    } else {
        node.activate(&host, &grants)?;
    }
    let mut cursor = 0;
    loop {
        let (report, next) = host.call(|txn| node.check(txn, fix, cursor))?;
        match next {
            None => {
                give_back(&mut host, &mut node, fix)?;
                return Ok(report);
            }
            Some(next) => {
                assert!(next > cursor, "the cursor went from {cursor} to {next}");
                assert!(*host.read_bytes.borrow() <= 20 << 20);
                cursor = next;
            }
        }
    }
}

/// A repair frees the tables that it moved; everything is durable here.
fn give_back(host: &mut Host, node: &mut Qcow2, fix: Repair) -> Result<()> {
    if fix == NONE {
        return Ok(());
    }
    let freed: Vec<SlotRange> = host
        .freed
        .drain(..)
        .map(|(slot, range)| SlotRange { slot, range })
        .collect();
    host.call(|txn| node.reclaim(txn, &freed))
}

/// The numbers that `qemu-img check` prints.
fn numbers(report: &CheckReport) -> [u64; 8] {
    [
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.image_end,
        report.total_clusters,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
    ]
}

fn qemu_numbers(report: &Value) -> [u64; 8] {
    [
        "corruptions",
        "leaks",
        "check-errors",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ]
    .map(|name| report.get(name).and_then(Value::as_u64).unwrap_or(0))
}

// === images ===

/// An image in a folder of its own, and what damages it.
struct Image {
    dir: tempfile::TempDir,
    path: PathBuf,
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
}

impl Image {
    fn create(options: &str, size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(["image", size]);
        ok(dir.path(), "qemu-img", &args);
        let path = dir.path().join("image");
        let extended = options.contains("extended_l2=on");
        let mut image = Self {
            dir,
            path,
            cluster_bits: 0,
            refcount_order: 4,
            extended,
        };
        image.cluster_bits = image.u32(20);
        if image.u32(4) == 3 {
            image.refcount_order = image.u32(96);
        }
        image
    }

    /// Random content through QEMU.
    fn scribble(&mut self, rng: &mut Rng, size: u64, snapshots: bool) {
        let cluster = 1 << self.cluster_bits;
        let data_file = self.dir.path().join("d.raw").exists();
        for round in 0..2 {
            let mut commands = Vec::new();
            for i in 0..12 {
                let len = (rng.below(4 * cluster / 512) + 1) * 512;
                let offset = rng.below((size - len) / 512) * 512;
                commands.push(match rng.below(8) {
                    0 => format!("write -z {offset} {len}"),
                    1 => format!("discard {offset} {len}"),
                    2 | 3 if !data_file => {
                        let offset = rng.below(size / cluster) * cluster;
                        format!("write -c -P {} {offset} {cluster}", i + 1)
                    }
                    _ => format!("write -P {} {offset} {len}", i + 1),
                });
            }
            // A compressed write over an allocated cluster is refused: let it be.
            let mut args = vec!["-t", "unsafe", "-f", "qcow2"];
            args.extend(commands.iter().flat_map(|c| ["-c", c.as_str()]));
            args.push("image");
            run(self.dir.path(), "qemu-io", &args);
            if snapshots && round == 0 && !data_file {
                // Refused where a reference count is too narrow for it.
                run(
                    self.dir.path(),
                    "qemu-img",
                    &["snapshot", "-c", "s1", "image"],
                );
            }
        }
    }

    fn u32(&self, at: u64) -> u32 {
        let host = Host::open(&[&self.path]);
        u32::from_be_bytes(host.read(0, at, 4).unwrap().try_into().unwrap())
    }

    fn u64(&self, at: u64) -> u64 {
        let host = Host::open(&[&self.path]);
        u64::from_be_bytes(host.read(0, at, 8).unwrap().try_into().unwrap())
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let mut host = Host::open(&[&self.path]);
        host.call(|txn| txn.write(0, Stage::Prepare, at, bytes))
            .unwrap();
    }

    fn put(&self, at: u64, value: u64) {
        self.write(at, &value.to_be_bytes());
    }

    fn clusters(&self) -> u64 {
        fs::metadata(&self.path)
            .unwrap()
            .len()
            .div_ceil(1 << self.cluster_bits)
    }

    fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// L1 entries in use, by offset in the file.
    fn l1_entries(&self) -> Vec<u64> {
        let (offset, len) = (self.u64(40), u64::from(self.u32(36)));
        (0..len)
            .map(|i| offset + i * 8)
            .filter(|at| self.u64(*at) != 0)
            .collect()
    }

    /// L2 entries in use: offset in the file, and guest cluster.
    fn l2_entries(&self) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let per_table = (1 << self.cluster_bits) / self.entry_size();
        let l1 = self.u64(40);
        let host = Host::open(&[&self.path]);
        for at in self.l1_entries() {
            let table = self.u64(at) & OFFSET;
            let bytes = host.read(0, table, 1 << self.cluster_bits).unwrap();
            for i in 0..per_table {
                let entry = &bytes[(i * self.entry_size()) as usize..][..8];
                if entry.iter().any(|b| *b != 0) {
                    found.push((table + i * self.entry_size(), (at - l1) / 8 * per_table + i));
                }
            }
        }
        found
    }

    fn set_refcount(&self, cluster: u64, value: u64) {
        let per_block = (8 << self.cluster_bits) >> self.refcount_order;
        let block = self.u64(self.u64(48) + cluster / per_block * 8);
        if block == 0 {
            return;
        }
        let bit = (cluster % per_block) << self.refcount_order;
        if self.refcount_order >= 3 {
            let width = 1 << (self.refcount_order - 3);
            self.write(block + bit / 8, &value.to_be_bytes()[8 - width..]);
        } else {
            let host = Host::open(&[&self.path]);
            let old = host.read(0, block + bit / 8, 1).unwrap()[0];
            let mask = ((1_u16 << (1 << self.refcount_order)) - 1) as u8;
            let new = old & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
            self.write(block + bit / 8, &[new]);
        }
    }

    /// One random damage; the guest clusters whose content it may change.
    fn damage(&self, rng: &mut Rng, kinds: u64) -> (String, Vec<u64>) {
        let entries = self.l2_entries();
        let (at, guest) = entries[rng.below(entries.len() as u64) as usize];
        let entry = self.u64(at);
        let compressed = entry >> 62 & 1 != 0;
        let has_host = entry & OFFSET != 0 && !compressed;
        let tables = self.l1_entries();
        let table = tables[rng.below(tables.len() as u64) as usize];
        match rng.below(kinds) {
            0..=3 => {
                let cluster = rng.below(self.clusters());
                let max = (1_u128 << (1 << self.refcount_order)) - 1;
                let value = rng.below(4).min(max as u64);
                self.set_refcount(cluster, value);
                (format!("refcount of {cluster} = {value}"), vec![])
            }
            4 | 5 if has_host => {
                self.put(at, entry ^ COPIED);
                (format!("COPIED of {at:#x}"), vec![])
            }
            6 => {
                self.put(table, self.u64(table) ^ COPIED);
                (format!("COPIED of L1 {table:#x}"), vec![])
            }
            7 => {
                self.put(at, 0);
                if self.extended {
                    self.put(at + 8, 0);
                }
                (format!("entry {at:#x} lost"), vec![guest])
            }
            8 | 9 => {
                let (other, _) = entries[rng.below(entries.len() as u64) as usize];
                self.put(at, self.u64(other));
                if self.extended {
                    self.put(at + 8, self.u64(other + 8));
                }
                (format!("entry {at:#x} = that of {other:#x}"), vec![guest])
            }
            10 if has_host => {
                self.put(at, entry | 1 << (56 + rng.below(6)));
                (format!("reserved bits of {at:#x}"), vec![])
            }
            11 => {
                self.put(table, self.u64(table) | 1 << (56 + rng.below(6)));
                (format!("reserved bits of L1 {table:#x}"), vec![])
            }
            12 if has_host && self.cluster_bits > 9 => {
                self.put(at, entry | 0x200);
                (format!("entry {at:#x} not aligned"), vec![guest])
            }
            13 if has_host => {
                self.put(at, entry | 1 << 44);
                (format!("entry {at:#x} outside"), vec![guest])
            }
            14 if has_host && self.extended => {
                self.put(at + 8, self.u64(at + 8) | 0x1_0000_0001);
                (format!("bitmap of {at:#x}"), vec![guest])
            }
            15 => {
                self.put(self.u64(48), 0);
                ("refcount block 0 lost".to_owned(), vec![])
            }
            16 => {
                self.put(self.u64(48), 1 << 40);
                ("refcount block 0 outside".to_owned(), vec![])
            }
            _ => ("nothing".to_owned(), vec![]),
        }
    }

    fn content(&self) -> Vec<u8> {
        let args = [
            "convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw", "image", "raw",
        ];
        ok(self.dir.path(), "qemu-img", &args);
        fs::read(self.dir.path().join("raw")).unwrap()
    }

    /// QEMU finds nothing wrong any more, and neither do we.
    fn assert_sound(&self, context: &str) {
        let (code, report) = qemu_check(self.dir.path(), "image").expect(context);
        assert_eq!(code, 0, "{context}: {report}");
        let ours = check(&self.path, NONE).unwrap();
        assert_eq!(
            numbers(&ours),
            qemu_numbers(&report),
            "{context}: {:?}",
            ours.messages
        );
    }
}

/// Images of each variant that a test damages. (A run with 12 found no more.)
const SEEDS: u64 = 3;

const VARIANTS: [&str; 12] = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=2M",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=4096,refcount_bits=2",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=4096,refcount_bits=64",
    "extended_l2=on,cluster_size=16k",
    "data_file=d.raw,cluster_size=4096",
    "compression_type=zstd,cluster_size=4096,preallocation=metadata",
];

fn image_of(variant: &str, rng: &mut Rng) -> (Image, u64) {
    // Several L2 tables, and small ones where that needs little.
    let size = if variant.contains("cluster_size=512") {
        3 << 20
    } else {
        24 << 20
    };
    let mut image = Image::create(variant, &size.to_string());
    let snapshots = !["refcount_bits=1", "refcount_bits=2"]
        .iter()
        .any(|v| variant.ends_with(v))
        && rng.below(2) == 0;
    image.scribble(rng, size, snapshots);
    (image, size)
}

// === tests ===

#[test]
fn sound_images_are_reported_as_qemu_reports_them() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for (variant, seed) in VARIANTS.into_iter().zip(1..) {
        let (image, _) = image_of(variant, &mut Rng::new(seed));
        image.assert_sound(&format!("{variant} seed {seed}"));
    }
}

#[test]
fn damage_is_reported_as_qemu_reports_it() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mut compared = 0_u64;
    for (variant, first) in VARIANTS.into_iter().zip((0..).step_by(1000)) {
        for seed in first..first + SEEDS {
            let mut rng = Rng::new(seed);
            let (image, _) = image_of(variant, &mut rng);
            let count = 1 + rng.below(3);
            let damages: Vec<_> = (0..count).map(|_| image.damage(&mut rng, 17).0).collect();
            let context = format!("{variant:?} seed {seed}: {damages:?}");
            // Where QEMU gives up there is nothing to compare.
            let Some((code, theirs)) = qemu_check(image.dir.path(), "image") else {
                continue;
            };
            if theirs
                .get("check-errors")
                .and_then(Value::as_u64)
                .unwrap_or(0)
                > 0
            {
                continue;
            }
            let ours = check(&image.path, NONE).unwrap();
            let verdict = match (ours.corruptions, ours.leaks) {
                (0, 0) => 0,
                (0, _) => 3,
                _ => 2,
            };
            assert_eq!(
                numbers(&ours),
                qemu_numbers(&theirs),
                "{context}: {:#?}",
                ours.messages
            );
            assert_eq!(verdict, code, "{context}");
            compared += 1;
        }
    }
    assert!(
        compared > VARIANTS.len() as u64 * SEEDS / 2,
        "only {compared} images were comparable"
    );
}

#[test]
fn repaired_images_are_sound_and_keep_their_content() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for (variant, first) in VARIANTS.into_iter().zip((500..).step_by(1000)) {
        for seed in first..first + SEEDS {
            let mut rng = Rng::new(seed);
            let (image, size) = image_of(variant, &mut rng);
            let before = image.content();
            let mut changed = BTreeSet::new();
            let mut damages = Vec::new();
            // One reference too many cannot be stored in one bit.
            let kinds = if image.refcount_order == 0 { 8 } else { 17 };
            for _ in 0..1 + rng.below(4) {
                let (what, guest) = image.damage(&mut rng, kinds);
                damages.push(what);
                changed.extend(guest);
            }
            let context = format!("{variant:?} seed {seed}: {damages:?}");
            let report = check(&image.path, ALL).unwrap();
            assert_eq!(report.check_errors, 0, "{context}");
            let found = (report.corruptions, report.leaks);
            let fixed = (report.corruptions_fixed, report.leaks_fixed);
            assert_eq!(found, fixed, "{context}: {:#?}", report.messages);
            image.assert_sound(&context);
            let after = image.content();
            let cluster = 1_usize << image.cluster_bits;
            for guest in 0..(size as usize / cluster) {
                if !changed.contains(&(guest as u64)) {
                    let range = guest * cluster..(guest + 1) * cluster;
                    assert!(
                        before[range.clone()] == after[range],
                        "{context}: cluster {guest}"
                    );
                }
            }
        }
    }
}

#[test]
fn leaks_alone_can_be_mended() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for seed in 1..8 {
        let mut rng = Rng::new(seed);
        let (image, _) = image_of("cluster_size=4096", &mut rng);
        for _ in 0..4 {
            image.damage(&mut rng, 10);
        }
        let copy = image.dir.path().join("copy");
        fs::copy(&image.path, &copy).unwrap();
        check(
            &image.path,
            Repair {
                leaks: true,
                errors: false,
            },
        )
        .unwrap();
        run(
            image.dir.path(),
            "qemu-img",
            &["check", "-f", "qcow2", "-r", "leaks", "copy"],
        );
        // QEMU leaves some leaks where it finds errors too.
        let ours = qemu_numbers(&qemu_check(image.dir.path(), "image").unwrap().1);
        let theirs = qemu_numbers(&qemu_check(image.dir.path(), "copy").unwrap().1);
        assert!(ours[0] <= theirs[0], "seed {seed}: {ours:?} {theirs:?}");
        assert_eq!(ours[1], 0, "seed {seed}: {ours:?} {theirs:?}");
    }
}

#[test]
fn a_file_that_was_cut_off_is_mended() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    for seed in 1..8 {
        let mut rng = Rng::new(seed);
        let (image, _) = image_of("cluster_size=4096", &mut rng);
        let len = fs::metadata(&image.path).unwrap().len();
        let left = len - rng.below(len / 2);
        fs::OpenOptions::new()
            .write(true)
            .open(&image.path)
            .unwrap()
            .set_len(left)
            .unwrap();
        // Snapshot tables lie near the end: without them nobody opens the image.
        let Some((_, theirs)) = qemu_check(image.dir.path(), "image") else {
            continue;
        };
        let Ok(ours) = check(&image.path, NONE) else {
            continue;
        };
        assert_eq!(
            numbers(&ours),
            qemu_numbers(&theirs),
            "seed {seed}: {:#?}",
            ours.messages
        );
        let report = check(&image.path, ALL).unwrap();
        if report.corruptions == report.corruptions_fixed {
            image.assert_sound(&format!("seed {seed}"));
        }
    }
}

#[test]
fn bitmaps_are_counted() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    let image = Image::create("cluster_size=4096", "64M");
    for name in ["b0", "b1"] {
        let args = ["bitmap", "--add", "-g", "4096", "image", name];
        ok(image.dir.path(), "qemu-img", &args);
    }
    let args = [
        "-t",
        "unsafe",
        "-f",
        "qcow2",
        "-c",
        "write -P 1 0 32M",
        "image",
    ];
    ok(image.dir.path(), "qemu-io", &args);
    image.assert_sound("bitmaps");
    // Nobody vouches for them without the autoclear bit.
    image.put(88, 0);
    let (_, theirs) = qemu_check(image.dir.path(), "image").unwrap();
    let ours = check(&image.path, NONE).unwrap();
    assert!(ours.leaks > 3);
    assert_eq!(numbers(&ours), qemu_numbers(&theirs));
}

#[test]
fn an_image_left_dirty_is_repaired_when_it_is_opened() {
    if !requires(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mut rng = Rng::new(5);
    let (image, _) = image_of("lazy_refcounts=on", &mut rng);
    for cluster in 3..20 {
        image.set_refcount(cluster, 0);
    }
    image.put(72, 1);
    let before = image.content();
    let mut host = Host::open(&[&image.path]);
    let (mut node, _) = Qcow2::open(&host, "{}", true).unwrap();
    let backing = Grant {
        id: "backing".into(),
        what: Granted::None,
    };
    host.call(|txn| node.activate_writable(txn, &[backing]))
        .unwrap();
    host.call(|txn| node.close(txn)).unwrap();
    assert_eq!(image.u64(72), 0);
    image.assert_sound("dirty");
    assert!(image.content() == before);
}

#[test]
fn a_check_that_was_not_begun_does_not_go_on() {
    if !requires(&["qemu-img"]) {
        return;
    }
    let image = Image::create("", "1M");
    let mut host = Host::open(&[&image.path]);
    let (mut node, _) = Qcow2::open(&host, "{}", false).unwrap();
    node.activate(
        &host,
        &[Grant {
            id: "backing".into(),
            what: Granted::None,
        }],
    )
    .unwrap();
    host.call(|txn| node.check(txn, ALL, 0)).unwrap_err();
    host.call(|txn| node.check(txn, NONE, 64)).unwrap_err();
    host.call(|txn| node.check(txn, NONE, 0)).unwrap();
}
