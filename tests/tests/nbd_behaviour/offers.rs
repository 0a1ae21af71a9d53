//! What a client is told that it may use, beside QEMU's server: the transmission flags.

use outport_tests::nbd::wire::opt;
use outport_tests::{Daemon, Server, TempImage, requires};
use serde_json::json;

use super::MIB;

/// How replies are framed, in the order of the options that ask for it.
const FRAMINGS: [&str; 3] = ["simple", "structured", "extended"];

/// The flags that INFO and GO tell every kind of client, with what led to them.
fn told(server: Server, image: &TempImage) -> Vec<(String, u16)> {
    let mut daemon = Daemon::builder(server).nbd().start();
    let file = json!({"driver": "file", "filename": image.str(), "read-only": true});
    let node = json!({"driver": "raw", "node-name": "disk", "read-only": true, "file": file});
    daemon.qmp.ok("blockdev-add", node);
    daemon.add_export("disk", false);
    let mut all = Vec::new();
    for framing in FRAMINGS {
        for contexts in [&[][..], &["base:allocation"], &["x-none:such"]] {
            for option in [opt::INFO, opt::GO] {
                let mut haggle = daemon.haggle();
                match framing {
                    "structured" => haggle.structured_replies().expect("an answer"),
                    "extended" => assert!(haggle.extended_headers().expect("an answer")),
                    _ => {}
                }
                if framing != "simple" && !contexts.is_empty() {
                    let set = haggle.meta_contexts(opt::SET_META_CONTEXT, "disk", contexts);
                    set.expect("an answer");
                }
                let info = haggle
                    .query(option, "disk", &[])
                    .expect("an answer")
                    .expect("success");
                let what = format!("{framing}, {contexts:?}, option {option}");
                all.push((what, info.flags));
            }
        }
    }
    all
}

#[test]
fn flags_are_those_that_qemu_tells() {
    if !requires("qemu-storage-daemon") {
        return;
    }
    let image = TempImage::zeroes(MIB as u64);
    let [theirs, ours] = [Server::Qsd, Server::Outport].map(|server| told(server, &image));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs, ours, "{:#x} {:#x}", theirs.1, ours.1);
    }
    assert!(ours.iter().any(|it| it.1 & 0x1000 != 0));
}
