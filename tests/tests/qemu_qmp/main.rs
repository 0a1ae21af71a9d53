//! The client library that QEMU's developers publish, `qemu.qmp`, drives outportd.
//!
//! `life.py` uses its asyncio client; the shell, `qmp-shell`, is typed at as a person would.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use outport_tests::{Daemon, Server, TempImage, python, python_package, requires};

/// As of 2026-03; a newer one is a change to this line.
const VERSION: &str = "0.0.6";

/// A daemon with a monitor for Python beside the test's own, and the library.
fn daemon() -> Option<(Daemon, PathBuf, PathBuf)> {
    let library = python_package("qemu.qmp", VERSION)?;
    let builder = Daemon::builder(Server::under_test());
    let monitor = builder.path("python.sock");
    let chardev = format!(
        "socket,id=python,path={},server=on,wait=off",
        monitor.display()
    );
    let daemon = builder
        .option("--chardev", chardev)
        .option("--monitor", "python")
        .start();
    Some((daemon, monitor, library))
}

fn python_with(library: &Path) -> Command {
    let mut command = Command::new(python());
    command
        .env("PYTHONPATH", library)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

#[test]
fn its_client_drives_the_life_of_an_export() {
    if !requires("nbdinfo") || !requires("qemu-io") {
        return;
    }
    let Some((mut daemon, monitor, library)) = daemon() else {
        return;
    };
    let image = TempImage::zeroes(1 << 20);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu_qmp/life.py");
    let done = python_with(&library)
        .arg(script)
        .args([&monitor, &daemon.path("nbd.sock")])
        .arg(image.str())
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{out}{err}");
    assert_eq!(out, "exported\nwritten\nstill in use\ndeleted\nquit\n");
    assert!(daemon.wait().success(), "{}", daemon.stderr());
}

#[test]
fn its_shell_is_understood() {
    let Some((mut daemon, monitor, library)) = daemon() else {
        return;
    };
    let program = "import sys; from qemu.qmp.qmp_shell import main; sys.exit(main())";
    let mut shell = python_with(&library)
        .args(["-c", program])
        .arg(&monitor)
        // Its history goes there.
        .env("HOME", daemon.path("."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = "blockdev-add driver=null-co node-name=disk size=1048576\n\
        nbd-server-start addr={\"type\":\"unix\",\"data\":{\"path\":\"SOCKET\"}}\n\
        block-export-add type=nbd id=e0 node-name=disk writable=true\n\
        query-block-exports\n\
        block-export-del id=nosuch\n\
        block-export-del id=e0 mode=hard\n\
        quit\n";
    let socket = daemon.path("nbd.sock").display().to_string();
    let lines = lines.replace("SOCKET", &socket);
    shell
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let done = shell.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    for words in [
        "Welcome to the QMP",
        "\"node-name\": \"disk\"",
        "Export 'nosuch' is not found",
    ] {
        assert!(
            said.contains(words),
            "{words} in {said}{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
    assert!(daemon.wait().success(), "{}", daemon.stderr());
}
