//! A guest that changes its descriptors, tables and headers while they are being served. Whatever
//! the device makes of them is allowed, within what was ever there: requests end or the ring is
//! broken, nothing else notices, and nothing is written where no descriptor pointed.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use outport_tests::vhost_user::{
    Blk, Desc, FrontEnd, Guest, NEXT, TABLE, WRITE, features, request,
};
use outport_tests::{Rng, eventually};
use serde_json::json;

use super::{Vm, add_null, daemon, export};

const ENTRIES: u64 = 128;
const ROUNDS: u32 = 3000;

/// Where buffers and tables lie: a quarter of a mebibyte, with a header at every page.
const BUFFERS: u64 = 0x4_0000;
/// No buffer is longer, so none reaches further than this past them.
const LEN_MAX: u64 = 0x4000;

fn descriptor(rng: &mut Rng, room: u64) -> Desc {
    let addr = match rng.below(16) {
        0 => 8,
        1 => u64::MAX - rng.below(64),
        _ => room + rng.below(BUFFERS / 16) * 16,
    };
    let len = *rng.pick(&[0, 1, 15, 16, 17, 48, 512, 513, 4096, LEN_MAX as u32]);
    let flags = *rng.pick(&[0, NEXT, NEXT, NEXT | WRITE, WRITE, TABLE, TABLE | NEXT]);
    let next = rng.below(ENTRIES + 2) as u16;
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

fn header(rng: &mut Rng) -> Vec<u8> {
    let kind = *rng.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 99]);
    Blk::header(kind, rng.below(2100))
}

/// Writes at random until it is told to stop.
fn scribble(guest: &Guest, ring: u64, room: u64, stop: &AtomicBool) {
    let mut rng = Rng::new(77);
    while !stop.load(Ordering::Relaxed) {
        let one = descriptor(&mut rng, room).bytes();
        guest.write(ring + rng.below(ENTRIES) * 16, &one);
        guest.write(room + rng.below(BUFFERS / 16) * 16, &one);
        let header = header(&mut rng);
        guest.write(room + rng.below(BUFFERS / 4096) * 4096, &header);
    }
}

#[test]
fn descriptors_that_change_while_they_are_served_harm_nobody() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    add_null(&mut daemon, "victim");
    let path = export(&mut daemon, "disk", json!({}));
    let mut victim = Vm::start(&export(&mut daemon, "victim", json!({})), 0);
    let before = descriptors(daemon.pid());
    let wanted = features::INDIRECT | features::FLUSH | features::DISCARD | features::WRITE_ZEROES;
    let mut vm = Vm::with(FrontEnd::negotiated(&path, wanted), Guest::new(8 << 20));
    let (ring, room) = (vm.disk.queue.base, vm.disk.room);
    let guard = room + BUFFERS + LEN_MAX;
    let kept = Rng::new(1).bytes(1 << 20);
    vm.guest.write(guard, &kept);
    let memory = vm.guest.fd().try_clone_to_owned().unwrap();
    let (stop, mut broken, mut served) = (AtomicBool::new(false), 0, 0);
    std::thread::scope(|scope| {
        let scribbler = scope.spawn(|| scribble(&Guest::of(memory, 8 << 20), ring, room, &stop));
        let mut rng = Rng::new(3);
        for _ in 0..ROUNDS {
            vm.disk.queue.offer(&vm.guest, rng.below(ENTRIES) as u16);
            vm.disk.queue.kick();
            let ended = eventually("the request ends, or the ring", || {
                for _ in 0..1000 {
                    if vm.disk.queue.take(&vm.guest).is_some() {
                        return Some(true);
                    }
                    let err = vm.disk.queue.err.as_fd();
                    if rustix::io::read(err, &mut [0; 8]).is_ok() {
                        return Some(false);
                    }
                }
                None
            });
            if ended {
                served += 1;
            } else {
                broken += 1;
                vm.restart();
            }
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
    });
    assert!(served > 0 && broken > 0, "{served} served, {broken} broken");
    assert!(vm.guest.read(guard, 1 << 20) == kept, "written elsewhere");
    victim.read(0, 512);
    vm.front_end.stop(0);
    vm.front_end.ok(request::RESET_DEVICE, &[], &[]);
    drop(vm);
    Vm::start(&path, 0).read(0, 512);
    eventually("no descriptor is left over", || {
        (descriptors(daemon.pid()) <= before).then_some(())
    });
    drop(victim);
    daemon.stop();
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}
