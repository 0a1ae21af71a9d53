//! Data threads look at their rings before they sleep, within the bounds of their iothread object.

use std::time::{Duration, Instant};

use outport_tests::eventually;
use outport_tests::vhost_user::{Split, blk};
use serde_json::json;

use super::{Vm, add_null, daemon, export};

/// Longer than any wait of this test.
const LONG_NS: u64 = 10_000_000_000;

/// Does the device ask not to be kicked? (`VRING_USED_F_NO_NOTIFY`)
fn looks(vm: &Vm) -> bool {
    let queue: &Split = &vm.disk.queue;
    vm.guest.read16(queue.used_ring()) & 1 != 0
}

/// A request that nobody tells the device of: is it served all the same, before long?
fn is_served_unkicked(vm: &mut Vm) -> bool {
    vm.disk.prepare(&vm.guest, blk::IN, 0, &[], 512);
    vm.disk.queue.offer(&vm.guest, 0);
    let offered = Instant::now();
    while offered.elapsed() < Duration::from_millis(20) {
        if looks(vm) && vm.disk.queue.take(&vm.guest).is_some() {
            return true;
        }
    }
    vm.disk.queue.kick();
    vm.disk.queue.wait(&vm.guest);
    false
}

#[test]
fn a_thread_polls_within_the_bounds_of_its_object() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let object = json!({"qom-type": "iothread", "id": "io", "poll-max-ns": LONG_NS});
    daemon.qmp.ok("object-add", object);
    let path = export(&mut daemon, "disk", json!({"iothread": "io"}));
    let mut vm = Vm::start(&path, 0);
    // The window doubles with each request that comes after it.
    eventually("a request is seen without a kick", || {
        is_served_unkicked(&mut vm).then_some(())
    });
    let off = json!({"path": "io", "property": "poll-max-ns", "value": 0});
    daemon.qmp.ok("qom-set", off);
    vm.read(0, 512);
    eventually("kicks are wanted again", || (!looks(&vm)).then_some(()));
    // Its first and only window is over; there is no other.
    vm.read(0, 512);
    eventually("kicks are wanted again", || (!looks(&vm)).then_some(()));
}
