//! Options, sockets, front-ends that come and go, and removal.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use outport_tests::vhost_user::{Blk, FrontEnd, Guest, blk, features, request};
use outport_tests::{TempImage, eventually};
use rustix::fs::MemfdFlags;
use serde_json::json;

use super::{Vm, add_null, daemon, export, options, with_image};

#[test]
fn bad_options_are_refused() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = daemon.path("disk.sock");
    let size = "parameter logical-block-size must be a power of 2 between 512 and 2097152";
    for (members, text) in [
        (json!({"logical-block-size": 0}), size),
        (json!({"logical-block-size": 513}), size),
        (json!({"logical-block-size": 4 << 20}), size),
        (
            json!({"num-queues": 0}),
            "num-queues must be greater than 0",
        ),
        (
            json!({"num-queues": 65536}),
            "Parameter 'num-queues' expects uint16_t",
        ),
        (
            json!({"queue-size": 100}),
            "queue-size must be a power of 2 up to 32768",
        ),
        (
            json!({"serial": "123456789012345678901"}),
            "serial must not be longer than 20 bytes",
        ),
        (
            json!({"addr": {"type": "inet", "host": "::1", "port": "0"}}),
            "Only socket address types 'unix' and 'fd' are supported",
        ),
    ] {
        let error = daemon
            .qmp
            .err("block-export-add", options(&path, "disk", members));
        assert_eq!(error.1, text);
        assert!(!path.exists());
    }
}

#[test]
fn a_path_that_is_taken_is_left_alone() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    add_null(&mut daemon, "other");
    let path = export(&mut daemon, "disk", json!({}));
    let error = daemon
        .qmp
        .err("block-export-add", options(&path, "other", json!({})));
    assert!(error.1.ends_with(": Address already in use"), "{}", error.1);
    Vm::start(&path, 0).read(0, 512);
    let file = daemon.path("file");
    std::fs::write(&file, "data").unwrap();
    daemon
        .qmp
        .err("block-export-add", options(&file, "other", json!({})));
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
    // What a killed daemon leaves behind makes way.
    let stale = daemon.path("stale");
    drop(UnixListener::bind(&stale).unwrap());
    daemon
        .qmp
        .ok("block-export-add", options(&stale, "other", json!({})));
    Vm::start(&stale, 0).read(0, 512);
}

#[test]
fn a_front_end_is_a_user_and_the_socket_goes_with_the_export() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let mut vm = Vm::start(&path, 0);
    let error = daemon.qmp.err("block-export-del", json!({"id": "disk"}));
    assert_eq!(error.1, "export 'disk' still in use");
    vm.read(0, 512);
    daemon
        .qmp
        .ok("block-export-del", json!({"id": "disk", "mode": "hard"}));
    assert!(vm.front_end.receive().is_err(), "it is cut off");
    assert!(!path.exists());
    eventually("the id is free again", || {
        let exports = daemon.qmp.ok("query-block-exports", json!({}));
        exports.as_array().unwrap().is_empty().then_some(())
    });
    // Without a front-end it is not in use, and the path can be used at once.
    let path = export(&mut daemon, "disk", json!({}));
    daemon.qmp.ok("block-export-del", json!({"id": "disk"}));
    assert!(!path.exists());
    let path = export(&mut daemon, "disk", json!({}));
    drop(FrontEnd::connect(&path).unwrap());
    daemon.stop();
    assert!(!path.exists());
}

#[test]
fn the_next_front_end_waits_and_begins_anew() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let mut first = Vm::start(&path, features::CONFIG_WCE | features::FLUSH);
    first.front_end.set_writeback(false);
    let mut second = FrontEnd::connect(&path).unwrap();
    let number = request::GET_FEATURES;
    second.send(number, 1, &[], &[]).unwrap();
    second.socket().set_nonblocking(true).unwrap();
    first.read(0, 512);
    assert!(second.receive().is_err(), "one at a time");
    second.socket().set_nonblocking(false).unwrap();
    drop(first);
    assert_eq!(second.receive().unwrap().request, number);
    second.negotiate(features::CONFIG_WCE | features::FLUSH);
    assert_eq!(second.config(32, 1), [1], "nothing of the first is left");
}

/// Deleting an export ends well at any point of a handshake, and with requests in flight.
#[test]
fn removal_comes_at_any_time() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    for point in 0..6 {
        let path = export(&mut daemon, "disk", json!({}));
        let mut front_end = FrontEnd::connect(&path).unwrap();
        match point {
            0 => {}
            1 => front_end.send_bytes(&[1, 0, 0], &[]).unwrap(),
            2 => front_end
                .send_bytes(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], &[])
                .unwrap(),
            3 => front_end.negotiate(0),
            // Answers that nobody reads.
            4 => loop {
                front_end.socket().set_nonblocking(true).unwrap();
                if front_end.send(request::GET_FEATURES, 1, &[], &[]).is_err() {
                    break;
                }
            },
            _ => front_end
                .socket()
                .shutdown(std::net::Shutdown::Write)
                .unwrap(),
        }
        daemon
            .qmp
            .ok("block-export-del", json!({"id": "disk", "mode": "hard"}));
        eventually("it is gone", || {
            let exports = daemon.qmp.ok("query-block-exports", json!({}));
            exports.as_array().unwrap().is_empty().then_some(())
        });
    }
    daemon.stop();
}

#[test]
fn queues_are_spread_over_iothreads_and_all_serve() {
    let image = TempImage::random(1 << 20, 3);
    let content = image.content();
    let mut daemon = daemon();
    for id in ["a", "b"] {
        daemon
            .qmp
            .ok("object-add", json!({"qom-type": "iothread", "id": id}));
    }
    daemon.add_node("disk", &image);
    let members = json!({"num-queues": 4, "iothread": ["a", "b"]});
    let path = export(&mut daemon, "disk", members);
    let mut front_end = FrontEnd::negotiated(&path, features::MQ);
    let guest = Guest::new(Blk::memory(4));
    front_end.add_memory(&guest);
    let mut disks = [0, 1, 2, 3].map(|n| Blk::new(n, 64));
    for disk in &disks {
        front_end.start(&disk.queue, 0);
    }
    for (sector, disk) in (0..).zip(&mut disks) {
        let at = sector as usize * 512;
        assert_eq!(disk.read(&guest, sector, 512), content[at..at + 512]);
    }
    for index in 0..4 {
        assert_eq!(front_end.stop(index), 1);
    }
    // A queue that was stopped goes on where it was.
    front_end.start(&disks[3].queue, 1);
    disks[3].read(&guest, 0, 512);
}

#[test]
fn memory_comes_and_goes_while_rings_run() {
    let (_daemon, path) = with_image(&TempImage::random(1 << 20, 4), json!({}));
    let mut vm = Vm::start(&path, 0);
    let more = Guest::new(4096);
    let at = Guest::BASE + vm.guest.len();
    let region = Guest::region_of(at, 4096, at, 0);
    let status = vm.disk.room + 16;
    let into_new = |vm: &mut Vm| {
        vm.disk.prepare(&vm.guest, blk::IN, 0, &[], 512);
        // The buffer spans the end of the old region and the beginning of the new one.
        let chain = [
            (vm.disk.room, 16, false),
            (at - 256, 512, true),
            (status, 1, true),
        ];
        vm.disk.queue.put_chain(&vm.guest, 0, &chain);
        vm.disk.queue.offer(&vm.guest, 0);
        vm.disk.queue.kick();
        vm.disk.queue.wait(&vm.guest);
        vm.guest.read(status, 1)[0]
    };
    assert_eq!(into_new(&mut vm), blk::IOERR);
    vm.front_end.ok(request::ADD_MEM_REG, &region, &[more.fd()]);
    assert_eq!(into_new(&mut vm), blk::OK);
    let sector = vm.read(0, 512);
    let base = Guest::BASE;
    assert_eq!(vm.guest.read(at - 256, 256), sector[..256]);
    assert_eq!(more.read(base, 256), sector[256..]);
    vm.front_end.ok(request::REM_MEM_REG, &region, &[]);
    assert_eq!(into_new(&mut vm), blk::IOERR);
    vm.read(0, 512);
}

/// Else the next access to what was cut off would kill the daemon.
#[test]
fn a_guest_cannot_cut_memory_that_it_shares() {
    let (_daemon, path) = with_image(&TempImage::random(1 << 20, 4), json!({}));
    let len = Blk::memory(1);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("guest", flags).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    let mut vm = Vm::with(FrontEnd::negotiated(&path, 0), Guest::of(fd, len));
    let cut = rustix::fs::ftruncate(vm.guest.fd(), 0);
    assert_eq!(cut, Err(rustix::io::Errno::PERM));
    vm.read(0, 512);
    // Nor the region that tracks its requests.
    let counts = 1_u64 | 64 << 16;
    let wanted = [0, 0, counts].map(u64::to_ne_bytes).concat();
    let reply = vm.front_end.call(request::GET_INFLIGHT_FD, &wanted, &[]);
    let cut = rustix::fs::ftruncate(&reply.unwrap().fds[0], 0);
    assert_eq!(cut, Err(rustix::io::Errno::PERM));
}

#[test]
fn a_kick_descriptor_that_was_replaced_stays_so() {
    let (_daemon, path) = with_image(&TempImage::random(1 << 20, 4), json!({}));
    let mut vm = Vm::start(&path, 0);
    vm.read(0, 512);
    let old = std::mem::replace(&mut vm.disk.queue.kick, Blk::new(0, 128).queue.kick);
    let number = 0_u64.to_ne_bytes();
    let new = vm.disk.queue.kick.as_fd();
    vm.front_end.ok(request::SET_VRING_KICK, &number, &[new]);
    vm.read(0, 512);
    // The old one must not wake the device by being ready still.
    rustix::io::read(&old, &mut [0; 8]).unwrap();
    for enable in [0_u32, 1] {
        let payload = [0, enable].map(u32::to_ne_bytes).concat();
        vm.front_end.ok(request::SET_VRING_ENABLE, &payload, &[]);
    }
    vm.read(0, 512);
}

#[test]
fn a_ring_without_a_kick_descriptor_is_looked_at() {
    let (_daemon, path) = with_image(&TempImage::random(1 << 20, 4), json!({}));
    let mut front_end = FrontEnd::negotiated(&path, 0);
    let guest = Guest::new(Blk::memory(1));
    front_end.add_memory(&guest);
    let mut disk = Blk::new(0, 64);
    front_end.describe(&disk.queue, 0);
    front_end.ok(request::SET_VRING_ENABLE, &[0, 0, 0, 0, 1, 0, 0, 0], &[]);
    front_end.ok(request::SET_VRING_KICK, &0x100_u64.to_ne_bytes(), &[]);
    disk.read(&guest, 0, 512);
}
