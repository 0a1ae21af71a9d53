//! Dirty bitmaps of images: what is marked when, and what is kept.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::disk::{Disk, Setup};
use super::toy::{Act, Bug, Call, Told, ToyFactory, create_toy, open_toy};
use crate::ByteRange;
use crate::bitmap::DirtyBitmap;
use crate::engine::buffer::Buf;
use crate::file::{FileOptions, HostFile};
use crate::format::{FaultKind, FormatError, Repair};
use crate::node::{Kind, Node};

fn hang(factory: &ToyFactory, call: Call) -> (oneshot::Receiver<()>, oneshot::Sender<()>) {
    let (began, wait) = oneshot::channel();
    let (go_on, until) = oneshot::channel();
    factory.faults.plan(call, Act::Hang(began, until));
    (wait, go_on)
}

fn add_bitmap(node: &Node, size: u64) -> Arc<DirtyBitmap> {
    let bitmap = DirtyBitmap::new("b", 512, size, true).unwrap();
    node.bitmaps().insert(bitmap.clone());
    node.bitmaps().publish();
    bitmap
}

/// Whoever waits until nobody is inside may put the bitmaps away.
#[tokio::test]
async fn what_was_written_is_marked_before_its_flush_begins() {
    let disk = Disk::new(Setup::default()).await;
    let bitmap = add_bitmap(&disk.node, disk.node.len_bytes());
    let (began, go_on) = hang(&disk.factory, Call::Flush);
    let node = disk.node.clone();
    let writing = tokio::spawn(async move {
        let buf = Buf::from_slice(&[1; 4096]);
        node.write(8192, &buf, true).await
    });
    began.await.unwrap();
    assert_eq!(bitmap.bits().count(), 8);
    go_on.send(()).unwrap();
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn each_step_of_a_long_zeroing_is_marked_when_it_ends() {
    let disk = Disk::new(Setup::default()).await;
    let bitmap = add_bitmap(&disk.node, disk.node.len_bytes());
    // The toy does five clusters per call.
    let (began, go_on) = hang(&disk.factory, Call::Discard);
    let (again, go_on_again) = hang(&disk.factory, Call::Discard);
    let node = disk.node.clone();
    let range = ByteRange::between(0, 40_960);
    let zeroing = tokio::spawn(async move { node.write_zeroes(range, true).await });
    began.await.unwrap();
    assert_eq!(bitmap.bits().count(), 0);
    go_on.send(()).unwrap();
    again.await.unwrap();
    let first = bitmap.bits().run(ByteRange::between(0, 20_480));
    assert_eq!(first, (20_480, true));
    go_on_again.send(()).unwrap();
    zeroing.await.unwrap().unwrap();
    assert_eq!(bitmap.bits().count(), 80);
}

/// A fresh instance has none of the bits that the last one was given, and is given all of them.
#[tokio::test]
async fn bitmaps_that_were_stored_in_part_are_stored_again() {
    for trap in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = HostFile::open(FileOptions::new(file.path().to_owned())).unwrap();
        let file = Node::new("file0", "file", false, Kind::File(file));
        // Three stretches of bits.
        let size = 3 * (2 << 20) * 8 * 512;
        create_toy(&file, 21, size, 64).await;
        let factory = Arc::new(ToyFactory::default());
        *factory.faults.kept.lock().unwrap() = Some(Vec::new());
        let node = open_toy(&factory, &file, None, &Told::default()).await;
        let node = node.unwrap();
        let bitmap = add_bitmap(&node, size);
        bitmap.set_persistent(true);
        bitmap.bits().mark(ByteRange::between(0, size));
        let (_, first) = hang(&factory, Call::StoreBits);
        let (began, second) = hang(&factory, Call::StoreBits);
        first.send(()).unwrap();
        let closing = node.clone();
        let closing = tokio::spawn(async move { closing.close().await });
        began.await.unwrap();
        if trap {
            factory.faults.plan(Call::Flush, Act::Trap);
        }
        let flushing = node.clone();
        let flushing = tokio::spawn(async move { flushing.flush().await });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        second.send(()).unwrap();
        flushing.await.unwrap().unwrap();
        closing.await.unwrap().unwrap();
        let kept = factory.faults.kept.lock().unwrap().take().unwrap();
        assert_eq!(kept, [("b".to_owned(), 3)], "trap: {trap}");
    }
}

#[tokio::test]
async fn a_check_that_gets_nowhere_is_a_fault() {
    let disk = Disk::new(Setup::default()).await;
    disk.factory.faults.set_bug(Bug::ChecksForEver);
    let image = disk.node.image().unwrap();
    let mut slices = 0;
    let checked = image.check(Repair::default(), |_| {
        slices += 1;
        assert!(slices < 10, "it does not end");
    });
    match checked.await {
        Err(FormatError::Fault(fault)) => assert_eq!(fault.kind, FaultKind::BadAnswer),
        other => panic!("{other:?}"),
    }
    disk.node.flush().await.unwrap();
}
