//! Every byte that `qemu-img convert` reads, through the plugin's extents.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "host/mod.rs"]
mod host;
#[path = "node/mod.rs"]
mod node;

use std::fs;
use std::path::Path;

use node::{Node, Rng, qemu_img, qemu_io};

/// Random content through QEMU: writes, zeroes, discards.
fn scribble(image: &Path, size: u64, cluster: u64, seed: u64) {
    let mut rng = Rng(seed);
    let mut commands = Vec::new();
    for i in 0..40 {
        let offset = rng.below(size / 512) * 512;
        let len = ((rng.below(3 * cluster / 512) + 1) * 512).min(size - offset);
        commands.push(match rng.below(6) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -zu {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            _ => format!("write -P {} {offset} {len}", i + 1),
        });
    }
    qemu_io(image, &commands);
}

fn compare(image: &Path, data_file: Option<&Path>, backing: Option<&Path>) {
    let raw = image.with_extension("raw");
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let mut files = vec![fs::read(image).unwrap()];
    files.extend(data_file.map(|p| fs::read(p).unwrap()));
    let backing = backing.map(|p| fs::read(p).unwrap());
    for writable in [false, true] {
        let mut node = Node::open(files.clone(), backing.clone(), "{}", writable).unwrap();
        let expected = fs::read(&raw).unwrap();
        assert_eq!(node.geometry.size, expected.len() as u64);
        assert!(node.content() == expected, "{} differs", image.display());
        assert!(node.host.corruptions.borrow().is_empty());
    }
}

fn case(name: &str, options: &str, size: u64, cluster: u64) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let path = image.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        path,
        &size.to_string(),
    ]);
    scribble(&image, size, cluster, name.len() as u64);
    compare(&image, None, None);
}

#[test]
fn clusters_of_every_size() {
    for bits in 9..=21 {
        let cluster = 1 << bits;
        let size = (cluster * 40 + 512).min(20 << 20);
        case("sizes", &format!("cluster_size={cluster}"), size, cluster);
    }
}

#[test]
fn subclusters() {
    for bits in [14, 16, 17, 21] {
        let cluster = 1 << bits;
        let size = (cluster * 40 + 512).min(20 << 20);
        case(
            "sub",
            &format!("cluster_size={cluster},extended_l2=on"),
            size,
            cluster,
        );
    }
}

#[test]
fn old_images_and_odd_refcounts() {
    case("v2", "compat=0.10", 5 << 20, 65536);
    for bits in [1, 2, 4, 8, 32, 64] {
        case(
            "rc",
            &format!("refcount_bits={bits},cluster_size=4096"),
            3 << 20,
            4096,
        );
    }
    case("lazy", "lazy_refcounts=on", 5 << 20, 65536);
    for preallocation in ["metadata", "falloc", "full"] {
        case(
            "pre",
            &format!("preallocation={preallocation},cluster_size=8192"),
            2 << 20,
            8192,
        );
    }
}

#[test]
fn compressed_clusters() {
    for (kind, cluster) in [
        ("zlib", 512),
        ("zlib", 65536),
        ("zstd", 4096),
        ("zstd", 65536),
        ("zlib", 2 << 20),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.raw");
        let mut content = Vec::new();
        let mut rng = Rng(7);
        while content.len() < 3 << 20 {
            let byte = rng.below(256) as u8;
            for i in 0..rng.below(2000) {
                content.push(if rng.below(3) == 0 { i as u8 } else { byte });
            }
        }
        content.truncate((3 << 20) + 512);
        fs::write(&source, &content).unwrap();
        let image = dir.path().join("image.qcow2");
        let options = format!("compression_type={kind},cluster_size={cluster}");
        let (from, to) = (source.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&[
            "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to,
        ]);
        compare(&image, None, None);
        qemu_io(
            &image,
            &["write -P 9 1M 5000".into(), "discard 2M 128k".into()],
        );
        compare(&image, None, None);
    }
}

#[test]
fn backing_files_shorter_and_longer() {
    for backing_size in [512 * 1023, 1 << 20, 5 << 20] {
        for options in [
            "cluster_size=4096",
            "cluster_size=65536,extended_l2=on",
            "compat=0.10",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base.img");
            let mut rng = Rng(backing_size as u64);
            let content: Vec<u8> = (0..backing_size).map(|_| rng.next() as u8).collect();
            fs::write(&base, content).unwrap();
            let image = dir.path().join("image.qcow2");
            let (b, path) = (base.to_str().unwrap(), image.to_str().unwrap());
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-o", options, "-b", b, "-F", "raw", path, "3M",
            ]);
            scribble(&image, 3 << 20, 65536, 5);
            compare(&image, None, Some(&base));
        }
    }
}

#[test]
fn external_data_files() {
    for options in [
        "data_file_raw=on",
        "data_file_raw=off",
        "cluster_size=32k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data.raw");
        let image = dir.path().join("image.qcow2");
        let options = format!("data_file={},{options}", data.display());
        let path = image.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "3M"]);
        scribble(&image, 3 << 20, 65536, 11);
        compare(&image, Some(&data), None);
    }
}

#[test]
fn snapshots_stay_apart() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let path = image.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        path,
        "3M",
    ]);
    for i in 0..3 {
        scribble(&image, 3 << 20, 4096, i);
        qemu_img(&["snapshot", "-c", &format!("snap{i}"), path]);
    }
    scribble(&image, 3 << 20, 4096, 9);
    compare(&image, None, None);
    qemu_img(&["snapshot", "-a", "snap1", path]);
    compare(&image, None, None);
}

#[test]
fn facts_are_what_qemu_img_says() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.raw");
    for options in [
        String::from("compat=0.10"),
        "lazy_refcounts=on,refcount_bits=8".into(),
        "extended_l2=on,compression_type=zstd".into(),
        format!("data_file={},data_file_raw=on", data.display()),
    ] {
        let image = dir.path().join("image.qcow2");
        let path = image.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "3M"]);
        if !options.contains("data_file") {
            qemu_img(&["snapshot", "-c", "one", path]);
        }
        let said = qemu_img(&["info", "--output=json", path]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let files = vec![fs::read(&image).unwrap(), Vec::new()];
        let mut node = Node::open(files, None, "{}", false).unwrap();
        let facts = outport_sdk::Format::facts(&mut node.image, &node.host).unwrap();
        let facts: serde_json::Value = serde_json::from_str(&facts).unwrap();
        for key in [
            "virtual-size",
            "cluster-size",
            "dirty-flag",
            "format-specific",
            "snapshots",
        ] {
            assert_eq!(facts[key], said[key], "{key} with {options}");
        }
    }
}
