//! Where the file ends, and who may change that.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;

use serde_json::json;

use super::support::*;
use super::{Bench, errno, mountable};

#[test]
fn a_fixed_export_ends_where_it_ends() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 1000]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    const ENOSPC: i32 = 28;
    assert_eq!(errno(file.write_at(&[1; 100], 1024)), ENOSPC);
    assert_eq!(errno(file.write_at(&[1; 100], 1 << 40)), ENOSPC);
    // The rest of the last sector can be written, though the image ends before.
    assert_eq!(file.write_at(&[2; 100], 1020).unwrap(), 4);
    assert_eq!(file.metadata().unwrap().len(), 1024);
    let mut append = OpenOptions::new().append(true).open(bench.path()).unwrap();
    assert_eq!(errno(append.write(&[3; 10])), ENOSPC);
    let mut model = vec![5; 1000];
    model.extend([0; 20]);
    model.extend([2; 4]);
    assert_eq!(fs::read(bench.path()).unwrap(), model);
}

#[test]
fn truncating_a_fixed_export_to_nothing_clears_it_and_keeps_its_length() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 8192]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    for by_open in [true, false] {
        file.write_all_at(&[6; 8192], 0).unwrap();
        if by_open {
            drop(fs::File::create(bench.path()).unwrap());
        } else {
            file.set_len(0).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 8192);
        assert_eq!(fs::read(bench.path()).unwrap(), [0; 8192], "{by_open}");
        file.write_all_at(&[7; 10], 100).unwrap();
        assert_eq!(
            fs::read(bench.path()).unwrap()[..111][99..],
            [[0].as_slice(), &[7; 10], &[0]].concat()
        );
    }
}

#[test]
fn a_read_only_export_that_was_remounted_is_not_cleared() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 8192]);
    bench.export(&json!({"writable": false}));
    let path = bench.daemon.text("m");
    assert!(super::run("mount", &["-o", "remount,rw", &path]));
    const EROFS: i32 = 30;
    assert_eq!(errno(fs::File::create(&path)), EROFS);
    assert_eq!(fs::read(bench.path()).unwrap(), [5; 8192]);
}

#[test]
fn ftruncate_resizes_even_a_fixed_export() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 4096]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    for (len, shown) in [(512, 512), (100_000, 100_352), (5000, 5120)] {
        file.set_len(len).unwrap();
        assert_eq!(file.metadata().unwrap().len(), shown);
        assert_eq!(fs::metadata(bench.daemon.path("img")).unwrap().len(), len);
    }
    assert_eq!(fs::read(bench.path()).unwrap()[..512], [5; 512]);
    assert_eq!(fs::read(bench.path()).unwrap()[512..], [0; 4608]);
}

#[test]
fn a_fixed_export_is_not_resized_under_those_who_rely_on_its_length() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 4096]);
    bench.export(&json!({"writable": true}));
    let address = json!({"type": "unix", "data": {"path": bench.daemon.text("nbd")}});
    bench.qmp.ok("nbd-server-start", json!({"addr": address}));
    let nbd = json!({"type": "nbd", "id": "nbd", "node-name": "n"});
    bench.qmp.ok("block-export-add", nbd);
    assert_eq!(errno(bench.open().set_len(512)), 1, "EPERM");
    assert_eq!(fs::metadata(bench.path()).unwrap().len(), 4096);
    bench.qmp.ok("block-export-del", json!({"id": "nbd"}));
    bench.open().set_len(512).unwrap();
}

#[test]
fn a_growable_export_is_as_long_as_what_was_written() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[]);
    bench.export(&json!({"writable": true, "growable": true}));
    let path = bench.path();
    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    let mut model = Vec::new();
    for len in [10, 1000, 3, 70_000] {
        let piece = vec![len as u8; len];
        append.write_all(&piece).unwrap();
        model.extend(piece);
        assert_eq!(fs::read(&path).unwrap(), model);
    }
    let file = bench.open();
    file.write_all_at(&[1; 7], 200_000).unwrap();
    model.resize(200_000, 0);
    model.extend([1; 7]);
    assert_eq!(fs::read(&path).unwrap(), model);
    assert_eq!(fs::read(bench.daemon.path("img")).unwrap(), model);
    drop(fs::File::create(&path).unwrap());
    assert_eq!(file.metadata().unwrap().len(), 0, "O_TRUNC");
    assert!(fs::read(&path).unwrap().is_empty());
}

#[test]
fn a_growable_export_of_an_image_ends_where_it_was_written() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[]);
    let image = bench.daemon.text("q.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "64k"]);
    let node = json!({"driver": "qcow2", "node-name": "q",
        "file": {"driver": "file", "filename": image}});
    bench.qmp.ok("blockdev-add", node);
    let more = json!({"node-name": "q", "writable": true, "growable": true});
    bench.export(&more);
    let file = bench.open();
    file.write_all_at(b"far", 3_000_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 3_000_003);
    file.write_all_at(&[1; 2000], 0).unwrap();
    file.set_len(1000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1000);
    file.set_len(4096).unwrap();
    let content = fs::read(bench.path()).unwrap();
    assert_eq!(content[..1000], [1; 1000]);
    assert_eq!(content[1000..], [0; 3096], "nothing comes back");
    drop(file);
    bench.remove("safe");
    bench.qmp.ok("blockdev-del", json!({"node-name": "q"}));
    qemu_img(&["check", "-q", &image]);
}

#[test]
fn a_resize_shows_at_once_to_those_who_have_it_open() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[5; 4096]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    assert_eq!(file.metadata().unwrap().len(), 4096);
    for len in [1_u64 << 20, 8192] {
        let resize = json!({"node-name": "n", "size": len});
        bench.qmp.ok("block_resize", resize);
        assert_eq!(file.metadata().unwrap().len(), len);
        let mut data = [1; 512];
        file.read_exact_at(&mut data, len - 512).unwrap();
        assert_eq!(data, [0; 512]);
        assert_eq!(file.read_at(&mut data, len).unwrap(), 0);
    }
}
