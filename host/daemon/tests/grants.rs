//! Names found in images: refused unless the operator granted them, and not even looked at.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::{Command, Stdio};

use serde_json::json;
use support::*;

/// An image `disk` in the folder of a daemon that names this backing file.
fn with_backing(backing: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let disk = disk.to_str().unwrap();
    qemu_img(&[
        "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", disk, "1M",
    ]);
    folder
}

fn disk(path: &str) -> serde_json::Value {
    json!({"driver": "qcow2", "node-name": "disk0",
        "file": {"driver": "file", "filename": path}})
}

#[test]
fn a_backing_file_that_only_the_image_names_is_refused() {
    if !has("qemu-img") {
        return;
    }
    let daemon = Daemon::start_with(&[], with_backing("/etc/passwd"));
    let mut qmp = daemon.qmp();
    let mut options = disk(&daemon.text("disk"));
    assert_eq!(
        qmp.err("blockdev-add", options.clone()),
        "Node 'disk0': the image names a backing file '/etc/passwd' that is not granted. Grant it \
         with --allow-paths DIR or with 'backing' in blockdev-add, or open with backing=null."
    );
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), json!([]));
    options["backing"] = json!(null);
    qmp.ok("blockdev-add", options);
}

#[test]
fn what_is_refused_is_never_opened() {
    if !has("qemu-img") || !has("strace") {
        return;
    }
    let folder = with_backing("/etc/passwd");
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for allow in [&[][..], &["--allow-paths", &path("")]] {
        let blockdev = format!(
            "qcow2,node-name=d,file.driver=file,file.filename={}",
            path("disk")
        );
        let output = Command::new("strace")
            .args([
                "-f",
                "-qq",
                "-e",
                "trace=open,openat,openat2,io_uring_enter",
                "-o",
            ])
            .arg(path("trace"))
            .arg(OUTPORTD)
            .args(allow)
            .args(["--blockdev", &blockdev])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("that is not granted"), "{said}");
        let trace = std::fs::read_to_string(path("trace")).unwrap();
        assert!(trace.contains(&path("disk")), "the trace shows opens");
        assert!(!trace.contains("passwd"), "{trace}");
    }
}

#[test]
fn the_operator_grants_by_node_or_by_directory() {
    if !has("qemu-img") {
        return;
    }
    let folder = with_backing("base");
    std::fs::write(folder.path().join("base"), vec![7; 1 << 20]).unwrap();
    let base = folder.path().join("base").to_str().unwrap().to_owned();
    let daemon = Daemon::start_with(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"], folder);
    let mut qmp = daemon.qmp();
    let refused = qmp.err("blockdev-add", disk(&daemon.text("disk")));
    assert!(refused.contains("'base' that is not granted"), "{refused}");
    let mut options = disk(&daemon.text("disk"));
    options["backing"] = json!({"driver": "file", "filename": base});
    qmp.ok("blockdev-add", options);
    reads_sevens(&daemon, &mut qmp);

    let folder = with_backing("base");
    std::fs::write(folder.path().join("base"), vec![7; 1 << 20]).unwrap();
    let options = [
        "--allow-paths",
        "{}",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd",
    ];
    let daemon = Daemon::start_with(&options, folder);
    let mut qmp = daemon.qmp();
    qmp.ok("blockdev-add", disk(&daemon.text("disk")));
    reads_sevens(&daemon, &mut qmp);
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["backing_file_depth"], 1, "{nodes}");
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("blockdev-del", json!({"node-name": "disk0"}));
    assert_eq!(qmp.ok("query-named-block-nodes", json!({})), json!([]));
}

#[track_caller]
fn reads_sevens(daemon: &Daemon, qmp: &mut Qmp) {
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "disk0"}),
    );
    let mut client = Nbd::enter(&daemon.path("nbd"), "disk0").unwrap();
    assert_eq!(client.read(4096, 4096), Some(vec![7; 4096]));
}

#[test]
fn a_missing_file_in_a_granted_directory_is_told_as_qsd_tells_it() {
    if !has("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().join("nosuch").to_str().unwrap().to_owned();
    let images = with_backing(&name);
    let path = images.path().join("disk").to_str().unwrap().to_owned();
    let granted = folder.path().to_str().unwrap();
    let daemon = Daemon::start(&["--allow-paths", granted]);
    let ours = daemon.qmp().err("blockdev-add", disk(&path));
    let reason = "No such file or directory";
    assert_eq!(
        ours,
        format!("Could not open backing file: Could not open '{name}': {reason}")
    );
    if let Some(daemon) = Daemon::qsd(&[]) {
        assert_eq!(ours, daemon.qmp().err("blockdev-add", disk(&path)));
    }
}

#[test]
fn a_link_out_of_the_directory_is_refused() {
    if !has("qemu-img") {
        return;
    }
    let folder = with_backing("link");
    std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
    let daemon = Daemon::start_with(&["--allow-paths", "{}"], folder);
    let refused = daemon.qmp().err("blockdev-add", disk(&daemon.text("disk")));
    assert!(refused.contains("'link' that is not granted"), "{refused}");
}
