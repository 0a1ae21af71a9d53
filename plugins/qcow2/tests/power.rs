//! Power cuts: any part of what is between two barriers may have reached the
//! disk. What was flushed is there, and at worst space has leaked.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "host/mod.rs"]
mod host;
#[path = "node/mod.rs"]
mod node;

use std::fs;
use std::process::Command;

use host::Flying;
use node::{Node, Rng, qemu_img};
use outport_sdk::{ByteRange, DiscardKind, WritableFormat};

/// A node, what was flushed, and what changed since.
struct Run {
    node: Node,
    /// Files as of the last barrier.
    durable: Vec<Vec<u8>>,
    flushed: Vec<u8>,
    model: Vec<u8>,
    /// Bytes that differ since, or may.
    touched: Vec<bool>,
}

impl Run {
    fn flush(&mut self) {
        let node = &mut self.node;
        let image = &mut node.image;
        node.host.call(|txn| image.flush(txn)).unwrap();
        let freed = node.host.barrier();
        for range in &freed {
            let file = &mut node.host.files[range.slot as usize];
            let end = (range.range.end() as usize).min(file.len());
            let start = (range.range.offset as usize).min(end);
            file[start..end].fill(0xdd);
        }
        self.durable = node.host.files.clone();
        node.host.call(|txn| image.reclaim(txn, &freed)).unwrap();
        self.flushed = self.model.clone();
        self.touched = vec![false; self.model.len()];
    }

    fn step(&mut self, rng: &mut Rng) {
        let size = self.model.len() as u64;
        let cluster = u64::from(self.node.geometry.cluster_size);
        let granularity = u64::from(self.node.geometry.zero_granularity);
        let offset = rng.below(size / 512) * 512;
        let len = ((rng.below(cluster / 128) + 1) * 512).min(size - offset);
        match rng.below(8) {
            0 if granularity > 0 => {
                let offset = offset - offset % granularity;
                let len = len.next_multiple_of(granularity).min(size - offset);
                let range = ByteRange::new(offset, len);
                // Part of a compressed cluster cannot be zeroed: the front may be.
                self.node.discard(range, DiscardKind::ZeroUnmap).unwrap();
                let now = self.node.read(offset, len as usize).unwrap();
                self.model[offset as usize..][..len as usize].copy_from_slice(&now);
                self.touched[offset as usize..][..len as usize].fill(true);
            }
            1 => {
                let offset = offset - offset % cluster;
                let len = cluster.min(size - offset) as usize;
                let data: Vec<u8> = (0..len)
                    .map(|i| if i % 9 == 0 { i as u8 } else { 3 })
                    .collect();
                if self.node.write_compressed(offset, &data, false).unwrap() {
                    self.model[offset as usize..][..len].copy_from_slice(&data);
                    self.touched[offset as usize..][..len].fill(true);
                }
            }
            _ => {
                let data = vec![rng.next() as u8; len as usize];
                self.node.write_all(&[(offset, data.clone())], rng).unwrap();
                self.model[offset as usize..][..data.len()].copy_from_slice(&data);
                self.touched[offset as usize..][..data.len()].fill(true);
            }
        }
    }

    /// The files as a power cut could leave them now.
    fn cut(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let mut files = self.durable.clone();
        let host = &self.node.host;
        let in_mapping = rng.below(2) == 0;
        let share = rng.below(5);
        for write in &host.prepare {
            if in_mapping || rng.below(4) < share {
                apply(&mut files, write);
            }
        }
        if in_mapping {
            for write in &host.mapping {
                if rng.below(4) < share {
                    apply(&mut files, write);
                }
            }
        }
        files
    }
}

fn apply(files: &mut [Vec<u8>], write: &Flying) {
    let file = &mut files[write.slot as usize];
    let end = write.offset as usize + write.data.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[write.offset as usize..end].copy_from_slice(&write.data);
}

fn survive(options: &str, size: u64, snapshot: bool, seed: u64, grow: bool) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let path = image.to_str().unwrap().to_owned();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        &path,
        &size.to_string(),
    ]);
    let mut rng = Rng(seed);
    let mut model = vec![0; size as usize];
    let mut files = vec![fs::read(&image).unwrap()];
    if snapshot {
        let mut node = Node::open(files, None, "{}", true).unwrap();
        model.fill(7);
        node.write_all(&[(0, model.clone())], &mut Rng(3)).unwrap();
        fs::write(&image, &node.close().unwrap()[0]).unwrap();
        qemu_img(&["snapshot", "-c", "one", &path]);
        files = vec![fs::read(&image).unwrap()];
    }
    let node = Node::open(files.clone(), None, "{}", true).unwrap();
    let touched = vec![false; model.len()];
    let mut run = Run {
        node,
        durable: files,
        flushed: model.clone(),
        model,
        touched,
    };
    let mut repaired = 0;
    for cut in 0..40 {
        for _ in 0..rng.below(30) {
            run.step(&mut rng);
        }
        if grow && cut % 8 == 3 {
            let size = run.model.len() + (3 << 20);
            run.node.resize(size as u64).unwrap();
            run.model.resize(size, 0);
            run.touched.resize(size, true);
        }
        let files = run.cut(&mut rng);
        let dirty = files[0][4..8] == [0, 0, 0, 3] && files[0][79] & 1 != 0;
        repaired += u32::from(dirty);
        let mut after = Node::open(files, None, "{}", true).unwrap();
        let content = after.content();
        for (i, byte) in run.flushed.iter().enumerate() {
            assert!(
                run.touched[i] || content[i] == *byte,
                "{options}: cut {cut} of seed {seed} lost byte {i:#x}"
            );
        }
        // And it is an image to go on with.
        after.write_all(&[(0, vec![1; 4096])], &mut Rng(5)).unwrap();
        fs::write(&image, &after.close().unwrap()[0]).unwrap();
        let check = Command::new("qemu-img")
            .args(["check", &path])
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&check.stdout);
        assert!(
            matches!(check.status.code(), Some(0 | 3)),
            "{options}: cut {cut} of seed {seed}, dirty {dirty}: {words}"
        );
        if rng.below(3) == 0 {
            run.flush();
        }
    }
    println!("{options}: {repaired} of 40 cuts needed a repair");
}

#[test]
fn plain_images_survive_a_crash() {
    for seed in 0..3 {
        survive("cluster_size=4k", 2 << 20, false, seed, false);
        survive("cluster_size=64k", 4 << 20, false, seed, false);
    }
}

#[test]
fn images_whose_tables_grow_survive_a_crash() {
    for seed in 0..3 {
        survive("cluster_size=512", 1 << 20, false, seed, true);
        survive(
            "cluster_size=512,refcount_bits=64",
            1 << 20,
            false,
            seed,
            false,
        );
    }
}

#[test]
fn images_with_snapshots_survive_a_crash() {
    for seed in 0..3 {
        survive("cluster_size=4k", 1 << 20, true, seed, false);
        survive(
            "cluster_size=16k,extended_l2=on",
            2 << 20,
            true,
            seed,
            false,
        );
    }
}
