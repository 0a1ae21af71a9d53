//! An export whose node is inactive, beside QEMU's server: reads are served, nothing else is.

use std::io;

use outport_tests::nbd::Client;
use outport_tests::nbd::wire::{cmd, cmd_flag, errno, opt};
use outport_tests::{Daemon, Server, TempImage, requires};
use serde_json::json;

use super::MIB;

/// The error number of an answer; 0 is success.
fn error<T>(answer: io::Result<Result<T, u32>>) -> u32 {
    answer.expect("an answer").err().unwrap_or(0)
}

/// Error numbers of all requests, in order.
fn outcomes(client: &mut Client) -> Vec<(&'static str, u32)> {
    let mut all = vec![("read", error(client.read(0, 4096)))];
    let fast = cmd_flag::FAST_ZERO;
    let sector = [7; 512];
    for (what, flags, kind, len, payload) in [
        ("write", 0, cmd::WRITE, 512, &sector[..]),
        ("durable write", cmd_flag::FUA, cmd::WRITE, 512, &sector),
        ("empty write", 0, cmd::WRITE, 0, &[]),
        ("flush", 0, cmd::FLUSH, 0, &[]),
        ("trim", 0, cmd::TRIM, 4096, &[]),
        ("cache", 0, cmd::CACHE, 4096, &[]),
        ("zeroes", 0, cmd::WRITE_ZEROES, 4096, &[]),
        ("fast zeroes", fast, cmd::WRITE_ZEROES, 4096, &[]),
    ] {
        let answer = client.command(flags, kind, 0, len, payload);
        all.push((what, error(answer)));
    }
    // Longer than what is taken from the receive buffer.
    let long = vec![7; 256 << 10];
    all.push(("long write", error(client.write(0, &long))));
    all.push(("status", error(client.block_status(0, 0, 4096))));
    all.push(("read", error(client.read(0, 4096))));
    all
}

fn client(daemon: &Daemon) -> Client {
    let mut haggle = daemon.haggle();
    haggle.structured_replies().expect("they are offered");
    let set = haggle.meta_contexts(opt::SET_META_CONTEXT, "disk", &["base:allocation"]);
    assert_eq!(set.expect("an answer").len(), 1);
    haggle.go("disk").expect("it is exported")
}

/// What clients hear before, while and after the node is inactive; the second one came meanwhile.
fn conversation(server: Server, image: &TempImage) -> [Vec<(&'static str, u32)>; 4] {
    let mut daemon = Daemon::builder(server).nbd().start();
    daemon.add_node("disk", image);
    daemon.add_export_with("disk", json!({"writable": true, "allow-inactive": true}));
    let mut first = client(&daemon);
    let before = outcomes(&mut first);
    let set = |active: bool| json!({"node-name": "disk", "active": active});
    daemon.qmp.ok("blockdev-set-active", set(false));
    let meanwhile = outcomes(&mut first);
    let late = outcomes(&mut client(&daemon));
    daemon.qmp.ok("blockdev-set-active", set(true));
    [before, meanwhile, late, outcomes(&mut first)]
}

#[test]
fn an_inactive_export_serves_reads_and_refuses_all_else() {
    if !requires("qemu-storage-daemon") || !requires("qemu-img") {
        return;
    }
    for image in [
        TempImage::zeroes(MIB as u64),
        TempImage::qcow2(MIB as u64, ""),
    ] {
        let [theirs, ours] = [Server::Qsd, Server::Outport].map(|it| conversation(it, &image));
        assert_eq!(theirs, ours, "{}", image.format());
        assert!(ours[1].contains(&("flush", errno::PERM)));
        assert!(ours[2].contains(&("status", errno::PERM)));
    }
}
