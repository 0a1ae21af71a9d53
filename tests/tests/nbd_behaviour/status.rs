//! Block status: one chunk per context, nonzero lengths, only the last extent may overrun.

use std::io::Write as _;

use outport_tests::nbd::wire::{cmd, cmd_flag, errno, opt};
use outport_tests::nbd::{Client, Extents};
use outport_tests::{Daemon, TempImage};
use serde_json::json;

use super::{Disk, MIB};

const HOLE: u32 = 1;
const ZERO: u32 = 2;

fn client(disk: &Disk) -> Client {
    let mut haggle = disk.daemon.haggle();
    haggle
        .structured_replies()
        .expect("structured replies are offered");
    let set = haggle
        .meta_contexts(opt::SET_META_CONTEXT, "disk", &["base:allocation"])
        .expect("a well-formed request");
    assert_eq!(set.len(), 1, "{set:?}");
    assert_eq!(set[0].1, "base:allocation");
    haggle.go("disk").expect("it is exported")
}

/// The rules that hold for every answer.
fn lawful(contexts: &[Extents], len: u32) {
    assert_eq!(contexts.len(), 1, "one chunk per context");
    let (_, extents) = &contexts[0];
    let (last, others) = extents.split_last().expect("at least one extent");
    assert!(
        extents.iter().all(|(len, _)| *len > 0),
        "an empty extent: {extents:?}"
    );
    assert!(
        extents.iter().all(|(len, _)| len % 512 == 0),
        "an odd extent: {extents:?}"
    );
    let before_last: u64 = others.iter().map(|(len, _)| u64::from(*len)).sum();
    assert!(before_last < u64::from(len), "{extents:?} for {len}");
    assert!(
        last.1 & !(HOLE | ZERO) == 0,
        "unknown status bits: {extents:?}"
    );
}

#[test]
fn the_hole_is_told() {
    let disk = Disk::new();
    let contexts = client(&disk)
        .block_status(0, 0, 4 * MIB as u32)
        .unwrap()
        .unwrap();
    lawful(&contexts, 4 * MIB as u32);
    let mib = MIB as u32;
    assert_eq!(contexts[0].1, [(2 * mib, 0), (mib, HOLE | ZERO), (mib, 0)]);
}

#[test]
fn any_range_is_answered_lawfully() {
    let disk = Disk::new();
    let mut client = client(&disk);
    for (offset, len) in [
        (0, 512),
        (2 * MIB - 512, 1024),
        (2 * MIB, 512),
        (3 * MIB - 512, MIB),
        (4 * MIB - 512, 512),
    ] {
        let contexts = client
            .block_status(0, offset as u64, len as u32)
            .unwrap()
            .unwrap();
        lawful(&contexts, len as u32);
        let wanted = if (2 * MIB..3 * MIB).contains(&offset) {
            HOLE | ZERO
        } else {
            0
        };
        assert_eq!(contexts[0].1[0].1, wanted, "at {offset}");
    }
}

#[test]
fn req_one_gives_one_extent_inside_the_request() {
    let disk = Disk::new();
    let mut client = client(&disk);
    for (offset, len) in [(0, 4 * MIB), (MIB, 2 * MIB), (2 * MIB, 512), (0, 512)] {
        let flags = cmd_flag::REQ_ONE;
        let contexts = client
            .block_status(flags, offset as u64, len as u32)
            .unwrap()
            .unwrap();
        lawful(&contexts, len as u32);
        assert_eq!(contexts[0].1.len(), 1);
        assert!(
            contexts[0].1[0].0 <= len as u32,
            "{contexts:?} for {offset}+{len}"
        );
    }
}

#[test]
fn ranges_past_the_end_and_of_no_length_are_invalid() {
    let disk = Disk::new();
    let mut client = client(&disk);
    for (offset, len) in [(4 * MIB as u64, 512), (0, 4 * MIB as u32 + 512), (0, 0)] {
        let got = client.block_status(0, offset, len).unwrap();
        assert_eq!(got, Err(errno::INVAL), "{offset}+{len}");
    }
    assert!(client.read(0, 512).unwrap().is_ok());
}

#[test]
fn status_without_a_context_is_invalid() {
    let disk = Disk::new();
    let mut client = disk.daemon.client("disk");
    assert_eq!(client.block_status(0, 0, 512).unwrap(), Err(errno::INVAL));
    let mut simple = disk.daemon.simple_client("disk");
    assert_eq!(
        simple.command(0, cmd::BLOCK_STATUS, 0, 512, &[]).unwrap(),
        Err(errno::INVAL)
    );
}

#[test]
fn a_context_set_for_another_export_does_not_count() {
    let mut disk = Disk::new();
    let other = outport_tests::TempImage::zeroes(MIB as u64);
    disk.daemon.serve("other", &other);
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    haggle
        .meta_contexts(opt::SET_META_CONTEXT, "other", &["base:allocation"])
        .unwrap();
    let mut client = haggle.go("disk").unwrap();
    assert_eq!(client.block_status(0, 0, 512).unwrap(), Err(errno::INVAL));
}

#[test]
fn status_follows_writes_and_discards() {
    let disk = Disk::new();
    let mut client = client(&disk);
    let (at, len) = (2 * MIB as u64 + 65536, 65536);
    assert_eq!(client.write(at, &vec![1; len]).unwrap(), Ok(()));
    let contexts = client.block_status(0, at, len as u32).unwrap().unwrap();
    assert_eq!(contexts[0].1[0].1, 0, "written: {contexts:?}");
    assert_eq!(
        client
            .command(0, cmd::WRITE_ZEROES, at, len as u32, &[])
            .unwrap(),
        Ok(())
    );
    let contexts = client.block_status(0, at, len as u32).unwrap().unwrap();
    lawful(&contexts, len as u32);
}

/// A map of every other block, asked for thousands of times by a client that reads no answer: what
/// is kept for it has an end, and others are served meanwhile.
#[test]
fn thousands_of_maps_are_not_kept() {
    const LEN: u64 = 128 << 20;
    const ASKED: usize = 4000;
    let mut disk = Disk {
        daemon: Daemon::start(),
        image: TempImage::zeroes(LEN),
        content: Vec::new(),
    };
    if disk.is_qsd() {
        // QEMU serves sixteen requests of a client at a time, and reads no more.
        return;
    }
    disk.daemon.add_node("disk", &disk.image);
    let bitmap = json!({"node": "disk", "name": "b", "granularity": 4096});
    disk.daemon.qmp.ok("block-dirty-bitmap-add", bitmap);
    let offered = json!({"writable": true, "bitmaps": ["b"]});
    disk.daemon.add_export_with("disk", offered);
    let mut other = disk.daemon.client("disk");
    for at in (0..LEN).step_by(8192) {
        other.write(at, &[1; 4096]).unwrap().unwrap();
    }
    let mut haggle = disk.daemon.haggle();
    haggle.structured_replies().unwrap();
    let dirty = ["qemu:dirty-bitmap:b"];
    let set = haggle.meta_contexts(opt::SET_META_CONTEXT, "disk", &dirty);
    assert_eq!(set.unwrap().len(), 1);
    let mut greedy = haggle.go("disk").unwrap();
    let request = |_| greedy.request(0, cmd::BLOCK_STATUS, 0, LEN as u32).bytes();
    let requests: Vec<u8> = (0..ASKED).flat_map(request).collect();
    greedy.socket().set_nonblocking(true).unwrap();
    let mut sent = 0;
    let most = |sent: &usize| *sent > requests.len() / 2;
    outport_tests::eventually("most requests are taken", || {
        if let Ok(some) = greedy.socket().write(&requests[sent..]) {
            sent += some;
        }
        most(&sent).then_some(())
    });
    let bounded = || {
        let rss = disk.daemon.stats().rss_kib;
        assert!(rss < 300 << 10, "{rss} KiB");
    };
    for at in 0..200 {
        other.read(at * 8192, 4096).unwrap().unwrap();
        bounded();
    }
    // Its answers come as it reads.
    greedy.socket().set_nonblocking(false).unwrap();
    for _ in 0..100 {
        let chunks = greedy.chunks().expect("they were kept for it");
        assert_eq!(chunks.len(), 1);
        assert_eq!(chunks[0].data.len(), 4 + 8 * (LEN / 4096) as usize);
    }
    bounded();
}
