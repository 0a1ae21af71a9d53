//! A real guest on vhost-user-blk exports: Debian's cloud kernel and busybox under QEMU without
//! acceleration. Each machine boots in seconds; its verdict is what its script ends with.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod initramfs;
mod machine;
mod under_load;

use outport_tests::{Daemon, Server, TempImage, check_image, requires};
use serde_json::json;

use machine::Machine;

const MIB: u64 = 1 << 20;

/// A daemon that exports the image with four queues, and the options of its export.
fn serve(image: &TempImage) -> Daemon {
    let mut daemon = Daemon::builder(Server::Outport).start();
    daemon.add_node("disk", image);
    export(&mut daemon);
    daemon
}

fn export(daemon: &mut Daemon) {
    let addr = json!({"type": "unix", "path": daemon.path("blk.sock")});
    daemon.qmp.ok(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "disk", "node-name": "disk", "writable": true,
            "num-queues": 4, "addr": addr}),
    );
}

fn is_missing() -> bool {
    let tools = [
        "qemu-system-x86_64",
        "busybox",
        "mkfs.ext4",
        "apt-get",
        "dpkg-deb",
    ];
    !tools.into_iter().all(requires)
}

const EVERYTHING: &str = r#"
set -e
disk=/sys/block/vda
if dd if=/dev/vda bs=512 count=1 2>/dev/null | grep -q 'second boot'; then
    echo 'the mark of the first boot is there'
    exit 0
fi
test "$(ls $disk/mq | wc -l)" = 4
test "$(cat $disk/queue/write_cache)" = 'write back'
test "$(cat $disk/serial)" = disk
dd if=/dev/urandom of=/random bs=1M count=8 2>/dev/null
dd if=/random of=/dev/vda bs=64k seek=16 conv=fsync 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k skip=16 count=128 2>/dev/null | cmp - /random
test "$(cat $disk/queue/discard_max_bytes)" -gt 0
blkdiscard -o 1048576 -l 8388608 /dev/vda
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/zero of=/zeroes bs=1M count=8 2>/dev/null
dd if=/dev/vda bs=1M skip=1 count=8 2>/dev/null | cmp - /zeroes
mkfs.ext4 -q -F /dev/vda
mkdir /disk
mount -t ext4 /dev/vda /disk
(dd if=/random of=/disk/a bs=4k conv=fsync; dd if=/random of=/disk/b bs=256k conv=fsync) 2>/dev/null
fstrim /disk
umount /disk
mount -t ext4 /dev/vda /disk
cmp /disk/a /random
cmp /disk/b /random
umount /disk
before=$(cat $disk/size)
echo 'ready to be resized'
while [ "$(cat $disk/size)" = "$before" ]; do sleep 0.1; done
test "$(cat $disk/size)" = 196608
echo 'second boot' | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null
echo 'booting again'
reboot -f
sleep 60
"#;

fn does_everything(image: &TempImage) {
    if is_missing() {
        return;
    }
    let mut daemon = serve(image);
    let mut machine = Machine::start(&daemon.path("blk.sock"), EVERYTHING);
    machine.wait_for("ready to be resized");
    let resize = json!({"node-name": "disk", "size": 96 * MIB});
    daemon.qmp.ok("block_resize", resize);
    assert_eq!(machine.verdict(), 0, "{}", machine.console());
    assert!(
        machine
            .console()
            .contains("the mark of the first boot is there")
    );
    daemon.stop();
    if image.format() == "qcow2" {
        check_image(image.path(), "after the guest");
    }
    assert_eq!(image.content()[..11], *b"second boot");
}

#[test]
fn a_guest_lives_on_a_raw_image() {
    does_everything(&TempImage::zeroes(64 * MIB));
}

#[test]
fn a_guest_lives_on_a_qcow2_image() {
    does_everything(&TempImage::qcow2(64 * MIB, ""));
}

const FSYNC_FAILS: &str = r#"
dd if=/dev/zero of=/dev/vda bs=4k count=4 2>/dev/null || exit 1
dd if=/dev/zero of=/dev/vda bs=4k count=4 conv=fsync 2>&1 && exit 2
exit 0
"#;

#[test]
fn fsync_fails_in_the_guest_when_flushing_does() {
    if is_missing() {
        return;
    }
    // Not an image: opening one may flush, too.
    let image = TempImage::zeroes(64 * MIB);
    let mut daemon = Daemon::builder(Server::Outport).start();
    let rule = json!({"event": "flush_to_disk", "errno": 5, "once": false});
    let file = json!({"driver": "file", "filename": image.str()});
    let debug = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
    let node = json!({"driver": "raw", "node-name": "disk", "file": debug});
    daemon.qmp.ok("blockdev-add", node);
    export(&mut daemon);
    let mut machine = Machine::start(&daemon.path("blk.sock"), FSYNC_FAILS);
    assert_eq!(machine.verdict(), 0, "{}", machine.console());
}
