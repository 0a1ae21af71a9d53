//! What `blockdev-add driver=nbd` says when it fails, beside what qemu-storage-daemon says.

use std::io::Write;

use outport_tests::{Daemon, Server, TempImage, requires};
use serde_json::{Value, json};

use super::peer::Peer;

#[test]
fn mistakes_have_qemus_words() {
    if !(requires("qemu-storage-daemon") && requires("qemu-nbd") && requires("nbdkit")) {
        return;
    }
    let image = TempImage::zeroes(1 << 20);
    let plain = Peer::qemu_nbd(image.path(), &[]);
    let read_only = Peer::qemu_nbd(image.path(), &["-r"]);
    let old = Peer::nbdkit(&["-o", "memory", "1M"]);
    let regular = image.path();
    let inet = |host: &str, port: &str| json!({"type": "inet", "host": host, "port": port});
    let mut daemons = [Server::Outport, Server::Qsd].map(|it| Daemon::builder(it).start());
    let folder = tempfile::tempdir().unwrap();
    let stranger = folder.path().join("http");
    let listener = std::os::unix::net::UnixListener::bind(&stranger).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // The client hangs up as soon as it has seen enough.
            let _ = stream.and_then(|mut stream| stream.write_all(b"HTTP/1.0 400 Bad Request"));
        }
    });
    let stranger = json!({"type": "unix", "path": stranger});
    let cases: Vec<Value> = vec![
        json!({}),
        json!({"server": {"type": "unix", "path": "/nonexistent/s"}}),
        json!({"server": {"type": "unix", "path": regular}}),
        json!({"server": {"type": "unix", "path": "/s".repeat(100)}}),
        json!({"server": inet("127.0.0.1", "1")}),
        json!({"server": inet("localhost", "1")}),
        json!({"server": inet("127.0.0.1", "xx")}),
        json!({"server": inet("no.such.invalid", "10809")}),
        json!({"server": {"type": "vsock", "cid": "x", "port": "1"}}),
        json!({"server": plain.address(), "tls-creds": "t"}),
        json!({"server": plain.address(), "export": "nosuch"}),
        json!({"server": plain.address(), "export": "x".repeat(5000)}),
        json!({"server": plain.address(), "x-dirty-bitmap": "x".repeat(5000)}),
        json!({"server": plain.address(), "open-timeout": -1}),
        json!({"server": plain.address(), "nosuch": 1}),
        json!({"server": plain.address(), "reconnect-delay": "1"}),
        json!({"server": read_only.address(), "export": "x"}),
        json!({"server": old.address(), "export": "x"}),
        json!({"server": stranger}),
    ];
    for case in cases {
        let mut node = json!({"driver": "nbd", "node-name": "n"});
        let members = case.as_object().unwrap().clone();
        node.as_object_mut().unwrap().extend(members);
        let [ours, theirs] = &mut daemons;
        let said = ours.qmp.err("blockdev-add", node.clone());
        assert_eq!(said, theirs.qmp.err("blockdev-add", node), "{case}");
    }
}

#[test]
fn nodes_are_listed_as_qemu_lists_them() {
    if !(requires("qemu-storage-daemon") && requires("qemu-nbd")) {
        return;
    }
    let image = TempImage::zeroes(1 << 20);
    let peer = Peer::qemu_nbd(image.path(), &[]);
    let mut daemons = [Server::Outport, Server::Qsd].map(|it| Daemon::builder(it).start());
    let listed = daemons.each_mut().map(|daemon| {
        let node = json!({"driver": "nbd", "node-name": "n", "export": "x",
            "server": peer.address()});
        daemon.qmp.ok("blockdev-add", node);
        let nodes = daemon.qmp.ok("query-named-block-nodes", json!({}));
        let grown = daemon
            .qmp
            .err("block_resize", json!({"node-name": "n", "size": 2 << 20}));
        let resize = json!({"node-name": "n", "size": 512});
        let shrunk = daemon.qmp.ok("block_resize", resize);
        let image = &nodes[0]["image"];
        let names = ["file", "drv", "ro", "node-name"];
        let members: Vec<_> = names.iter().map(|name| nodes[0][name].clone()).collect();
        (members, image.clone(), grown, shrunk)
    });
    assert_eq!(listed[0], listed[1]);
}
