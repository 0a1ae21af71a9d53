//! Images on a block device: the end of the device, and a device that becomes longer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

use outport_tests::{Daemon, can_mount, requires};
use serde_json::json;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// `NBD_ENOSPC`.
const ENOSPC: u32 = 28;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A loop device, detached with the test.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn an_image_that_filled_its_device_goes_on_when_that_is_longer() {
    if !can_mount() || !requires("losetup") || !requires("qemu-img") {
        return;
    }
    let below = tempfile::NamedTempFile::new().unwrap();
    below.as_file().set_len(4 * MIB).unwrap();
    let path = below.path().to_str().unwrap();
    let device = Loop(
        run("losetup", &["--find", "--show", path])
            .trim()
            .to_owned(),
    );
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &device.0, "64M"],
    );
    let mut daemon = Daemon::start();
    for node in [
        json!({"driver": "host_device", "node-name": "device", "filename": device.0}),
        json!({"driver": "qcow2", "node-name": "disk", "file": "device"}),
    ] {
        daemon.qmp.ok("blockdev-add", node);
    }
    let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": "e",
                        "writable": true});
    daemon.qmp.ok("block-export-add", export);
    let mut client = daemon.client("e");
    let cluster = vec![7; CLUSTER as usize];
    let mut at = 0;
    let refused = loop {
        match client.write(at, &cluster).unwrap() {
            Ok(()) => at += CLUSTER,
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, ENOSPC, "after {at} bytes");
    assert!(at > 2 * MIB, "{at}");
    below.as_file().set_len(16 * MIB).unwrap();
    run("losetup", &["--set-capacity", &device.0]);
    for at in (at..at + 4 * MIB).step_by(CLUSTER as usize) {
        assert_eq!(client.write(at, &cluster).unwrap(), Ok(()), "{at}");
    }
    let end = u32::try_from(at + 4 * MIB).unwrap();
    let all = client.read(0, end).unwrap().unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
    client.disconnect().unwrap();
    daemon.stop();
    run("qemu-img", &["check", "-q", "-f", "qcow2", &device.0]);
}
