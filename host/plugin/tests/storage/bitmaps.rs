//! Persistent bitmaps, where putting the image away fails.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use outport_block::file::{FileOptions, HostFile};
use outport_block::filter::blkdebug::{Event, InjectError, IoType, Limits, SetState};
use outport_block::filter::{Blkdebug, Filter};
use outport_block::node::Kind;
use outport_block::{Buf, Errno, Node};
use outport_tests::{qemu_img, requires};

use crate::place::{open, try_open};
use crate::support::MemoryFiles;
use crate::support::{bundled, run};

/// Fails flush number `n`.
fn failing(path: &Path, n: i64) -> Arc<Node> {
    let file = HostFile::open(FileOptions::new(path.to_owned())).unwrap();
    let file = Node::new("file0", "file", false, Kind::File(file));
    let event = Event::FLUSH_TO_DISK;
    let steps = (1..=n).map(|state| SetState {
        event,
        state,
        new_state: state + 1,
    });
    let fail = InjectError {
        event,
        state: n,
        iotype: Some(IoType::Flush),
        errno: Some(Errno::Io),
        sector: None,
        once: true,
        immediately: true,
    };
    let debug = Blkdebug::new(file, Limits::default(), steps.collect(), vec![fail]);
    let kind = Kind::Filter(Box::new(Filter::Blkdebug(debug)));
    Node::new("debug0", "blkdebug", false, kind)
}

/// The directory of a hostile image may have 64 MiB and name 65535 bitmaps.
#[test]
fn the_directory_is_read_once_and_not_for_each_bitmap() {
    if !requires("qemu-img") {
        return;
    }
    const COUNT: usize = 30;
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
        for number in 0..COUNT {
            qemu_img(&["bitmap", "--add", name, &format!("b{number}")]);
        }
        for writable in [false, true] {
            let files = MemoryFiles::new(std::fs::read(&path).unwrap());
            let reads = || files.reads.load(Ordering::Relaxed);
            let mut format = bundled().instantiate(files.clone()).await.unwrap();
            format.open("{}", writable).await.unwrap();
            format.activate(Vec::new()).await.unwrap();
            let listed = format.list_bitmaps(0).await.unwrap();
            assert_eq!(listed.len(), COUNT);
            let before = reads();
            for bitmap in listed {
                let bits = format.read_bits(bitmap.name, 0).await.unwrap();
                assert_eq!(bits, None);
            }
            // The tables, which are clear.
            assert_eq!(reads() - before, COUNT, "writable: {writable}");
            assert!(format.list_bitmaps(COUNT as u32).await.unwrap().is_empty());
            assert_eq!(reads() - before, COUNT, "writable: {writable}");
        }
    });
}

/// Whichever flush fails: bitmaps that the file calls consistent lack nothing.
#[test]
fn bitmaps_of_an_image_that_could_not_be_put_away_are_in_use_again() {
    if !requires("qemu-img") {
        return;
    }
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        let name = path.to_str().unwrap();
        let mut failures = 0;
        for n in 1.. {
            qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
            qemu_img(&["bitmap", "--add", name, "b"]);
            let debug = failing(&path, n);
            let Ok(node) = try_open(debug.clone()).await else {
                continue;
            };
            let image = node.image().unwrap().clone();
            let buf = Buf::from_slice(&[1; 65_536]);
            node.write(0, &buf, false).await.unwrap();
            if node.flush().await.is_err() {
                // Too early: nothing was put away.
                node.flush().await.unwrap();
                continue;
            }
            let put_away = image.inactivate().await;
            let rules = debug.blkdebug().unwrap();
            if rules.rule_state() <= n {
                put_away.unwrap();
                break;
            }
            if put_away.is_ok() {
                // Only the bitmaps were lost.
                continue;
            }
            failures += 1;
            let bitmap = node.bitmaps().find("b").unwrap();
            let cleared = Arc::new(bitmap.bits().cleaned());
            bitmap.replace_bits(cleared);
            node.bitmaps().publish();
            // In place, and nobody closes the image.
            let written = node.write(0, &buf, false).await;
            drop((bitmap, image, node, debug));
            let file = HostFile::open(FileOptions::new(path.clone())).unwrap();
            let node = open(Node::new("file0", "file", false, Kind::File(file))).await;
            let bitmap = node.bitmaps().find("b").unwrap();
            assert!(
                bitmap.is_inconsistent() || written.is_err(),
                "flush {n}: {} bits of what was lost",
                bitmap.bits().count()
            );
        }
        assert!(failures > 1, "{failures} failures");
    });
}
