//! What a guest can make a data thread hold.

use outport_tests::eventually;
use outport_tests::vhost_user::{blk, features};
use serde_json::json;

use super::{Vm, add_null, daemon, export};

const REQUESTS: u16 = 128;
const LEN: u32 = 768 << 10;
/// As many as 64 MiB have room for, and the one that goes beyond.
const TAKEN: u16 = 86;

/// Many requests may name one buffer, and wait: what is beyond the bound stays in the ring.
#[test]
fn the_payload_in_flight_is_bounded() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    // Almost nothing goes through.
    let group = json!({"qom-type": "throttle-group", "id": "group", "limits": {"bps-read": 1}});
    daemon.qmp.ok("object-add", group);
    let node = json!({"driver": "throttle", "node-name": "slow", "throttle-group": "group",
        "file": "disk"});
    daemon.qmp.ok("blockdev-add", node);
    let path = export(&mut daemon, "slow", json!({}));
    let mut vm = Vm::start(&path, features::EVENT_IDX);
    vm.disk.prepare(&vm.guest, blk::IN, 0, &[], LEN);
    for _ in 0..REQUESTS {
        vm.disk.queue.offer(&vm.guest, 0);
    }
    vm.disk.queue.kick();
    // Where it wants the next kick is how far it has taken.
    let used = vm.disk.queue.used_ring();
    let event = used + 4 + 8 * u64::from(vm.disk.queue.size);
    eventually("as many are in flight as may be", || {
        let taken = vm.guest.read16(event);
        (taken.wrapping_sub(vm.guest.read16(used + 2)) == TAKEN).then_some(())
    });
    let free = json!({"path": "group", "property": "limits", "value": {"bps-read": 0}});
    daemon.qmp.ok("qom-set", free);
    for _ in 0..REQUESTS {
        vm.disk.queue.wait(&vm.guest);
    }
    assert_eq!(vm.guest.read(vm.disk.room + 16, 1), [blk::OK]);
    drop(vm);
    daemon.stop();
}
