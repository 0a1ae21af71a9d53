//! A guest that writes and verifies without pause, while its disk's daemon is killed, or while it
//! moves to another machine.

use std::path::Path;

use outport_tests::{Daemon, Server, TempImage, check_image, eventually};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::{MIB, is_missing};

/// Times that the daemon is killed under one guest.
const KILLS: u32 = 6;

/// What the disk grows to when the guest is to come to an end.
const LARGER: u64 = 96 * MIB;

/// Four writers with a part of the disk each, past the cache; and a reader of what does not change
/// through the cache, where pages stay that only the device wrote.
const LOAD: &str = r#"
disk=/sys/block/vda
size=$(cat $disk/size)
goes_on() { [ "$(cat $disk/size)" = "$size" ]; }
differs() { echo "$1 differs in round $2"; echo broken > /broken; exit 1; }
writer() {
    round=0
    at=$((2048 + $1 * 1024))
    while goes_on && [ ! -e /broken ]; do
        dd if=/dev/urandom of=/content.$1 bs=64k count=16 2>/dev/null
        dd if=/content.$1 of=/dev/vda bs=4k seek=$at oflag=direct conv=notrunc,fsync 2>/dev/null \
            || differs "a write of writer $1" $round
        dd if=/dev/vda bs=4k skip=$at count=256 iflag=direct 2>/dev/null | cmp - /content.$1 \
            || differs "writer $1" $round
        round=$((round + 1))
    done
    echo "writer $1: $round rounds"
}
dd if=/dev/urandom of=/still bs=64k count=64 2>/dev/null
dd if=/still of=/dev/vda bs=64k conv=fsync 2>/dev/null
for number in 0 1 2 3; do writer $number & done
echo 'the load runs'
while goes_on && [ ! -e /broken ]; do
    echo 1 > /proc/sys/vm/drop_caches
    dd if=/dev/vda of=/dev/null bs=64k count=64 2>/dev/null
    dd if=/dev/vda bs=64k count=64 2>/dev/null | cmp - /still || differs 'the cache' 0
done
wait
[ ! -e /broken ] || exit 1
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=64 2>/dev/null | cmp - /still || exit 2
for number in 0 1 2 3; do
    dd if=/dev/vda bs=4k skip=$((2048 + number * 1024)) count=256 2>/dev/null \
        | cmp - /content.$number || exit 3
done
dmesg | grep -E 'I/O error|is not a head' && exit 4
exit 0
"#;

fn resize(daemon: &mut Daemon) {
    let size = json!({"node-name": "disk", "size": LARGER});
    daemon.qmp.ok("block_resize", size);
}

/// A daemon at a socket that outlives it.
fn start(image: &TempImage, socket: &Path) -> Daemon {
    let node = format!("driver=file,node-name=disk,filename={}", image.str());
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,writable=on,num-queues=4,\
         addr.type=unix,addr.path={}",
        socket.display()
    );
    let builder = Daemon::builder(Server::Outport).option("--blockdev", node);
    builder.option("--export", export).start()
}

#[test]
fn a_guest_does_not_notice_that_the_daemon_is_killed() {
    if is_missing() {
        return;
    }
    let image = TempImage::zeroes(64 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    let mut daemon = start(&image, &socket);
    let mut machine = Machine::start_faithful(&socket, LOAD);
    machine.wait_for("the load runs");
    for _ in 0..KILLS {
        let before = requests(&mut daemon);
        eventually("the guest works", || {
            (requests(&mut daemon) > before + 500).then_some(())
        });
        // Killed, as dropping does.
        drop(daemon);
        daemon = start(&image, &socket);
    }
    let before = requests(&mut daemon);
    eventually("the guest works again", || {
        (requests(&mut daemon) > before + 500).then_some(())
    });
    resize(&mut daemon);
    assert_eq!(machine.verdict(), 0, "{}", machine.console());
    drop(machine);
    daemon.stop();
}

/// Requests that the export has carried out.
fn requests(daemon: &mut Daemon) -> u64 {
    let stats = daemon.qmp.ok("query-export-stats", json!({}))[0].clone();
    let number = |name: &str| stats[name].as_u64().unwrap();
    number("rd-operations") + number("wr-operations")
}

/// The image as the node `disk`, exported; or as somebody else's for now.
fn share(image: &TempImage, active: bool) -> Daemon {
    let mut daemon = Daemon::builder(Server::Outport).start();
    let file = json!({"driver": "file", "filename": image.str()});
    let format = image.format();
    let node = json!({"driver": format, "node-name": "disk", "active": active, "file": file});
    daemon.qmp.ok("blockdev-add", node);
    let addr = json!({"type": "unix", "path": daemon.path("blk.sock")});
    let export = json!({"type": "vhost-user-blk", "id": "disk", "node-name": "disk",
        "writable": true, "num-queues": 4, "allow-inactive": true, "addr": addr});
    daemon.qmp.ok("block-export-add", export);
    daemon
}

fn set_active(daemon: &mut Daemon, active: bool) {
    let arguments = json!({"node-name": "disk", "active": active});
    daemon.qmp.ok("blockdev-set-active", arguments);
}

fn moves(image: &TempImage) {
    if is_missing() {
        return;
    }
    let (mut source, mut target) = (share(image, true), share(image, false));
    let mut here = Machine::start(&source.path("blk.sock"), LOAD);
    let mut there = Machine::incoming(&target.path("blk.sock"), LOAD);
    here.wait_for("the load runs");
    let (mut from, mut to) = (here.qmp(), there.qmp());
    // Slow enough for memory to change meanwhile.
    let slow = json!({"max-bandwidth": 32 * MIB, "downtime-limit": 100});
    from.ok("migrate-set-parameters", slow);
    from.ok("migrate", json!({"uri": there.door()}));
    eventually("memory was sent more than once", || {
        let ram = from.ok("query-migrate", json!({}))["ram"].clone();
        (ram["dirty-sync-count"].as_u64() > Some(2)).then_some(())
    });
    let fast = json!({"max-bandwidth": 1024 * MIB, "downtime-limit": 2000});
    from.ok("migrate-set-parameters", fast);
    eventually("the guest has moved", || {
        let said = from.ok("query-migrate", json!({}));
        assert_ne!(said["status"], "failed", "{said}");
        (said["status"] == "completed").then_some(())
    });
    let stands_still = |status: Value| assert_ne!(status["running"], true, "{status}");
    stands_still(from.ok("query-status", json!({})));
    set_active(&mut source, false);
    set_active(&mut target, true);
    to.ok("cont", json!({}));
    drop((from, here));
    let before = requests(&mut target);
    eventually("the guest works where it is now", || {
        (requests(&mut target) > before + 500).then_some(())
    });
    resize(&mut target);
    assert_eq!(there.verdict(), 0, "{}", there.console());
    assert!(there.console().contains("writer 3:"), "{}", there.console());
    drop((there, to));
    source.stop();
    target.stop();
    assert_eq!(image.content().len() as u64, LARGER);
    if image.format() == "qcow2" {
        check_image(image.path(), "after the move");
    }
}

#[test]
fn a_guest_on_a_raw_image_moves_under_load() {
    moves(&TempImage::zeroes(64 * MIB));
}

#[test]
fn a_guest_on_a_qcow2_image_moves_under_load() {
    moves(&TempImage::qcow2(64 * MIB, ""));
}
