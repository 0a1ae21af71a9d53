//! Image locks beside QEMU's own processes, in both directions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use outport_block::Error;
use outport_block::file::{FileOptions, HostFile, Locking, Permissions};

const READ: Permissions = Permissions::CONSISTENT_READ;
const WRITE: Permissions = Permissions::WRITE;
const READ_WRITE: Permissions = READ.union(WRITE);
const RESIZE: Permissions = Permissions::RESIZE;
const ALL: Permissions = Permissions::ALL;

/// Is QEMU here? Says so if not.
fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

fn image(dir: &Path, format: &str) -> PathBuf {
    let path = dir.join(format);
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(&path)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    path
}

fn open(path: &Path) -> HostFile {
    HostFile::open(FileOptions::new(path)).unwrap()
}

fn qemu_io(path: &Path, arguments: &[&str]) -> Output {
    Command::new("qemu-io")
        .args(arguments)
        .arg(path)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refusal(result: Result<(), Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn qemu_is_refused_what_we_do_not_share() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "raw");
    let write = ["-f", "raw", "-c", "write 0 512"];
    let read = ["-f", "raw", "-r", "-c", "read 0 512"];
    let ours = open(&path);
    assert!(qemu_io(&path, &write).status.success());

    ours.set_permissions(READ_WRITE, READ).unwrap();
    let refused = qemu_io(&path, &write);
    assert!(!refused.status.success());
    let text = said(&refused);
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");

    ours.set_permissions(READ_WRITE, ALL).unwrap();
    assert!(qemu_io(&path, &write).status.success());
    ours.set_permissions(READ, READ).unwrap();
    assert!(qemu_io(&path, &read).status.success());
    assert!(!qemu_io(&path, &write).status.success());
    drop(ours);
    assert!(qemu_io(&path, &write).status.success());
}

#[test]
fn qemu_does_not_read_metadata_beside_our_writer() {
    if !has("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "qcow2");
    let ours = open(&path);
    ours.set_permissions(READ_WRITE, READ).unwrap();
    let info = |arguments: &[&str]| {
        let mut command = Command::new("qemu-img");
        command.args(arguments).arg(&path).output().unwrap()
    };
    let refused = info(&["info"]);
    let text = said(&refused);
    assert!(
        text.contains("Failed to get shared \"write\" lock"),
        "{text}"
    );
    assert!(info(&["info", "-U"]).status.success());
    drop(ours);
    assert!(info(&["info"]).status.success());
}

/// A QEMU process that holds the image until it is dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The image of a QEMU process that has its locks.
fn check_against_writer(path: &Path) {
    let ours = open(path);
    assert_eq!(
        refusal(ours.set_permissions(READ_WRITE, ALL)),
        "Failed to get \"write\" lock"
    );
    assert_eq!(
        refusal(ours.set_permissions(RESIZE, ALL)),
        "Failed to get \"resize\" lock"
    );
    assert_eq!(
        refusal(ours.set_permissions(READ, ALL.without(WRITE))),
        "Failed to get shared \"write\" lock"
    );
    assert_eq!(
        refusal(ours.set_permissions(READ, ALL.without(READ))),
        "Failed to get shared \"consistent read\" lock"
    );
    // Reading beside the writer, letting it do what it does.
    ours.set_permissions(READ, ALL).unwrap();
    let mut options = FileOptions::new(path);
    options.locking = Locking::Off;
    let reckless = HostFile::open(options).unwrap();
    reckless.set_permissions(ALL, Permissions::NONE).unwrap();
}

#[test]
fn we_are_refused_what_qemu_io_does_not_share() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "qcow2");
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Holder)
        .unwrap();
    // It asks for commands when it has opened the image. Trying would be in its way.
    let mut prompt = [0; 9];
    let mut stdout = holder.0.stdout.take().unwrap();
    stdout.read_exact(&mut prompt).unwrap();
    assert_eq!(prompt, *b"qemu-io> ");
    check_against_writer(&path);
    let mut stdin = holder.0.stdin.take().unwrap();
    stdin.write_all(b"quit\n").unwrap();
    assert!(holder.0.wait().unwrap().success());
    open(&path).set_permissions(ALL, READ).unwrap();
}

#[test]
fn we_are_refused_what_qemu_storage_daemon_does_not_share() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "qcow2");
    let [socket, pidfile] = ["nbd", "pid"].map(|name| dir.path().join(name));
    let file = format!("driver=file,node-name=f,filename={}", path.display());
    let server = format!("addr.type=unix,addr.path={}", socket.display());
    let _holder = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &file])
        .args(["--blockdev", "driver=qcow2,node-name=q,file=f"])
        .args(["--nbd-server", &server])
        .args(["--export", "type=nbd,id=e,node-name=q,writable=on"])
        .arg("--pidfile")
        .arg(&pidfile)
        .spawn()
        .map(Holder)
        .unwrap();
    // Written when all options have succeeded.
    let is_up = |_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        pidfile.exists()
    };
    assert!((0..3000).any(is_up), "QSD does not start");
    check_against_writer(&path);
}

#[test]
fn a_refused_change_leaves_what_was_held() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 512]).unwrap();
    let (one, two) = (open(&path), open(&path));
    one.set_permissions(READ_WRITE, READ).unwrap();
    two.set_permissions(READ, ALL).unwrap();
    assert_eq!(
        refusal(two.set_permissions(READ_WRITE, ALL)),
        "Failed to get \"write\" lock"
    );
    // The failed try left no trace that would be in the way.
    one.set_permissions(READ_WRITE, READ).unwrap();
    assert_eq!(
        refusal(one.set_permissions(READ_WRITE, Permissions::NONE)),
        "Failed to get shared \"consistent read\" lock"
    );
    // Still held: what was there before the failed try.
    assert_eq!(
        refusal(two.set_permissions(READ_WRITE, ALL)),
        "Failed to get \"write\" lock"
    );
    one.set_permissions(READ, ALL).unwrap();
    two.set_permissions(READ_WRITE, ALL).unwrap();
}
