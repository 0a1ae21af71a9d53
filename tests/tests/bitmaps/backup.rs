//! `examples/incremental-backup`: a full backup, incremental ones, restored and compared.

use std::path::Path;

use outport_tests::nbd::wire::{cmd, errno};
use outport_tests::{
    Daemon, Output, Rng, Server, TempImage, assert_same, check_image, python, qemu_img, requires,
    requires_python_nbd, try_run,
};
use serde_json::json;

const LEN: u64 = 6 << 20;

fn script(daemon: &Daemon, folder: &Path, options: &[&str]) -> Output {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/incremental-backup");
    let (script, qmp) = (example.join("backup.py"), daemon.path("qmp2.sock"));
    let words = [
        &script,
        &qmp,
        daemon.nbd().path(),
        Path::new("disk"),
        folder,
    ];
    let words = words.iter().map(|it| it.to_str().unwrap());
    try_run(
        python(),
        &words.chain(options.iter().copied()).collect::<Vec<_>>(),
    )
}

#[track_caller]
fn backup(daemon: &Daemon, folder: &Path, options: &[&str]) {
    let done = script(daemon, folder, options);
    assert_eq!(done.code, Some(0), "{}", done.err);
}

/// The backup, on top of those before it, has what the disk has now.
#[track_caller]
fn assert_restores(backup: &Path, disk: &TempImage) {
    let restored = backup.with_file_name("restored");
    let paths = [backup, &restored].map(|path| path.to_str().unwrap());
    qemu_img(&["convert", "-O", "raw", paths[0], paths[1]]);
    let restored = std::fs::read(restored).unwrap();
    assert_same(&restored, &disk.content(), "the restored disk");
}

/// Some writes and zeroes, as a guest would do.
fn write_some(daemon: &mut Daemon, rng: &mut Rng) {
    daemon.add_export("disk", true);
    let mut client = daemon.client("disk");
    for _ in 0..12 {
        let offset = rng.below(LEN);
        let len = rng.between(1, (LEN - offset).min(200 << 10) + 1) as u32;
        let data = rng.bytes(len as usize);
        client.write(offset, &data).unwrap().unwrap();
    }
    let zeroes = client.command(0, cmd::WRITE_ZEROES, 1 << 20, 1 << 20, &[]);
    zeroes.unwrap().unwrap();
    client.disconnect().unwrap();
    let mode = json!({"id": "disk", "mode": "hard"});
    daemon.qmp.ok("block-export-del", mode);
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
}

fn second_monitor(server: Server) -> outport_tests::Builder {
    let builder = Daemon::builder(server).nbd();
    let path = builder.path("qmp2.sock");
    builder
        .option(
            "--chardev",
            format!("socket,id=two,path={},server=on,wait=off", path.display()),
        )
        .option("--monitor", "chardev=two")
}

fn full_then_incremental(server: Server, options: &[&str]) {
    let tools = ["qemu-img", "qemu-nbd", "qemu-io", "nbdcopy", "nbdinfo"];
    if !tools.into_iter().all(requires) || !requires_python_nbd() {
        return;
    }
    let image = TempImage::random(LEN as usize, 5);
    let mut daemon = second_monitor(server).start();
    daemon.add_node("disk", &image);
    let (folder, mut rng) = (tempfile::tempdir().unwrap(), Rng::new(9));
    for number in 0..3 {
        if number > 0 {
            write_some(&mut daemon, &mut rng);
        }
        backup(&daemon, folder.path(), options);
        let newest = folder.path().join(format!("{number}.qcow2"));
        assert_restores(&newest, &image);
        check_image(&newest, "a backup");
    }
    // Only changes were copied.
    let size = |n: u32| std::fs::metadata(folder.path().join(format!("{n}.qcow2"))).unwrap();
    assert!(size(1).len() < size(0).len());
    daemon.stop();
}

#[test]
fn backups_by_libnbd_restore() {
    full_then_incremental(Server::Outport, &["--restrict"]);
}

#[test]
fn backups_by_qemu_restore() {
    full_then_incremental(Server::Outport, &["--with", "qemu"]);
}

#[test]
fn the_example_is_plain_qmp() {
    if requires("qemu-storage-daemon") {
        full_then_incremental(Server::Qsd, &[]);
    }
}

/// A backup that fails loses nothing: the next one has all of it.
#[test]
fn a_failed_backup_is_made_up_for() {
    if !["qemu-img", "qemu-nbd", "nbdcopy", "nbdinfo"]
        .into_iter()
        .all(requires)
        || !requires_python_nbd()
    {
        return;
    }
    let image = TempImage::random(LEN as usize, 6);
    let mut daemon = second_monitor(Server::Outport).start();
    daemon.add_node("disk", &image);
    let (folder, mut rng) = (tempfile::tempdir().unwrap(), Rng::new(3));
    backup(&daemon, folder.path(), &[]);
    write_some(&mut daemon, &mut rng);
    // The place of the next backup is taken by a folder.
    let taken = folder.path().join("1.qcow2.partial");
    std::fs::create_dir(&taken).unwrap();
    assert_ne!(script(&daemon, folder.path(), &[]).code, Some(0));
    std::fs::remove_dir(&taken).unwrap();
    write_some(&mut daemon, &mut rng);
    backup(&daemon, folder.path(), &[]);
    assert_restores(&folder.path().join("1.qcow2"), &image);
}

// === what an export lets be read ===

#[test]
fn reads_outside_the_bitmap_are_refused() {
    let image = TempImage::random(1 << 20, 7);
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    daemon.add_node("disk", &image);
    let bitmap = json!({"node": "disk", "name": "b"});
    daemon.qmp.ok("block-dirty-bitmap-add", bitmap.clone());
    daemon.add_export("disk", true);
    let mut client = daemon.client("disk");
    client.write(65536, &[1; 512]).unwrap().unwrap();
    client.disconnect().unwrap();
    let mode = json!({"id": "disk", "mode": "hard"});
    daemon.qmp.ok("block-export-del", mode);
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
    daemon.qmp.ok("block-dirty-bitmap-disable", bitmap);
    daemon.add_export_with("disk", json!({"bitmaps": ["b"], "restrict-reads": true}));
    let mut client = daemon.client("disk");
    let inside = client.read(65536, 65536).unwrap().unwrap();
    let content = std::fs::read(image.path()).unwrap();
    assert_same(&inside, &content[65536..131072], "what is dirty");
    for (offset, len) in [(0, 512), (65535, 512), (131071, 2), (0, 1 << 20)] {
        assert_eq!(client.read(offset, len).unwrap(), Err(errno::PERM));
    }
    let more = json!({"type": "nbd", "id": "e", "name": "e", "node-name": "disk",
        "restrict-reads": true});
    let (_, why) = daemon.qmp.err("block-export-add", more);
    assert_eq!(why, "'restrict-reads' needs 'bitmaps'");
}

#[test]
fn what_was_read_is_given_up() {
    let image = TempImage::random(1 << 20, 8);
    let wanted = image.content();
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    daemon.add_node("disk", &image);
    daemon.add_export_with(
        "disk",
        json!({"writable": true, "discard-after-read": true}),
    );
    let mut client = daemon.client("disk");
    for offset in (0..1 << 19).step_by(1 << 16) {
        let got = client.read(offset, 1 << 16).unwrap().unwrap();
        assert_same(
            &got,
            &wanted[offset as usize..][..1 << 16],
            "the first read",
        );
    }
    let left = std::fs::read(image.path()).unwrap();
    assert!(left[..1 << 19].iter().all(|byte| *byte == 0));
    assert_same(&left[1 << 19..], &wanted[1 << 19..], "what was not read");
    let more = json!({"type": "nbd", "id": "e", "name": "e", "node-name": "disk",
        "discard-after-read": true});
    let (_, why) = daemon.qmp.err("block-export-add", more);
    assert_eq!(why, "'discard-after-read' needs a writable export");
}
