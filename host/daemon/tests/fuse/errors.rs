//! What a failing node tells the programs that use its file.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;

use serde_json::json;

use super::support::*;
use super::{Bench, errno, mountable, run};

const EIO: i32 = 5;
const ENOMEM: i32 = 12;
const ENOSPC: i32 = 28;

#[test]
fn errors_of_the_node_reach_the_program() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 1 << 20]);
    for (name, event, iotype, error) in [
        ("r", "none", "read", EIO),
        ("w", "none", "write", ENOSPC),
        ("m", "none", "write", ENOMEM),
        ("f", "none", "flush", EIO),
    ] {
        let node = json!({"driver": "blkdebug", "node-name": "d", "image": "n",
            "inject-error": [{"event": event, "iotype": iotype, "errno": error}]});
        bench.qmp.ok("blockdev-add", node);
        bench.export(&json!({"node-name": "d", "writable": true}));
        let file = bench.open();
        let mut data = [0; 4096];
        match iotype {
            "read" => assert_eq!(errno(file.read_at(&mut data, 8192)), error, "{name}"),
            "flush" => assert_eq!(errno(file.sync_all()), error, "{name}"),
            _ => {
                assert_eq!(errno(file.write_at(&data, 8192)), error, "{name}");
                file.read_exact_at(&mut data, 8192).unwrap();
                assert_eq!(data, [3; 4096], "nothing was written");
            }
        }
        drop(file);
        bench.remove("safe");
        bench.qmp.ok("blockdev-del", json!({"node-name": "d"}));
    }
}

#[test]
fn a_full_disk_loses_nothing_that_was_acknowledged() {
    if !mountable() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let mut bench = Bench::new(&[]);
        let small = bench.daemon.text("small");
        fs::create_dir(&small).unwrap();
        assert!(run(
            "mount",
            &["-t", "tmpfs", "-o", "size=2M", "tmpfs", &small]
        ));
        let image = format!("{small}/image");
        qemu_img(&["create", "-q", "-f", format, &image, "0"]);
        let node = json!({"driver": format, "node-name": "s",
            "file": {"driver": "file", "filename": image}});
        bench.qmp.ok("blockdev-add", node);
        bench.export(&json!({"node-name": "s", "writable": true, "growable": true}));
        let mut append = OpenOptions::new().append(true).open(bench.path()).unwrap();
        let mut model = Vec::new();
        let full = loop {
            let piece = vec![1 + (model.len() / 10_240) as u8; 10_240];
            match append.write(&piece) {
                Ok(n) => model.extend(&piece[..n]),
                Err(error) => break error,
            }
            assert!(model.len() < 4 << 20, "it never gets full");
        };
        assert_eq!(full.raw_os_error(), Some(ENOSPC), "{format}");
        assert!(model.len() > 1 << 20, "{format}: {}", model.len());
        let seen = fs::read(bench.path()).unwrap();
        assert!(seen.starts_with(&model), "{format}: what was acknowledged");
        append.sync_all().unwrap();
        drop(append);
        bench.remove("safe");
        bench.qmp.ok("blockdev-del", json!({"node-name": "s"}));
        assert!(run("umount", &[&small]));
    }
}
