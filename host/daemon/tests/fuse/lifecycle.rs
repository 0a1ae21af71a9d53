//! How exports come and go: no mount, descriptor or process is left behind.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use serde_json::json;

use super::support::*;
use super::{Bench, errno, mountable, mounts_in};

#[test]
fn removal_uncovers_the_file_underneath() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    for _ in 0..3 {
        bench.export(&json!({}));
        assert_eq!(fs::read(bench.path()).unwrap(), [3; 512]);
        bench.remove("safe");
        assert_eq!(fs::read(bench.path()).unwrap(), b"underneath");
        assert_eq!(bench.mounts(), 0);
    }
}

#[test]
fn safe_removal_refuses_while_the_file_is_open() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    let remove = json!({"id": "e"});
    let refused = bench.qmp.err("block-export-del", remove.clone());
    assert_eq!(refused, "export 'e' still in use");
    file.write_all_at(&[4; 512], 0).unwrap();
    drop(file);
    bench.remove("safe");
    assert_eq!(fs::read(bench.daemon.path("img")).unwrap(), [4; 512]);
}

#[test]
fn hard_removal_cuts_who_is_waiting_for_an_answer() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 1 << 20]);
    let debug = json!({"driver": "blkdebug", "node-name": "d", "image": "f"});
    bench.qmp.ok("blockdev-add", debug);
    let stop = json!({"node-name": "d", "event": "pwritev", "tag": "held"});
    bench.qmp.ok("x-blkdebug-break", stop);
    bench.export(&json!({"node-name": "d", "writable": true}));
    let file = bench.open();
    let writer = std::thread::spawn({
        let file = file.try_clone().unwrap();
        move || file.write_at(&[1; 4096], 0)
    });
    let suspended = || json!({"node-name": "d"});
    let asked = &mut bench.qmp;
    eventually("the request is held up", || {
        let seen = asked.ok("x-query-blkdebug", suspended());
        seen["suspended"]
            .as_array()
            .is_some_and(|it| !it.is_empty())
    });
    let hard = json!({"id": "e", "mode": "hard"});
    bench.qmp.ok("block-export-del", hard);
    // The request itself is still held up.
    eventually("the writer is cut off", || writer.is_finished());
    let cut = writer.join().unwrap().unwrap_err();
    assert!(matches!(cut.raw_os_error(), Some(103 | 107)), "{cut}");
    assert!(matches!(errno(file.read_at(&mut [0], 0)), 103 | 107));
    let resume = json!({"node-name": "d", "tag": "held"});
    bench.qmp.ok("x-blkdebug-resume", resume);
    assert_eq!(bench.qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(fs::read(bench.path()).unwrap(), b"underneath");
}

#[test]
fn an_end_with_open_files_is_clean() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    bench.daemon.signal("TERM");
    assert!(bench.daemon.wait().success());
    assert_eq!(bench.mounts(), 0);
    assert!(matches!(errno(file.read_at(&mut [0], 0)), 103 | 107));
    assert_eq!(fs::read(bench.path()).unwrap(), b"underneath");
}

#[test]
fn an_export_may_cover_the_image_of_its_own_node() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 4096]);
    let arguments = bench.arguments("e", "img", &json!({"writable": true}));
    bench.qmp.ok("block-export-add", arguments);
    let image = bench.daemon.path("img");
    assert_eq!(mounts_in(&bench.daemon.path("")), 1);
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(b"through the node", 100).unwrap();
    drop(file);
    bench.remove("safe");
    assert_eq!(fs::read(&image).unwrap()[100..116], *b"through the node");
}

#[test]
fn a_node_is_not_made_over_an_export_of_its_own_daemon() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 4096]);
    bench.export(&json!({"writable": true}));
    let path = bench.daemon.text("m");
    let node = json!({"driver": "file", "node-name": "loop", "filename": path});
    let refused = bench.qmp.err("blockdev-add", node);
    assert_eq!(
        refused,
        format!("Could not open '{path}': it is an export of this daemon")
    );
}

#[test]
fn a_lazy_unmount_lets_those_inside_finish() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 512]);
    bench.export(&json!({"writable": true}));
    let file = bench.open();
    assert!(super::run(
        "umount",
        &["-l", bench.path().to_str().unwrap()]
    ));
    file.write_all_at(&[8; 512], 0).unwrap();
    let listed = bench.qmp.ok("query-block-exports", json!({}));
    assert_eq!(listed.as_array().unwrap().len(), 1);
    drop(file);
    assert_eq!(bench.qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(fs::read(bench.daemon.path("img")).unwrap(), [8; 512]);
}

/// What the daemon has open, and its threads but those that wait for work for a while.
fn belongings(pid: u32) -> (usize, usize) {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let names = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = names.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
    let idle = |name: &str| name.starts_with("iou-wrk") || name.starts_with("tokio-rt");
    let threads = names.filter(|name| name.as_ref().is_ok_and(|name| !idle(name)));
    (fds, threads.count())
}

#[test]
fn a_hundred_exports_under_load_leave_nothing() {
    if !mountable() {
        return;
    }
    let mut bench = Bench::new(&[3; 1 << 20]);
    for io in ["io0", "io1"] {
        let object = json!({"qom-type": "iothread", "id": io});
        bench.qmp.ok("object-add", object);
    }
    let more = json!({"writable": true, "iothread": ["io0", "io1"]});
    let cycle = |bench: &mut Bench, at: u32| {
        bench.export(&more);
        let path = bench.path();
        let mut load = Command::new("dd")
            .arg(format!("if={}", path.display()))
            .args(["of=/dev/null", "bs=4k", "iflag=nofollow"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let file = bench.open();
        file.write_all_at(&[at as u8; 4096], 8192).unwrap();
        bench.remove("hard");
        // It finished, or was told that the connection is gone.
        load.wait().unwrap();
    };
    cycle(&mut bench, 0);
    let pid = bench.daemon.pid();
    let before = belongings(pid);
    for at in 0..100 {
        cycle(&mut bench, at);
    }
    assert_eq!(bench.mounts(), 0);
    eventually("threads and descriptors are as before", || {
        let now = belongings(pid);
        now.0 <= before.0 && now.1 <= before.1
    });
}
