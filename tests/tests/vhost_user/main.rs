//! vhost-user-blk exports, with front-ends of ours: good ones, bad ones, and ones that outlive us.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chains;
mod crash;
mod device;
mod durable;
mod lifecycle;
mod limits;
mod messages;
mod polling;
mod races;

use std::path::PathBuf;

use outport_tests::vhost_user::{Blk, FrontEnd, Guest};
use outport_tests::{Daemon, Server, TempImage};
use serde_json::{Value, json};

/// A daemon without exports.
fn daemon() -> Daemon {
    Daemon::builder(Server::Outport).start()
}

/// Exports a node over `SOCKET`, writable; with further members.
fn export(daemon: &mut Daemon, node: &str, members: Value) -> PathBuf {
    let path = daemon.path(&format!("{node}.sock"));
    let options = options(&path, node, members);
    daemon.qmp.ok("block-export-add", options);
    path
}

fn options(path: &std::path::Path, node: &str, members: Value) -> Value {
    let mut options = json!({"type": "vhost-user-blk", "id": node, "node-name": node,
        "writable": true, "addr": {"type": "unix", "path": path}});
    let more = members.as_object().unwrap().clone();
    options.as_object_mut().unwrap().extend(more);
    options
}

/// A node of 1 MiB that reads as zeroes.
fn add_null(daemon: &mut Daemon, node: &str) {
    daemon.qmp.ok(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": node, "size": 1 << 20, "read-zeroes": true}),
    );
}

/// A guest with one disk.
struct Vm {
    front_end: FrontEnd,
    guest: Guest,
    disk: Blk,
}

impl Vm {
    #[track_caller]
    fn start(path: &std::path::Path, features: u64) -> Self {
        let front_end = FrontEnd::negotiated(path, features);
        let guest = Guest::new(Blk::memory(1));
        Self::with(front_end, guest)
    }

    #[track_caller]
    fn with(mut front_end: FrontEnd, guest: Guest) -> Self {
        let disk = Blk::new(0, 128);
        front_end.add_memory(&guest);
        front_end.start(&disk.queue, 0);
        Self {
            front_end,
            guest,
            disk,
        }
    }

    #[track_caller]
    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        self.disk.read(&self.guest, sector, len)
    }

    #[track_caller]
    fn write(&mut self, sector: u64, data: &[u8]) {
        self.disk.write(&self.guest, sector, data);
    }

    /// Stops the ring and starts it anew.
    #[track_caller]
    fn restart(&mut self) {
        self.front_end.stop(0);
        self.disk = Blk::new(0, 128);
        self.guest.write(self.disk.queue.available_ring(), &[0; 4]);
        self.guest.write(self.disk.queue.used_ring(), &[0; 4]);
        self.front_end.start(&self.disk.queue, 0);
    }

    /// Status and length of a request.
    #[track_caller]
    fn run(&mut self, kind: u32, sector: u64, data: &[u8], back: u32) -> (u8, u32) {
        self.disk.run(&self.guest, kind, sector, data, back)
    }
}

/// A daemon with one exported image of zeroes, and the way to it.
fn with_image(image: &TempImage, members: Value) -> (Daemon, PathBuf) {
    let mut daemon = daemon();
    daemon.add_node("disk", image);
    let path = export(&mut daemon, "disk", members);
    (daemon, path)
}
