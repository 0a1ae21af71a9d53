//! Block devices that are read-only as a whole: the kernel opens them for writing and fails every
//! write. Nobody is promised that he can write there; the sentences are QSD's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::*;

const NOT_WRITABLE: &str = "The device is not writable: Permission denied";

/// A read-only loop device over an empty qcow2 image; detached with the test.
struct ReadOnly(String);

impl ReadOnly {
    /// `None`: only root may attach one.
    fn attach(image: &std::path::Path) -> Option<Self> {
        if !rustix::process::getuid().is_root() || !has("losetup") || !has("qemu-img") {
            eprintln!("SKIPPED: no read-only loop device: not root, or no losetup or qemu-img");
            return None;
        }
        let path = image.to_str().unwrap();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", path, "1M"])
            .status();
        assert!(made.unwrap().success());
        let attached = Command::new("losetup")
            .args(["--read-only", "--find", "--show", path])
            .output()
            .unwrap();
        if !attached.status.success() {
            eprintln!("SKIPPED: no loop device: {attached:?}");
            return None;
        }
        let name = String::from_utf8(attached.stdout).unwrap();
        Some(Self(name.trim().to_owned()))
    }

    fn node(&self, driver: &str, more: &[(&str, Value)]) -> Value {
        let mut node = json!({"driver": driver, "filename": self.0});
        for (name, value) in more {
            node[*name] = value.clone();
        }
        node
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _detached = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// What becomes of a node, and of a writable and a read-only export of it: their errors.
fn tried(qmp: &mut Qmp, mut node: Value) -> Vec<Option<String>> {
    node["node-name"] = json!("n");
    let error = |answer: Value| answer["error"]["desc"].as_str().map(str::to_owned);
    let mut told = vec![error(qmp.execute("blockdev-add", node))];
    if told[0].is_none() {
        for writable in [true, false] {
            let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": writable});
            let added = error(qmp.execute("block-export-add", export));
            if added.is_none() {
                qmp.ok("block-export-del", json!({"id": "e"}));
                qmp.event("BLOCK_EXPORT_DELETED");
            }
            told.push(added);
        }
        qmp.ok("blockdev-del", json!({"node-name": "n"}));
    }
    told
}

#[test]
fn nobody_is_promised_writes_that_fail() {
    let folder = tempfile::tempdir().unwrap();
    let Some(device) = ReadOnly::attach(&folder.path().join("image")) else {
        return;
    };
    let auto = [("auto-read-only", json!(true))];
    let read_only = [("read-only", json!(true))];
    let refused = vec![Some(NOT_WRITABLE.to_owned())];
    let on_export = vec![None, Some(NOT_WRITABLE.to_owned()), None];
    let as_asked = vec![
        None,
        Some("Cannot export read-only node as writable".to_owned()),
        None,
    ];
    let over = |driver: &str, file: Value| json!({"driver": driver, "file": file});
    let cases = [
        (device.node("host_device", &[]), &refused),
        (device.node("file", &[]), &refused),
        (device.node("host_device", &read_only), &as_asked),
        (device.node("host_device", &auto), &on_export),
        (over("raw", device.node("host_device", &[])), &refused),
        (over("raw", device.node("host_device", &auto)), &on_export),
        (over("qcow2", device.node("host_device", &[])), &refused),
        (over("qcow2", device.node("host_device", &auto)), &refused),
    ];
    let server = ["--nbd-server", "addr.type=unix,addr.path={}/nbd"];
    for daemon in [Daemon::qsd(&server), Some(Daemon::start(&server))] {
        let Some(daemon) = daemon else { continue };
        let mut qmp = daemon.qmp();
        for (node, want) in &cases {
            assert_eq!(&tried(&mut qmp, node.clone()), *want, "{node}");
        }
    }
}

#[test]
fn a_device_is_not_reopened_for_writes_that_fail() {
    let folder = tempfile::tempdir().unwrap();
    let Some(device) = ReadOnly::attach(&folder.path().join("image")) else {
        return;
    };
    for daemon in [Daemon::qsd(&[]), Some(Daemon::start(&[]))] {
        let Some(daemon) = daemon else { continue };
        let mut qmp = daemon.qmp();
        let mut node = device.node("host_device", &[("read-only", json!(true))]);
        node["node-name"] = json!("n");
        qmp.ok("blockdev-add", node.clone());
        node["read-only"] = json!(false);
        let refusal = qmp.err("blockdev-reopen", json!({"options": [node]}));
        assert_eq!(refusal, NOT_WRITABLE);
        let nodes = qmp.ok("query-named-block-nodes", json!({}));
        assert_eq!(nodes[0]["ro"], true);
    }
}
