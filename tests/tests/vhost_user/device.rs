//! What a guest may rely on: data, features, configuration, durability.

use std::os::fd::AsFd;

use outport_tests::vhost_user::{FrontEnd, Guest, Packed, blk, features, protocol, request};
use outport_tests::{TempImage, check_image, pattern};
use serde_json::json;

use super::{Vm, add_null, daemon, export, with_image};

const MIB: usize = 1 << 20;

#[test]
fn what_was_written_is_read_and_lies_in_the_image() {
    for image in [
        TempImage::zeroes(8 << 20),
        TempImage::qcow2(8 << 20, ""),
        TempImage::qcow2(8 << 20, "cluster_size=4k"),
    ] {
        let (daemon, path) = with_image(&image, json!({}));
        let mut vm = Vm::start(&path, features::FLUSH | features::EVENT_IDX);
        assert_eq!(vm.front_end.capacity(), 8 << 20);
        let content = pattern(MIB, 7);
        for (n, part) in (0..).zip(content.chunks(MIB / 4)) {
            vm.write(1000 + n * 512, part);
        }
        assert_eq!(vm.read(1000, MIB as u32), content);
        assert_eq!(vm.read(0, 4096), vec![0; 4096]);
        assert_eq!(vm.run(blk::FLUSH, 0, &[], 0), (blk::OK, 1));
        daemon.stop();
        let at = 1000 * 512;
        assert_eq!(image.content()[at..at + MIB], content);
        if image.format() == "qcow2" {
            check_image(image.path(), "after the guest");
        }
    }
}

#[test]
fn discards_and_zeroes_take_several_segments() {
    let content = pattern(MIB, 1);
    let image = TempImage::raw(&content);
    let (_daemon, path) = with_image(&image, json!({}));
    let wanted = features::DISCARD | features::WRITE_ZEROES;
    let mut vm = Vm::start(&path, wanted);
    let segment = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend_from_slice(&sectors.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes
    };
    let two = [segment(8, 8, 1), segment(100, 1, 0)].concat();
    assert_eq!(vm.run(blk::WRITE_ZEROES, 0, &two, 0), (blk::OK, 1));
    let mut expected = content;
    expected[8 * 512..16 * 512].fill(0);
    expected[100 * 512..101 * 512].fill(0);
    assert_eq!(vm.read(0, MIB as u32), expected);
    let two = [segment(1024, 8, 0), segment(1040, 8, 0)].concat();
    assert_eq!(vm.run(blk::DISCARD, 0, &two, 0), (blk::OK, 1));
    expected[1024 * 512..1032 * 512].fill(0);
    expected[1040 * 512..1048 * 512].fill(0);
    assert_eq!(vm.read(0, MIB as u32), expected);
    for (kind, bad, status) in [
        (blk::DISCARD, segment(0, 8, 1), blk::UNSUPP),
        (blk::WRITE_ZEROES, segment(0, 8, 2), blk::UNSUPP),
        (blk::WRITE_ZEROES, segment(2047, 2, 0), blk::IOERR),
        (blk::WRITE_ZEROES, segment(u64::MAX, 1, 0), blk::IOERR),
        (blk::DISCARD, segment(0, u32::MAX, 0), blk::IOERR),
        (blk::DISCARD, vec![0; 15], blk::IOERR),
        (blk::DISCARD, Vec::new(), blk::IOERR),
        (blk::DISCARD, vec![0; 16 * 65], blk::IOERR),
    ] {
        assert_eq!(vm.run(kind, 0, &bad, 0).0, status, "{bad:?}");
    }
    assert_eq!(vm.read(0, MIB as u32), expected, "nothing else happened");
}

#[test]
fn the_serial_number_is_the_id_or_what_was_said() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    add_null(&mut daemon, "other");
    let path = export(&mut daemon, "disk", json!({}));
    let mut vm = Vm::start(&path, 0);
    assert_eq!(vm.run(blk::GET_ID, 0, &[], 20), (blk::OK, 21));
    let said = |vm: &Vm, len| vm.guest.read(vm.disk.room + 0x1000, len);
    assert_eq!(said(&vm, 20), *b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let serial = "01234567890123456789";
    let path = export(&mut daemon, "other", json!({"serial": serial}));
    let mut vm = Vm::start(&path, 0);
    assert_eq!(vm.run(blk::GET_ID, 0, &[], 20), (blk::OK, 21));
    assert_eq!(said(&vm, 20), serial.as_bytes());
    assert_eq!(vm.run(blk::GET_ID, 0, &[], 4), (blk::OK, 5));
}

#[test]
fn a_read_only_export_says_so_and_refuses_writes() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({"writable": false}));
    let mut vm = Vm::start(&path, features::RO);
    let offered = vm.front_end.get(request::GET_FEATURES);
    let writes = features::DISCARD | features::WRITE_ZEROES;
    assert_eq!(offered & writes, 0);
    assert_eq!(vm.run(blk::OUT, 0, &[1; 512], 0).0, blk::IOERR);
    assert_eq!(vm.run(blk::WRITE_ZEROES, 0, &[0; 16], 0).0, blk::IOERR);
    vm.read(0, 512);
}

#[test]
fn the_cache_mode_is_what_the_export_does() {
    for (writethrough, mode) in [(false, 1), (true, 0)] {
        let mut daemon = daemon();
        add_null(&mut daemon, "disk");
        let path = export(&mut daemon, "disk", json!({"writethrough": writethrough}));
        let wanted = features::FLUSH | features::CONFIG_WCE;
        let mut front_end = FrontEnd::negotiated(&path, wanted);
        assert_eq!(front_end.config(32, 1), [mode]);
        front_end.set_writeback(false);
        assert_eq!(front_end.config(32, 1), [0]);
        front_end.set_writeback(true);
        assert_eq!(front_end.config(32, 1), [1]);
    }
}

/// A flush of the node fails from now on: whoever gets an answer that is not an error flushed
/// nothing.
#[test]
fn what_must_be_durable_fails_when_flushing_does() {
    // Not an image: opening one may flush, too.
    let image = TempImage::zeroes(1 << 20);
    let mut daemon = daemon();
    let file = json!({"driver": "file", "filename": image.str()});
    let rule = json!({"event": "flush_to_disk", "errno": 5, "once": false});
    let debug = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
    let node = json!({"driver": "raw", "node-name": "disk", "file": debug});
    daemon.qmp.ok("blockdev-add", node);
    let path = export(&mut daemon, "disk", json!({}));
    let zeroes = features::WRITE_ZEROES;
    let mut vm = Vm::start(&path, features::FLUSH | features::CONFIG_WCE | zeroes);
    let segment = [[0; 8], [1, 0, 0, 0, 0, 0, 0, 0]].concat();
    vm.write(0, &[1; 512]);
    assert_eq!(vm.run(blk::FLUSH, 0, &[], 0), (blk::IOERR, 1));
    vm.front_end.set_writeback(false);
    assert_eq!(vm.run(blk::WRITE_ZEROES, 0, &segment, 0), (blk::IOERR, 1));
    // A driver that cannot flush is promised durability with every write.
    drop(vm);
    let mut vm = Vm::start(&path, zeroes);
    assert_eq!(vm.run(blk::WRITE_ZEROES, 0, &segment, 0), (blk::IOERR, 1));
    drop(vm);
    daemon
        .qmp
        .ok("block-export-del", json!({"id": "disk", "mode": "hard"}));
}

#[test]
fn a_resize_is_told_and_seen() {
    let image = TempImage::zeroes(1 << 20);
    let (mut daemon, path) = with_image(&image, json!({}));
    let mut vm = Vm::start(&path, 0);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(outport_tests::DEADLINE))
        .unwrap();
    let fd = [theirs.as_fd()];
    vm.front_end.ok(request::SET_BACKEND_REQ_FD, &[], &fd);
    assert_eq!(vm.run(blk::IN, 2048, &[], 512).0, blk::IOERR);
    daemon.qmp.ok(
        "block_resize",
        json!({"node-name": "disk", "size": 2 << 20}),
    );
    let mut notice = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut notice).unwrap();
    // CONFIG_CHANGE_MSG, version 1, nothing else.
    assert_eq!(notice, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(vm.front_end.capacity(), 2 << 20);
    vm.write(4095, &[7; 512]);
    assert_eq!(vm.run(blk::IN, 4096, &[], 512).0, blk::IOERR);
}

#[test]
fn pages_that_are_written_are_logged_while_that_is_wanted() {
    let image = TempImage::random(1 << 20, 5);
    let (_daemon, path) = with_image(&image, json!({}));
    let mut vm = Vm::start(&path, features::FLUSH);
    let log = Guest::new(4096);
    let payload = [4096_u64.to_ne_bytes(), 0_u64.to_ne_bytes()].concat();
    let reply = vm
        .front_end
        .call(request::SET_LOG_BASE, &payload, &[log.fd()]);
    reply.unwrap();
    let page = |addr: u64| log.read(Guest::BASE + addr / 4096 / 8, 1)[0] >> (addr / 4096 % 8) & 1;
    let all = || {
        log.read(Guest::BASE, 4096)
            .iter()
            .map(|it| it.count_ones())
            .sum::<u32>()
    };
    vm.read(0, 512);
    assert_eq!(all(), 0, "nobody wants it yet");
    let with_log = features::FLUSH | features::PROTOCOL | features::VERSION_1 | features::LOG_ALL;
    vm.front_end
        .ok(request::SET_FEATURES, &with_log.to_ne_bytes(), &[]);
    let logged = vm.disk.queue.addresses_with(1, vm.disk.queue.used_ring());
    vm.front_end.ok(request::SET_VRING_ADDR, &logged, &[]);
    vm.read(0, 8192);
    let (room, used) = (vm.disk.room, vm.disk.queue.used_ring());
    for addr in [room, room + 0x1000, room + 0x2000, used] {
        assert_eq!(page(addr), 1, "{addr:#x}");
    }
    assert_eq!(all(), 4, "status byte, two pages of data, used ring");
    let without = with_log & !features::LOG_ALL;
    vm.front_end
        .ok(request::SET_FEATURES, &without.to_ne_bytes(), &[]);
    log.write(Guest::BASE, &[0; 4096]);
    vm.read(0, 8192);
    assert_eq!(all(), 0, "nobody wants it any more");
}

#[test]
fn a_packed_ring_goes_round() {
    let image = TempImage::random(1 << 20, 9);
    let content = image.content();
    let (_daemon, path) = with_image(&image, json!({}));
    let mut front_end = FrontEnd::negotiated(&path, features::PACKED);
    let guest = Guest::new(8 << 20);
    front_end.add_memory(&guest);
    // Seven is no power of two, and three buffers do not divide it.
    let mut ring = Packed::new(0, 7);
    front_end.start(&ring.split, 0x8000_8000);
    let room = Guest::BASE + 0x20_0000;
    for sector in 0..100_u64 {
        guest.write(
            room,
            &outport_tests::vhost_user::Blk::header(blk::IN, sector),
        );
        guest.write(room + 16, &[0xee]);
        let chain = [
            (room, 16, false),
            (room + 512, 512, true),
            (room + 16, 1, true),
        ];
        ring.offer(&guest, (sector % 7) as u16, &chain);
        ring.split.kick();
        let used = outport_tests::eventually("the buffer is used", || ring.take(&guest));
        assert_eq!(used, ((sector % 7) as u16, 513));
        assert_eq!(guest.read(room + 16, 1), [blk::OK]);
        let at = sector as usize * 512;
        assert_eq!(
            guest.read(room + 512, 512),
            content[at..at + 512],
            "{sector}"
        );
    }
    // 300 places are 42 rounds and 6: an even number, so the wrap bit is set.
    assert_eq!(front_end.stop(0), 0x8006_8006);
}

#[test]
fn the_protocol_offers_what_was_promised() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({"num-queues": 65535}));
    let mut front_end = FrontEnd::connect(&path).unwrap();
    let offered = front_end.get(request::GET_FEATURES);
    for bit in [2, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32, 34] {
        assert_ne!(offered & 1 << bit, 0, "feature {bit}");
    }
    front_end.negotiate(features::MQ);
    assert_eq!(front_end.get(request::GET_QUEUE_NUM), 65535);
    assert_eq!(front_end.get(request::GET_MAX_MEM_SLOTS), 509);
    assert_eq!(front_end.config(34, 2), [0xff, 0xff]);
    assert_ne!(
        protocol::INFLIGHT & front_end.get(request::GET_PROTOCOL_FEATURES),
        0
    );
}
