//! The `nbd` node: other people's servers as nodes of ours, and what they may not do to us.
//!
//! ```text
//! client -- our export -- nbd node -- peer (qemu-nbd, QSD, nbdkit, outportd, or a liar)
//! ```

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod hostile;
mod lost;
mod peer;
mod words;

use outport_tests::{
    Daemon, Rng, Server, TempImage, assert_same, check_image, pattern, qemu_img, requires,
};
use peer::Peer;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

/// A daemon whose node `disk` is the peer's export, exported as `disk`.
fn through(peer: &Peer, options: Value) -> Daemon {
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    add(&mut daemon, peer, options);
    daemon.add_export("disk", true);
    daemon
}

fn add(daemon: &mut Daemon, peer: &Peer, options: Value) {
    let mut node = json!({"driver": "nbd", "node-name": "disk", "export": peer.export,
        "server": peer.address(), "discard": "unmap"});
    let more = options.as_object().unwrap().clone();
    node.as_object_mut().unwrap().extend(more);
    daemon.qmp.ok("blockdev-add", node);
}

/// Data, a hole, data, a hole; each a few clusters long.
fn sparse() -> (TempImage, Vec<u8>) {
    let mut content = pattern(SIZE, 3);
    content[MIB..3 * MIB].fill(0);
    content[5 * MIB..].fill(0);
    let image = TempImage::zeroes(SIZE as u64);
    for (from, to) in [(0, MIB), (3 * MIB, 5 * MIB)] {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(image.path());
        let file = file.unwrap();
        file.write_all_at(&content[from..to], from as u64).unwrap();
    }
    (image, content)
}

/// What `qemu-img map` says of an export: where data is.
fn map(uri: &str) -> Vec<(u64, u64, bool, bool)> {
    let text = qemu_img(&["map", "--output=json", "-f", "raw", uri]);
    let extents: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut out: Vec<(u64, u64, bool, bool)> = Vec::new();
    for extent in extents {
        let number = |name: &str| extent[name].as_u64().unwrap();
        let flag = |name: &str| extent[name].as_bool().unwrap();
        let one = (
            number("start"),
            number("length"),
            flag("zero"),
            flag("data"),
        );
        match out.last_mut() {
            Some(last) if (last.2, last.3) == (one.2, one.3) => last.1 += one.1,
            _ => out.push(one),
        }
    }
    out
}

fn same_through(peer: &Peer, content: &[u8]) {
    let mut daemon = through(peer, json!({}));
    // Under a `raw` node too.
    let raw = json!({"driver": "raw", "node-name": "window", "file": "disk"});
    daemon.qmp.ok("blockdev-add", raw);
    daemon.add_export("window", false);
    for export in ["disk", "window"] {
        let copy = TempImage::raw(&[]);
        let uri = daemon.uri(export);
        qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, copy.str()]);
        let read = std::fs::read(copy.path()).unwrap();
        assert_same(&read, content, &format!("{} as {export}", peer.what));
        assert_eq!(map(&uri), map(&peer.uri()), "{} as {export}", peer.what);
    }
    daemon.stop();
}

#[test]
fn every_server_reads_the_same_through_us() {
    if !(requires("qemu-nbd") && requires("nbdkit") && requires("qemu-storage-daemon")) {
        return;
    }
    let (image, content) = sparse();
    // One after another: each locks the image.
    for make in [
        &(|it: &TempImage| Peer::qemu_nbd(it.path(), &[])) as &dyn Fn(&TempImage) -> Peer,
        &|it| Peer::qsd(Server::Qsd, it),
        &|it| Peer::qsd(Server::Outport, it),
        &|it| Peer::nbdkit(&["file", it.str()]),
        &|it| Peer::nbdkit(&["--no-sr", "file", it.str()]),
        &|it| Peer::nbdkit(&["--filter=noextents", "file", it.str()]),
        &|it| Peer::nbdkit(&["-o", "file", it.str()]),
    ] {
        let peer = make(&image);
        same_through(&peer, &content);
    }
}

/// Random requests of every kind through our export, in several at a time, against a model.
fn play(daemon: &Daemon, seed: u64, content: &mut [u8]) {
    use outport_tests::nbd::wire::{cmd, cmd_flag};
    let mut rng = Rng::new(seed);
    let mut client = daemon.client("disk");
    for round in 0..400 {
        let at = rng.below(SIZE as u64 - 1) as usize;
        let max = if rng.one_in(20) { 3 * MIB } else { 40_000 };
        let len = 1 + rng.below((SIZE - at).min(max) as u64) as usize;
        let here = at..at + len;
        let (offset, short) = (at as u64, len as u32);
        match rng.below(8) {
            0..=2 => {
                let data = rng.bytes(len);
                let flags = if rng.one_in(4) { cmd_flag::FUA } else { 0 };
                let wrote = client.command(flags, cmd::WRITE, offset, short, &data);
                wrote.unwrap().unwrap();
                content[here].copy_from_slice(&data);
            }
            3 => {
                let choices = [0, cmd_flag::NO_HOLE, cmd_flag::FUA];
                let flags = *rng.pick(&choices);
                let zeroed = client.command(flags, cmd::WRITE_ZEROES, offset, short, &[]);
                zeroed.unwrap().unwrap();
                content[here].fill(0);
            }
            4 => {
                let zeroed =
                    client.command(cmd_flag::FAST_ZERO, cmd::WRITE_ZEROES, offset, short, &[]);
                match zeroed.unwrap() {
                    Ok(()) => content[here].fill(0),
                    Err(errno) => assert_eq!(errno, 95, "only ENOTSUP"),
                }
            }
            5 => client.flush().unwrap().unwrap(),
            6 => {
                let cached = client.command(0, cmd::CACHE, offset, short, &[]);
                cached.unwrap().unwrap();
            }
            _ => {
                let read = client.read(offset, short).unwrap().unwrap();
                assert_same(&read, &content[here], &format!("round {round} at {at}"));
            }
        }
    }
    client.flush().unwrap().unwrap();
    client.disconnect().unwrap();
}

#[test]
fn every_server_is_written_as_a_model_says() {
    if !(requires("qemu-nbd") && requires("nbdkit") && requires("qemu-storage-daemon")) {
        return;
    }
    let blocks = ["--filter=blocksize-policy", "blocksize-minimum=4096"];
    let error = "blocksize-error-policy=error";
    for (n, make) in (0_u64..).zip([
        &(|it: &TempImage| Peer::qemu_nbd(it.path(), &["--discard=unmap"]))
            as &dyn Fn(&TempImage) -> Peer,
        &|it| Peer::qsd(Server::Qsd, it),
        &|it| Peer::qsd(Server::Outport, it),
        &|it| Peer::nbdkit(&["file", it.str()]),
        &|it| Peer::nbdkit(&["--no-sr", "--filter=fua", "file", it.str()]),
        &|it| Peer::nbdkit(&["--filter=nozero", "file", it.str(), "zeromode=none"]),
        &|it| Peer::nbdkit(&[blocks[0], "file", it.str(), blocks[1], error]),
    ]) {
        let (image, mut content) = sparse();
        let peer = make(&image);
        let daemon = through(&peer, json!({}));
        play(&daemon, n, &mut content);
        daemon.stop();
        let what = peer.what.clone();
        drop(peer);
        assert_same(&image.content(), &content, &what);
    }
}

#[test]
fn a_qcow2_image_lives_on_another_server() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::qcow2(SIZE as u64, "cluster_size=4k,preallocation=falloc");
    let peer = Peer::qemu_nbd(image.path(), &[]);
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let file = json!({"driver": "nbd", "export": "x", "server": peer.address()});
    let node = json!({"driver": "qcow2", "node-name": "disk", "file": file});
    daemon.qmp.ok("blockdev-add", node);
    daemon.add_export("disk", true);
    let mut content = vec![0; SIZE];
    play(&daemon, 77, &mut content);
    daemon.stop();
    drop(peer);
    check_image(image.path(), "qcow2 over NBD");
    assert_same(&image.content(), &content, "qcow2 over NBD");
}

#[test]
fn many_requests_are_on_their_way_at_once() {
    if !requires("nbdkit") {
        return;
    }
    // Each read takes 200 ms; one after the other they would take longer than the client waits.
    let peer = Peer::nbdkit(&[
        "--threads=64",
        "--filter=delay",
        "pattern",
        "1M",
        "rdelay=200ms",
    ]);
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    add(&mut daemon, &peer, json!({"read-only": true}));
    daemon.add_export("disk", false);
    let mut client = daemon.client("disk");
    let requests: Vec<_> = (0..128)
        .map(|n| client.request(0, outport_tests::nbd::wire::cmd::READ, n * 4096, 4096))
        .collect();
    for request in &requests {
        client.send(request, &[]).unwrap();
    }
    for _ in &requests {
        for chunk in client.chunks().unwrap() {
            assert_eq!(chunk.error(), None);
        }
    }
}
