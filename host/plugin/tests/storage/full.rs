//! Places that cannot grow.

use std::sync::Arc;

use outport_block::image::ImageState;
use outport_block::node::Kind;
use outport_block::window::Window;
use outport_block::{Buf, ByteRange, Errno, Node};
use outport_tests::requires;

use crate::place::{MIB, Place};
use crate::support::run;

const CLUSTER: u64 = 65_536;

#[test]
fn what_lies_behind_a_window_is_never_read_nor_written() {
    if !requires("qemu-img") {
        return;
    }
    run(async {
        let place = Place::create(4 * MIB, MIB, MIB, &["-o", "cluster_size=64k"], 2 << 30);
        let node = place.open().await;
        let image = node.image().unwrap().clone();
        let mut written = 0;
        let full = loop {
            let buf = Buf::from_slice(&[7; CLUSTER as usize]);
            match node.write(written * CLUSTER, &buf, false).await {
                Ok(()) => written += 1,
                Err(e) => break e,
            }
            assert!(written <= 16, "more than fits");
        };
        assert_eq!(full, Errno::NoSpc);
        node.flush().await.unwrap();
        // A table for another half gigabyte, for which there is no room either.
        for gib in [1, 3] {
            let range = ByteRange::new(gib << 29, CLUSTER).unwrap();
            let zeroed = node.write_zeroes(range, false).await;
            assert_eq!(zeroed, Err(Errno::NoSpc));
            node.flush().await.unwrap();
        }
        assert_eq!(image.state(), ImageState::Healthy);
        for cluster in 0..written {
            let buf = Buf::zeroed(CLUSTER as usize);
            let buf = node.read(cluster * CLUSTER, buf).await.unwrap();
            assert_eq!(buf.as_slice(), [7; CLUSTER as usize]);
        }
        node.close().await.unwrap();
        drop((image, node));
        place.assert_surroundings_untouched();
        place.check();
    });
}

/// Writes that come at one time.
const DEPTH: u64 = 8;

/// A window that is longer now, without anybody having been told.
fn lengthen(window: &Arc<Node>, size: u64) {
    let Kind::Raw(raw) = window.kind() else {
        unreachable!("it is a raw node");
    };
    let now = raw.get();
    raw.exchange(Window {
        size: Some(size),
        ..Window::clone(&now)
    });
}

/// Each refusal costs the instance, in the middle of the others' writes and while the mark of a
/// growth is set. Its successor must not take what is in use for lost.
#[test]
fn refusals_while_the_image_grows_lose_nothing() {
    if !requires("qemu-img") {
        return;
    }
    const CLUSTER: u64 = 4096;
    run(async {
        // New reference counts every 8 MiB.
        let options = ["-o", "cluster_size=4k"];
        let place = Place::create(40 * MIB, MIB, 39 * MIB, &options, 64 * MIB);
        let mut size = 7 * MIB + MIB / 2;
        let (window, node) = place.open_short(size).await;
        let image = node.image().unwrap().clone();
        let mut model = Vec::new();
        let mut refused = 0;
        while size < 18 * MIB {
            let first = model.len() as u64;
            let writes = (first..first + DEPTH).map(|cluster| {
                let node = node.clone();
                async move {
                    let fill = (cluster % 251) as u8 + 1;
                    let buf = Buf::from_slice(&[fill; CLUSTER as usize]);
                    (fill, node.write(cluster * CLUSTER, &buf, false).await)
                }
            });
            let done = futures_util::future::join_all(writes).await;
            for (fill, result) in done {
                match result {
                    Ok(()) => model.push(fill),
                    Err(e) => {
                        assert_eq!(e, Errno::NoSpc);
                        refused += 1;
                        model.push(0);
                    }
                }
            }
            // By little around where it grows, else by much.
            let near = (size % (8 * MIB)) < MIB / 4 || (size % (8 * MIB)) > 31 * MIB / 4;
            if model.ends_with(&[0]) {
                size += if near { 5 * CLUSTER } else { MIB / 4 };
                lengthen(&window, size);
            }
            if model.len() % 64 == 0 {
                // Space that is on its way back meanwhile.
                let cluster = model.len() / 2;
                let range = ByteRange::new(cluster as u64 * CLUSTER, CLUSTER).unwrap();
                match node.write_zeroes(range, true).await {
                    Ok(()) => model[cluster] = 0,
                    Err(e) => assert_eq!(e, Errno::NoSpc),
                }
            }
        }
        assert!(refused > 50, "{refused} refusals");
        assert_eq!(image.state(), ImageState::Healthy);
        node.close().await.unwrap();
        drop((image, node, window));
        place.check();
        let node = place.open().await;
        for (cluster, fill) in model.iter().enumerate() {
            let buf = Buf::zeroed(CLUSTER as usize);
            let buf = node.read(cluster as u64 * CLUSTER, buf).await.unwrap();
            assert_eq!(buf.as_slice(), [*fill; CLUSTER as usize], "{cluster}");
        }
        node.close().await.unwrap();
        place.assert_surroundings_untouched();
    });
}
