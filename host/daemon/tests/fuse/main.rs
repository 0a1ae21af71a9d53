//! FUSE exports of a running daemon, used with the system calls that programs use.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod defects;
mod errors;
mod length;
mod lifecycle;
mod passthrough;
#[path = "../support/mod.rs"]
mod support;

mod semantics;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::*;

/// Whether files can be mounted over here; says so if not. In CI that is a failure.
fn mountable() -> bool {
    let may = rustix::process::geteuid().is_root();
    let able = may && Path::new("/dev/fuse").exists();
    if !able {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no FUSE in CI");
        eprintln!("SKIPPED: needs root and /dev/fuse");
    }
    able
}

/// A daemon with a node `n` over the file `img`, a file `m` to mount over, and its monitor.
struct Bench {
    qmp: Qmp,
    daemon: Daemon,
}

impl Bench {
    #[track_caller]
    fn new(content: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("img"), content).unwrap();
        std::fs::write(folder.path().join("m"), "underneath").unwrap();
        Self::start(folder)
    }

    fn start(folder: tempfile::TempDir) -> Self {
        let node = "raw,node-name=n,file.driver=file,file.filename={}/img,file.node-name=f";
        let daemon = Daemon::start_with(&["--blockdev", node], folder);
        let qmp = daemon.qmp();
        Self { qmp, daemon }
    }

    /// Exports `n` as `m` with more options.
    #[track_caller]
    fn export(&mut self, more: &Value) {
        let arguments = self.arguments("e", "m", more);
        self.qmp.ok("block-export-add", arguments);
    }

    fn arguments(&self, id: &str, file: &str, more: &Value) -> Value {
        let base = json!({"type": "fuse", "id": id, "node-name": "n",
            "mountpoint": self.daemon.text(file)});
        with(base, more)
    }

    fn path(&self) -> PathBuf {
        self.daemon.path("m")
    }

    #[track_caller]
    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path())
            .unwrap()
    }

    #[track_caller]
    fn remove(&mut self, mode: &str) {
        let arguments = json!({"id": "e", "mode": mode});
        self.qmp.ok("block-export-del", arguments);
        assert_eq!(self.qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    }

    /// Mounts at or below the folder.
    fn mounts(&self) -> usize {
        mounts_in(&self.daemon.path(""))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What a test that failed, or a daemon that was killed, left behind.
        for file in ["m", "q", "img", "other"] {
            if mounts_in(&self.daemon.path("")) > 0 {
                run("umount", &["-l", &self.daemon.text(file)]);
            }
        }
    }
}

fn mounts_in(folder: &Path) -> usize {
    let folder = folder.canonicalize().unwrap();
    let folder = folder.to_str().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().filter(|line| line.contains(folder)).count()
}

/// Runs a program quietly; whether it succeeded.
fn run(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.unwrap().success()
}

/// The errno of a failure.
#[track_caller]
fn errno<T: std::fmt::Debug>(result: Result<T, impl Into<std::io::Error>>) -> i32 {
    result.unwrap_err().into().raw_os_error().unwrap()
}
