//! Images in a window of a longer file: a format that lies reads and writes nothing behind it.

use std::sync::Arc;

use super::toy::{Act, Call, Told, ToyFactory, create_toy, open_toy};
use crate::engine::buffer::Buf;
use crate::file::{FileOptions, HostFile};
use crate::format::{FaultKind, FormatFiles, Location};
use crate::node::{Kind, Node, Segment};
use crate::{ByteRange, Errno};

const WINDOW: u64 = 1 << 20;

/// A file full of 0xaa, and a window of its second MiB.
struct Container {
    dir: tempfile::TempDir,
    window: Arc<Node>,
}

impl Container {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container");
        std::fs::write(&path, vec![0xaa; 4 * WINDOW as usize]).unwrap();
        let file = HostFile::open(FileOptions::new(path)).unwrap();
        let file = Node::new("file0", "file", false, Kind::File(file));
        let window = Kind::raw(file, WINDOW, Some(WINDOW));
        let window = Node::new("window0", "raw", false, window);
        Self { dir, window }
    }

    fn assert_surroundings_untouched(&self) {
        let content = std::fs::read(self.dir.path().join("container")).unwrap();
        let (start, end) = (WINDOW as usize, 2 * WINDOW as usize);
        let mut around = content[..start].iter().chain(&content[end..]);
        assert!(around.all(|byte| *byte == 0xaa));
    }
}

#[tokio::test]
async fn a_window_ends_where_it_ends_for_everyone() {
    let container = Container::new();
    let window = &container.window;
    for (offset, shown) in [(WINDOW - 512, 512), (WINDOW, 0), (WINDOW + 4096, 0)] {
        let mut expected = vec![0; 1024];
        expected[..shown].fill(0xaa);
        let mut read = [1; 1024];
        assert_eq!(window.try_read(offset, &mut read), Some(Ok(())));
        assert_eq!(read[..], expected);
        let buf = window.read(offset, Buf::from_slice(&[1; 1024])).await;
        assert_eq!(buf.unwrap().as_slice(), expected);
        let range = ByteRange::new(offset, 1024).unwrap();
        match window.segment(range) {
            Segment::File { len, .. } => assert_eq!(len, shown as u64),
            Segment::Zero { len } => assert_eq!((len, shown), (1024, 0)),
            other @ Segment::Unknown { .. } => panic!("{other:?}"),
        }
        let status = window.status(range).await.unwrap();
        assert_eq!(status.data, shown > 0);
        let buf = Buf::from_slice(&[2; 1024]);
        let full = Err(Errno::NoSpc);
        assert_eq!(window.try_write(offset, &[2; 1024]), Some(full));
        assert_eq!(window.write(offset, &buf, false).await, full);
        assert_eq!(window.write_zeroes(range, true).await, full);
        assert_eq!(window.write_zeroes(range, false).await, full);
        assert_eq!(window.discard(range).await, full);
    }
    let last = ByteRange::new(WINDOW - 512, 512).unwrap();
    window.write_zeroes(last, false).await.unwrap();
    container.assert_surroundings_untouched();
}

#[tokio::test]
async fn a_format_sees_and_maps_nothing_behind_its_window() {
    let container = Container::new();
    let node = toy_in(&container, &Arc::default()).await;
    let image = node.image().unwrap();
    // Slot 0 as the format sees it.
    let mut seen = [1; 512];
    assert_eq!(
        image.files.try_read(0, WINDOW + 4096, &mut seen),
        Some(Ok(()))
    );
    assert_eq!(seen, [0; 512]);
    let seen = image.files.read(0, WINDOW - 512, 1024).await.unwrap();
    assert_eq!(seen[512..], [0; 512]);
    assert_eq!(image.files.size(0), Ok(WINDOW));
}

async fn toy_in(container: &Container, factory: &Arc<ToyFactory>) -> Arc<Node> {
    let made = tempfile::NamedTempFile::new().unwrap();
    let file = HostFile::open(FileOptions::new(made.path().to_owned())).unwrap();
    let file = Node::new("made0", "file", false, Kind::File(file));
    create_toy(&file, 12, 256 << 10, 512).await;
    let bytes = std::fs::read(made.path()).unwrap();
    let window = &container.window;
    let buf = Buf::from_slice(&bytes);
    window.write(0, &buf, false).await.unwrap();
    let opened = open_toy(factory, window, None, &Told::default()).await;
    opened.unwrap()
}

#[tokio::test]
async fn places_behind_the_window_are_lies() {
    let behind = |at: u64| Location::Raw {
        slot: 0,
        offset: at,
        in_place: true,
    };
    let container = Container::new();
    for call in [Call::Resolve, Call::Prepare] {
        let factory = Arc::new(ToyFactory::default());
        let node = toy_in(&container, &factory).await;
        let lie = match call {
            Call::Resolve => Act::Extents(Box::new(move |e| e[0].at = behind(WINDOW + 4096))),
            _ => Act::Placements(Box::new(|p| p[0].offset = WINDOW + 4096)),
        };
        factory.faults.plan(call, lie);
        let buf = Buf::from_slice(&[5; 4096]);
        node.write(0, &buf, false).await.unwrap();
        let reported = factory.reported.lock().unwrap().clone();
        assert_eq!(reported.len(), 1, "{call:?}");
        assert_eq!(reported[0].kind, FaultKind::BadExtent);
        let read = node.read(0, Buf::zeroed(4096)).await.unwrap();
        assert_eq!(read.as_slice(), [5; 4096]);
        node.close().await.unwrap();
    }
    container.assert_surroundings_untouched();
}
