//! What the file looks like and what can be done with it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use serde_json::json;

use super::support::*;
use super::{Bench, errno, mountable};

#[test]
fn refusals_are_qsds() {
    if !mountable() {
        return;
    }
    let export = |file: &str| {
        let mountpoint = format!("$D/{file}");
        json!({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": mountpoint})
    };
    let node = "null-co,node-name=n,size=1048576";
    let commands = [
        ("block-export-add", export("nope")),
        ("block-export-add", export("")),
        ("block-export-add", export("qmp")),
        (
            "block-export-add",
            with(export("stderr"), &json!({"iothread": "zz"})),
        ),
        (
            "block-export-add",
            with(export("stderr"), &json!({"allow-other": "maybe"})),
        ),
        ("block-export-add", export("stderr")),
        ("query-block-exports", json!({})),
        ("block-export-add", export("stderr")),
        (
            "block-export-add",
            with(export("stderr"), &json!({"id": "other"})),
        ),
        ("blockdev-del", json!({"node-name": "n"})),
        ("block-export-del", json!({"id": "e"})),
        ("query-block-exports", json!({})),
    ];
    compare(&["--blockdev", node], &commands);
}

#[test]
fn it_looks_like_a_private_file() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[7; 10_000]);
    bench.export(&json!({"writable": true}));
    let seen = fs::metadata(bench.path()).unwrap();
    assert!(seen.is_file());
    assert_eq!(seen.mode() & 0o7777, 0o600);
    assert_eq!((seen.nlink(), seen.ino()), (1, 1));
    assert_eq!(seen.len(), 10_240, "whole sectors");
    assert_eq!((seen.uid(), seen.gid()), (0, 0));
    let image = fs::metadata(bench.daemon.path("img")).unwrap();
    assert_eq!(seen.blocks(), image.blocks());
    let path = bench.path();
    assert_eq!(errno(fs::remove_file(&path)), libc_errno(Errno::BUSY));
    let other = bench.daemon.path("other");
    assert_eq!(errno(fs::rename(&path, other)), libc_errno(Errno::BUSY));
    let mut content = fs::read(&path).unwrap();
    assert_eq!(content.split_off(10_000), [0; 240]);
    assert_eq!(content, [7; 10_000]);
}

fn libc_errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

#[test]
fn modes_are_the_owners_unless_others_are_allowed() {
    if !mountable() {
        return;
    }
    for others in [false, true] {
        let mut bench = Bench::new(&[0; 512]);
        let allow_other = if others { "auto" } else { "off" };
        bench.export(&json!({"writable": true, "allow-other": allow_other}));
        let path = bench.path();
        let chmod = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode));
        chmod(0o400).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
        let chown = || std::os::unix::fs::chown(&path, Some(1), None);
        if others {
            chmod(0o644).unwrap();
            chown().unwrap();
            let seen = fs::metadata(&path).unwrap();
            assert_eq!((seen.mode() & 0o7777, seen.uid()), (0o644, 1));
        } else {
            assert_eq!(errno(chmod(0o644)), libc_errno(Errno::PERM));
            assert_eq!(errno(chown()), libc_errno(Errno::OPNOTSUPP));
        }
        let now = std::time::SystemTime::now();
        let touched = bench.open().set_modified(now);
        assert_eq!(errno(touched), libc_errno(Errno::OPNOTSUPP));
        let value = [1];
        let flags = rustix::fs::XattrFlags::empty();
        let set = rustix::fs::setxattr(&path, "user.a", &value, flags);
        assert_eq!(set.unwrap_err(), Errno::OPNOTSUPP);
    }
}

#[test]
fn a_read_only_export_is_a_read_only_file_system() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[1; 4096]);
    bench.export(&json!({"growable": true}));
    let path = bench.path();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
    let write = OpenOptions::new().write(true).open(&path);
    assert_eq!(errno(write), libc_errno(Errno::ROFS));
    let mode = fs::Permissions::from_mode(0o600);
    let chmod = fs::set_permissions(&path, mode);
    assert_eq!(errno(chmod), libc_errno(Errno::ROFS));
    assert_eq!(fs::read(&path).unwrap(), [1; 4096]);
    // As a writer of the node would, without asking the file system.
    let refused = bench.arguments("e2", "img", &json!({"writable": 5}));
    bench.qmp.err("block-export-add", refused);
}

#[test]
fn what_is_written_is_in_the_node_and_durable() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[0; 1 << 20]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    let image = fs::File::open(bench.daemon.path("img")).unwrap();
    let mut seen = vec![0; 300_000];
    for (at, len) in [(0, 512), (1000, 3), (4095, 2), (100_000, 300_000)] {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + at) as u8).collect();
        file.write_all_at(&data, at as u64).unwrap();
        image.read_exact_at(&mut seen[..len], at as u64).unwrap();
        assert_eq!(seen[..len], data);
        file.read_exact_at(&mut seen[..len], at as u64).unwrap();
        assert_eq!(seen[..len], data);
    }
    file.sync_all().unwrap();
    drop(file);
    let stats = bench.qmp.ok("query-export-stats", json!({}));
    assert!(stats[0]["flush-operations"].as_u64() >= Some(2), "{stats}");
}

#[test]
fn fallocate_does_what_it_says() {
    if !mountable() {
        return;
    }
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
    const ZERO_KEEP: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
    let none = FallocateFlags::empty();
    let mut bench = Bench::new(&[9; 8192]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    let len = || file.metadata().unwrap().len();
    let unsupported = Err(Errno::OPNOTSUPP);
    assert_eq!(fallocate(&file, none, 0, 100), Ok(()));
    let keep = FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&file, keep, 1 << 20, 1 << 20), Ok(()));
    let blocks = file.metadata().unwrap().blocks();
    assert!(blocks * 512 >= 1 << 20, "{blocks} blocks are reserved");
    assert_eq!(fallocate(&file, PUNCH, 3, 100), Ok(()));
    assert_eq!(fallocate(&file, PUNCH, 100_000, 100), Ok(()));
    assert_eq!(
        fallocate(&file, FallocateFlags::ZERO_RANGE, 4095, 2),
        Ok(())
    );
    assert_eq!(fallocate(&file, ZERO_KEEP, 8000, 100_000), Ok(()));
    assert_eq!(len(), 8192, "nothing of that grows");
    let mut model = vec![9; 8192];
    model[3..103].fill(0);
    model[4095..4097].fill(0);
    model[8000..].fill(0);
    assert_eq!(fs::read(bench.path()).unwrap(), model);
    assert_eq!(fallocate(&file, none, 8192, 1000), Ok(()));
    assert_eq!(len(), 9216, "1000 bytes more, in whole sectors");
    assert_eq!(
        fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 20_480),
        Ok(())
    );
    assert_eq!(fs::read(bench.path()).unwrap(), vec![0; 20_480]);
    assert_eq!(fallocate(&file, none, 20_000, 2000), Ok(()));
    assert_eq!(len(), 22_016, "in whole sectors");
    let collapse = fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096);
    assert_eq!(collapse, unsupported);
}

#[test]
fn holes_are_found() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[]);
    let image = fs::File::create(bench.daemon.path("img")).unwrap();
    image.write_all_at(&[1; 4096], 65_536).unwrap();
    image.set_len(200_000).unwrap();
    let resize = json!({"node-name": "n", "size": 200_000});
    bench.qmp.ok("block_resize", resize);
    bench.export(&json!({}));
    let file = fs::File::open(bench.path()).unwrap();
    let end = 200_192;
    for (from, wanted) in [
        (SeekFrom::Data(0), Ok(65_536)),
        (SeekFrom::Hole(0), Ok(0)),
        (SeekFrom::Hole(65_536), Ok(69_632)),
        (SeekFrom::Hole(66_000), Ok(69_632)),
        (SeekFrom::Data(66_000), Ok(66_000)),
        (SeekFrom::Data(69_632), Err(Errno::NXIO)),
        (SeekFrom::Hole(199_999), Ok(199_999)),
        // Between the file's end and the sector's.
        (SeekFrom::Hole(200_100), Ok(200_100)),
        (SeekFrom::Data(200_100), Err(Errno::NXIO)),
        (SeekFrom::Hole(end), Ok(end)),
        (SeekFrom::Data(end), Err(Errno::NXIO)),
        (SeekFrom::Hole(end + 1), Err(Errno::NXIO)),
    ] {
        assert_eq!(seek(&file, from), wanted, "{from:?}");
    }
}
