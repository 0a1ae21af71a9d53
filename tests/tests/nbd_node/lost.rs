//! Connections that end: requests wait, are sent again, or fail, as `reconnect-delay` says.

use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use outport_tests::nbd::wire::cmd;
use outport_tests::{TempImage, assert_same, eventually, requires};
use serde_json::json;

use super::hostile::serve;
use super::peer::Peer;
use super::{MIB, add, through};
use outport_tests::{Daemon, Server};

const LEN: usize = 4 * MIB;

#[test]
fn a_server_that_dies_and_comes_back_loses_no_request() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::zeroes(LEN as u64);
    let mut peer = Peer::qemu_nbd(image.path(), &[]);
    let daemon = through(&peer, json!({"reconnect-delay": 60}));
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut client = daemon.client("disk");
            let mut round = 0_u64;
            while !stop.load(Ordering::Relaxed) || round < 50 {
                round += 1;
                // Sixteen at a time, each to a place of its own.
                let requests: Vec<_> = (0..16)
                    .map(|n| client.request(0, cmd::WRITE, n * 65536, 65536))
                    .collect();
                for request in &requests {
                    client.send(request, &[round as u8; 65536]).unwrap();
                }
                for _ in &requests {
                    assert_eq!(client.any_outcome().unwrap().1, Ok(()), "round {round}");
                }
                let read = client.read(0, 16 * 65536).unwrap().unwrap();
                assert_same(&read, &vec![round as u8; 16 * 65536], "what was written");
            }
            client.flush().unwrap().unwrap();
            round
        });
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(150));
            peer.kill();
            std::thread::sleep(std::time::Duration::from_millis(50));
            peer.restart();
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    assert!(daemon.stderr().contains("connected to NBD server again"));
    daemon.stop();
    drop(peer);
    let content = image.content();
    assert_same(
        &content[..16 * 65536],
        &vec![written as u8; 16 * 65536],
        "the last round",
    );
}

#[test]
fn without_a_delay_requests_fail_until_the_server_is_back() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::random(LEN, 5);
    let mut peer = Peer::qemu_nbd(image.path(), &[]);
    let daemon = through(&peer, json!({}));
    let mut client = daemon.client("disk");
    assert!(client.read(0, 4096).unwrap().is_ok());
    peer.kill();
    eventually("reads fail", || {
        (client.read(0, 4096).unwrap() == Err(5)).then_some(())
    });
    assert_eq!(client.write(0, &[1; 512]).unwrap(), Err(5));
    assert_eq!(client.flush().unwrap(), Err(5));
    peer.restart();
    let read = eventually("the server is back", || client.read(0, 4096).unwrap().ok());
    let content = std::fs::read(image.path()).unwrap();
    assert_same(&read, &content[..4096], "after the restart");
}

#[test]
fn requests_wait_for_the_delay_and_no_longer() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::random(LEN, 5);
    let mut peer = Peer::qemu_nbd(image.path(), &[]);
    let daemon = through(&peer, json!({"reconnect-delay": 1}));
    let mut client = daemon.client("disk");
    peer.kill();
    // It waits, and then fails; nobody comes back.
    assert_eq!(client.read(0, 4096).unwrap(), Err(5));
    assert_eq!(client.read(0, 4096).unwrap(), Err(5), "at once now");
    peer.restart();
    eventually("the server is back", || client.read(0, 4096).unwrap().ok());
}

#[test]
fn an_export_that_changed_is_not_taken_for_the_old_one() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::random(LEN, 5);
    let mut peer = Peer::qemu_nbd(image.path(), &[]);
    let daemon = through(&peer, json!({}));
    let mut client = daemon.client("disk");
    peer.kill();
    let file = std::fs::OpenOptions::new().write(true).open(image.path());
    let file = file.unwrap();
    file.set_len(LEN as u64 / 2).unwrap();
    peer.restart();
    eventually("it is noticed", || {
        daemon
            .stderr()
            .contains("the export is not the one that it was")
            .then_some(())
    });
    assert_eq!(client.read(0, 4096).unwrap(), Err(5));
    file.set_len(LEN as u64).unwrap();
    peer.kill();
    peer.restart();
    eventually("it is the old one", || client.read(0, 4096).unwrap().ok());
}

#[test]
fn the_first_connection_waits_for_a_server_if_told_to() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::random(LEN, 5);
    let mut peer = Peer::qemu_nbd(image.path(), &[]);
    peer.kill();
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let node = json!({"driver": "nbd", "node-name": "disk", "export": "x",
        "server": peer.address(), "open-timeout": 60});
    daemon.qmp.send("blockdev-add", node);
    peer.restart();
    daemon.qmp.response("blockdev-add").unwrap();
}

#[test]
fn a_deleted_node_says_goodbye() {
    if !requires("nbdkit") {
        return;
    }
    let mut peer = Peer::nbdkit(&["--filter=exitlast", "memory", "1M"]);
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    add(&mut daemon, &peer, json!({}));
    assert!(!peer.has_ended());
    daemon.qmp.ok("blockdev-del", json!({"node-name": "disk"}));
    eventually("the last client has left", || {
        peer.has_ended().then_some(())
    });
}

#[test]
fn a_mute_server_does_not_hold_up_the_end() {
    if !requires("qemu-nbd") {
        return;
    }
    let image = TempImage::random(LEN, 5);
    // With a delay that is far longer than anybody waits for a daemon to end.
    let peer = Peer::qemu_nbd(image.path(), &[]);
    let daemon = through(&peer, json!({"reconnect-delay": 3600}));
    let mut client = daemon.client("disk");
    assert!(client.read(0, 4096).unwrap().is_ok());
    peer.mute();
    let request = client.request(0, cmd::READ, 0, 4096);
    client.send(&request, &[]).unwrap();
    daemon.stop();
}

#[test]
fn a_server_that_leaves_while_the_daemon_ends_is_not_waited_for() {
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let path = daemon.path("peer.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (asked, requests) = mpsc::channel();
    let server = std::thread::spawn({
        let path = path.clone();
        move || {
            let (stream, _) = listener.accept().unwrap();
            // Nobody gets in again.
            std::fs::remove_file(path).unwrap();
            drop(listener);
            let end = stream.try_clone().unwrap();
            let keep = move |_| {
                asked.send(end.try_clone().unwrap()).unwrap();
                Vec::new()
            };
            // It ends when the connection does.
            let _ = serve(stream, cmd::READ, &keep);
        }
    });
    let node = json!({"driver": "nbd", "node-name": "disk",
        "server": {"type": "unix", "path": path}, "reconnect-delay": 3600});
    daemon.qmp.ok("blockdev-add", node);
    daemon.add_export("disk", true);
    let mut client = daemon.client("disk");
    let request = client.request(0, cmd::READ, 0, 4096);
    client.send(&request, &[]).unwrap();
    let connection = requests.recv().unwrap();
    daemon.qmp.send("quit", json!({}));
    // Within the seconds that a server has to answer; if it is too early or too late, this proves
    // nothing, and does not fail.
    std::thread::sleep(std::time::Duration::from_millis(500));
    connection.shutdown(Shutdown::Both).unwrap();
    let status = daemon.wait();
    assert!(status.success(), "{status}: {}", daemon.stderr());
    server.join().unwrap();
}
