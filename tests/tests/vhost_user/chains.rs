//! Descriptor chains that no driver should make. A request fails where it has a status byte; a
//! chain without one breaks its ring. Nothing else notices, and nothing is left behind.

use outport_tests::vhost_user::{Blk, Desc, Guest, NEXT, TABLE, WRITE, blk, features};
use serde_json::json;

use super::{Vm, add_null, daemon, export};

/// What becomes of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Status(u8),
    Broken,
}

use End::{Broken, Status};

const IOERR: End = Status(blk::IOERR);

/// Addresses in the room of the ring: header, status, data, table.
struct At {
    header: u64,
    status: u64,
    data: u64,
    table: u64,
    end: u64,
}

impl At {
    fn of(vm: &Vm) -> Self {
        Self {
            header: vm.disk.room,
            status: vm.disk.room + 16,
            data: vm.disk.room + 0x1000,
            table: vm.disk.room + 0x8000,
            end: Guest::BASE + vm.guest.len(),
        }
    }
}

type Chain = Vec<(u64, u32, bool)>;

/// Chains of plain buffers: what, how it ends, request and buffers.
#[allow(clippy::type_complexity, reason = "a table")]
fn plain(at: &At) -> Vec<(&'static str, End, u32, Chain)> {
    let (h, s, d) = (at.header, at.status, at.data);
    let status = (s, 1, true);
    vec![
        ("no status byte", Broken, blk::IN, vec![(h, 16, false)]),
        (
            "only data to write",
            Broken,
            blk::OUT,
            vec![(h, 16, false), (d, 512, false)],
        ),
        (
            "no buffers of any length",
            Broken,
            blk::IN,
            vec![(h, 0, false), (s, 0, true)],
        ),
        (
            "a status byte outside of memory",
            Broken,
            blk::IN,
            vec![(h, 16, false), (8, 1, true)],
        ),
        (
            "a status byte at the end of addresses",
            Broken,
            blk::IN,
            vec![(h, 16, false), (u64::MAX, 1, true)],
        ),
        (
            "a status byte that wraps",
            Broken,
            blk::IN,
            vec![(h, 16, false), (u64::MAX, 8, true)],
        ),
        ("only a status byte", IOERR, blk::IN, vec![status]),
        (
            "a header of 15 bytes",
            IOERR,
            blk::IN,
            vec![(h, 15, false), (d, 512, true), status],
        ),
        (
            "a header of no bytes",
            IOERR,
            blk::IN,
            vec![(h, 0, false), (d, 512, true), status],
        ),
        (
            "a header outside of memory",
            IOERR,
            blk::IN,
            vec![(8, 16, false), status],
        ),
        (
            "a header that ends outside of memory",
            IOERR,
            blk::IN,
            vec![(at.end - 8, 16, false), status],
        ),
        (
            "a header for us to write",
            IOERR,
            blk::IN,
            vec![(h, 16, true), (d, 512, true), status],
        ),
        (
            "a buffer to read after one to write",
            IOERR,
            blk::OUT,
            vec![(h, 16, false), (d, 512, true), (d, 512, false), status],
        ),
        (
            "data outside of memory",
            IOERR,
            blk::IN,
            vec![(h, 16, false), (8, 512, true), status],
        ),
        (
            "data that ends outside of memory",
            IOERR,
            blk::IN,
            vec![(h, 16, false), (at.end - 8, 512, true), status],
        ),
        (
            "data that wraps",
            IOERR,
            blk::OUT,
            vec![(h, 16, false), (u64::MAX - 8, 512, false), status],
        ),
        (
            "data of 4 GiB",
            IOERR,
            blk::IN,
            vec![(h, 16, false), (d, u32::MAX, true), status],
        ),
        (
            "a write of 4 GiB",
            IOERR,
            blk::OUT,
            vec![(h, 16, false), (d, u32::MAX, false), status],
        ),
        (
            "lengths that add up to more than 64 bits hold in bytes of sectors",
            IOERR,
            blk::IN,
            vec![
                (h, 16, false),
                (d, u32::MAX, true),
                (d, u32::MAX, true),
                status,
            ],
        ),
        (
            "a read of no bytes",
            IOERR,
            blk::IN,
            vec![(h, 16, false), status],
        ),
        (
            "a write of no bytes",
            IOERR,
            blk::OUT,
            vec![(h, 16, false), status],
        ),
        (
            "a read of half a sector",
            IOERR,
            blk::IN,
            vec![(h, 16, false), (d, 256, true), status],
        ),
        (
            "a write of 513 bytes",
            IOERR,
            blk::OUT,
            vec![(h, 16, false), (d, 513, false), status],
        ),
        (
            "a read longer than the disk",
            IOERR,
            blk::IN,
            vec![
                (h, 16, false),
                (d, (1 << 20) - 0x2000, true),
                (d, 0x2200, true),
                status,
            ],
        ),
        (
            "a discard of 17 bytes",
            IOERR,
            blk::DISCARD,
            vec![(h, 16, false), (d, 17, false), status],
        ),
        (
            "a discard of nothing",
            IOERR,
            blk::DISCARD,
            vec![(h, 16, false), status],
        ),
        (
            "a segment outside of memory",
            IOERR,
            blk::WRITE_ZEROES,
            vec![(h, 16, false), (8, 16, false), status],
        ),
        (
            "an unknown request",
            Status(blk::UNSUPP),
            99,
            vec![(h, 16, false), status],
        ),
        (
            "secure erase",
            Status(blk::UNSUPP),
            14,
            vec![(h, 16, false), (d, 16, false), status],
        ),
        (
            "a SCSI command",
            Status(blk::UNSUPP),
            2,
            vec![(h, 16, false), status],
        ),
        // Odd, and allowed.
        (
            "a header in pieces",
            Status(blk::OK),
            blk::IN,
            vec![
                (h, 3, false),
                (h + 3, 0, false),
                (h + 3, 13, false),
                (d, 512, true),
                status,
            ],
        ),
        (
            "status and data in one buffer",
            Status(blk::OK),
            blk::IN,
            vec![(h, 16, false), (s + 1 - 513, 513, true)],
        ),
        (
            "header and data in one buffer",
            Status(blk::OK),
            blk::OUT,
            vec![(h, 16 + 512, false), (d, 1, true)],
        ),
        (
            "an empty buffer at the end",
            Status(blk::OK),
            blk::IN,
            vec![(h, 16, false), (d, 512, true), status, (8, 0, true)],
        ),
        (
            "a flush with data",
            Status(blk::OK),
            blk::FLUSH,
            vec![(h, 16, false), (d, 512, true), status],
        ),
    ]
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// Descriptors as they are, and an indirect table.
#[allow(clippy::type_complexity, reason = "a table")]
fn linked(at: &At) -> Vec<(&'static str, End, Vec<Desc>, Vec<Desc>)> {
    let (h, s, d, t) = (at.header, at.status, at.data, at.table);
    let table = |len: u32| vec![desc(t, len, TABLE, 0)];
    let good = || {
        vec![
            desc(h, 16, NEXT, 1),
            desc(d, 512, NEXT | WRITE, 2),
            desc(s, 1, WRITE, 0),
        ]
    };
    vec![
        (
            "a descriptor that follows itself",
            Broken,
            vec![desc(h, 16, NEXT, 0)],
            vec![],
        ),
        (
            "a loop of two",
            Broken,
            vec![desc(h, 16, NEXT, 1), desc(d, 1, NEXT, 0)],
            vec![],
        ),
        (
            "a descriptor outside of the ring",
            Broken,
            vec![desc(h, 16, NEXT, 128)],
            vec![],
        ),
        (
            "descriptor 65535",
            Broken,
            vec![desc(h, 16, NEXT, 65535)],
            vec![],
        ),
        ("a table", Status(blk::OK), table(48), good()),
        ("a table of no bytes", Broken, table(0), good()),
        ("a table of 47 bytes", Broken, table(47), good()),
        ("a table of 4 GiB", Broken, table(u32::MAX - 15), good()),
        (
            "a table outside of memory",
            Broken,
            vec![desc(8, 48, TABLE, 0)],
            vec![],
        ),
        (
            "a table that ends outside of memory",
            Broken,
            vec![desc(at.end - 16, 48, TABLE, 0)],
            vec![],
        ),
        (
            "a table at the end of addresses",
            Broken,
            vec![desc(!15, 32, TABLE, 0)],
            vec![],
        ),
        (
            "a table and a descriptor after it",
            Broken,
            vec![desc(t, 48, TABLE | NEXT, 1), desc(s, 1, WRITE, 0)],
            good(),
        ),
        (
            "a table inside a table",
            Broken,
            table(16),
            vec![desc(t, 16, TABLE, 0)],
        ),
        (
            "a loop inside a table",
            Broken,
            table(16),
            vec![desc(h, 16, NEXT, 0)],
        ),
        (
            "an index outside of its table",
            Broken,
            table(16),
            vec![desc(h, 16, NEXT, 1)],
        ),
        (
            "a table in the middle of a chain",
            Status(blk::OK),
            vec![desc(h, 16, NEXT, 1), desc(t, 32, TABLE, 0)],
            vec![desc(d, 512, NEXT | WRITE, 1), desc(s, 1, WRITE, 0)],
        ),
        (
            "a table without a status byte",
            Broken,
            table(16),
            vec![desc(h, 16, 0, 0)],
        ),
    ]
}

#[test]
fn every_odd_chain_ends_as_promised() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    add_null(&mut daemon, "victim");
    let path = export(&mut daemon, "disk", json!({}));
    let victim_path = export(&mut daemon, "victim", json!({}));
    let mut victim = Vm::start(&victim_path, 0);
    let mut vm = Vm::start(&path, features::INDIRECT | features::FLUSH);
    let at = At::of(&vm);
    let mut kinds = 0;
    let mut check = |what: &str, end: End, vm: &mut Vm, status: u64| {
        kinds += 1;
        vm.disk.queue.offer(&vm.guest, 0);
        vm.disk.queue.kick();
        match end {
            Status(wanted) => {
                assert_eq!(vm.disk.queue.wait(&vm.guest).0, 0, "{what}");
                assert_eq!(vm.guest.read(status, 1), [wanted], "{what}");
                vm.read(0, 512);
            }
            Broken => {
                vm.disk.queue.wait_broken();
                assert_eq!(vm.disk.queue.take(&vm.guest), None, "{what}");
                vm.restart();
            }
        }
        victim.read(0, 512);
    };
    for (what, end, kind, chain) in plain(&at) {
        vm.guest.write(at.header, &Blk::header(kind, 0));
        let last = chain.iter().rev().find(|it| it.1 > 0);
        let status = last.map_or(0, |it| it.0.wrapping_add(u64::from(it.1) - 1));
        vm.disk.queue.put_chain(&vm.guest, 0, &chain);
        check(what, end, &mut vm, status);
    }
    for (what, end, chain, table) in linked(&at) {
        vm.guest.write(at.header, &Blk::header(blk::IN, 0));
        for (n, desc) in (0..).zip(&chain) {
            vm.disk.queue.put(&vm.guest, n, *desc);
        }
        let table: Vec<u8> = table.iter().flat_map(Desc::bytes).collect();
        vm.guest.write(at.table, &table);
        check(what, end, &mut vm, at.status);
    }
    assert!(kinds >= 50, "{kinds} kinds");
    drop((vm, victim));
    daemon.stop();
}

/// The rings themselves, rather than what is in them.
#[test]
fn rings_that_lie_are_broken() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let mut vm = Vm::start(&path, 0);
    // A head outside of the table.
    vm.disk.queue.offer(&vm.guest, 128);
    vm.disk.queue.kick();
    vm.disk.queue.wait_broken();
    vm.restart();
    // More buffers than the ring has.
    vm.guest.write16(vm.disk.queue.available_ring() + 2, 129);
    vm.disk.queue.kick();
    vm.disk.queue.wait_broken();
    vm.restart();
    // A table that was not negotiated.
    let table = desc(vm.disk.room, 48, TABLE, 0);
    vm.disk.queue.put(&vm.guest, 0, table);
    vm.disk.queue.offer(&vm.guest, 0);
    vm.disk.queue.kick();
    vm.disk.queue.wait_broken();
    // A broken ring can be stopped, and served again after that.
    vm.restart();
    vm.read(0, 512);
}
