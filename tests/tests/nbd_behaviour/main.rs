//! What the NBD protocol asks of a server, request by request, at the level of bytes.
//!
//! `requests` is about answers and error numbers, `reads` about the shape of read replies, `holes`
//! about holes in them, `status` about block status, `haggling` about options, `offers` about
//! transmission flags, `inactive` about nodes that somebody else has for now, `lifecycle` about
//! exports and servers that go away under their clients. Where QEMU's own server is known to do
//! otherwise, the test says so with `is_qsd`.

mod haggling;
mod holes;
mod inactive;
mod lifecycle;
mod offers;
mod reads;
mod requests;
mod status;

use outport_tests::{Daemon, Server, TempImage, pattern};
use serde_json::json;

const MIB: usize = 1 << 20;

/// A daemon with a 4 MiB raw export `disk`, whose third mebibyte is a hole.
struct Disk {
    daemon: Daemon,
    image: TempImage,
    content: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        Self::served_by(Daemon::start())
    }

    fn served_by(mut daemon: Daemon) -> Self {
        let image = TempImage::zeroes(4 * MIB as u64);
        let mut content = pattern(4 * MIB, 9);
        content[2 * MIB..3 * MIB].fill(0);
        write_around_the_hole(&image, &content);
        daemon.serve("disk", &image);
        Self {
            daemon,
            image,
            content,
        }
    }

    /// The same file once more, as read-only export `fixed`.
    fn read_only() -> Self {
        let mut disk = Self::new();
        disk.daemon
            .qmp
            .ok("block-export-del", json!({"id": "disk", "mode": "hard"}));
        disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
        disk.daemon.add_export("disk", false);
        disk
    }

    fn is_qsd(&self) -> bool {
        self.daemon.server == Server::Qsd
    }

    /// A new client still gets right answers: the server has survived.
    fn still_serves(&self) {
        let mut client = self.daemon.client("disk");
        let read = client.read(0, 4096).expect("it answers").expect("it reads");
        assert_eq!(read.len(), 4096);
        client.disconnect().expect("a goodbye is heard");
    }
}

/// Fills the file but for the hole, which the file system then really has.
fn write_around_the_hole(image: &TempImage, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(image.path());
    let file = file.expect("the test's own file");
    for range in [0..2 * MIB, 3 * MIB..4 * MIB] {
        file.write_all_at(&content[range.clone()], range.start as u64)
            .expect("room on disk");
    }
}
