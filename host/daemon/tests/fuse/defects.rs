//! What qemu-storage-daemon gets wrong, one test each (specification, "What QSD gets wrong").

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use serde_json::json;

use super::support::*;
use super::{Bench, mountable, run};

#[test]
fn an_alias_of_a_path_is_recognised_without_asking_ourselves() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({}));
    std::os::unix::fs::symlink("m", bench.daemon.path("link")).unwrap();
    let path = |file: &str| bench.daemon.text(file);
    let folder = path("");
    let folder = folder.trim_end_matches('/').rsplit('/').next().unwrap();
    for file in ["m", "./m", ".//m", "link", &format!("../{folder}/m")] {
        let arguments = bench.arguments("e2", file, &json!({}));
        let refused = bench.qmp.err("block-export-add", arguments);
        let wanted = format!("There already is a FUSE export on '{}'", path(file));
        assert_eq!(refused, wanted);
    }
    assert_eq!(fs::read(bench.path()).unwrap(), [3; 512]);
}

#[test]
fn an_external_unmount_ends_the_export_with_one_line() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({}));
    assert!(run("umount", &[bench.path().to_str().unwrap()]));
    assert_eq!(bench.qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(bench.qmp.ok("query-block-exports", json!({})), json!([]));
    let log = bench.daemon.log();
    assert_eq!(log.matches("not mounted any more").count(), 1, "{log}");
    bench.export(&json!({}));
    assert_eq!(fs::read(bench.path()).unwrap(), [3; 512]);
}

#[test]
fn a_killed_daemon_is_followed_by_another_on_the_same_path() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    bench.daemon.signal("KILL");
    bench.daemon.wait();
    assert!(fs::metadata(bench.path()).is_err(), "the stale mount");
    let second = Daemon::start(&[
        "--blockdev",
        &format!("file,node-name=n,filename={}", bench.daemon.text("img")),
    ]);
    let mut qmp = second.qmp();
    let arguments = bench.arguments("e", "m", &json!({"writable": true}));
    qmp.ok("block-export-add", arguments);
    assert_eq!(fs::read(bench.path()).unwrap(), [3; 512]);
    assert_eq!(bench.mounts(), 1);
    assert!(file.read_at(&mut [0], 0).is_err(), "of the first daemon");
    drop(file);
    qmp.ok("block-export-del", json!({"id": "e"}));
    assert_eq!(fs::read(bench.path()).unwrap(), b"underneath");
}

#[test]
fn a_fixed_export_takes_many_requests_at_a_time() {
    if !mountable() || !has("fio") {
        return;
    }
    // Writes are held up in the node: they can all be there only if the kernel sends one before
    // another is answered.
    let mut bench = Bench::new(&[3; 1 << 20]);
    let debug = json!({"driver": "blkdebug", "node-name": "d", "image": "f"});
    bench.qmp.ok("blockdev-add", debug);
    for tag in 0..8 {
        let stop = json!({"node-name": "d", "event": "pwritev", "tag": format!("t{tag}")});
        bench.qmp.ok("x-blkdebug-break", stop);
    }
    bench.export(&json!({"node-name": "d", "writable": true}));
    let mut fio = std::process::Command::new("fio")
        .args([
            "--name=w",
            "--rw=write",
            "--bs=4k",
            "--size=64k",
            "--direct=1",
        ])
        .args(["--ioengine=libaio", "--iodepth=16"])
        .arg(format!("--filename={}", bench.path().display()))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let qmp = &mut bench.qmp;
    eventually("eight requests are in the node", || {
        let seen = qmp.ok("x-query-blkdebug", json!({"node-name": "d"}));
        seen["suspended"].as_array().is_some_and(|it| it.len() == 8)
    });
    for tag in 0..8 {
        let resume = json!({"node-name": "d", "tag": format!("t{tag}")});
        qmp.ok("x-blkdebug-resume", resume);
    }
    assert!(fio.wait().unwrap().success());
}

#[test]
fn the_block_size_is_the_nodes() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({}));
    assert_eq!(fs::metadata(bench.path()).unwrap().blksize(), 4096);
    let image = bench.daemon.text("q.qcow2");
    let options = "cluster_size=128k";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "1M"]);
    let node = json!({"driver": "qcow2", "node-name": "q",
        "file": {"driver": "file", "filename": image}});
    bench.qmp.ok("blockdev-add", node);
    fs::write(bench.daemon.path("q"), "").unwrap();
    let arguments = bench.arguments("q", "q", &json!({"node-name": "q"}));
    bench.qmp.ok("block-export-add", arguments);
    let seen = fs::metadata(bench.daemon.path("q")).unwrap();
    assert_eq!(seen.blksize(), 128 << 10);
}
