//! Places that cannot grow.

use outport_block::image::ImageState;
use outport_block::{Buf, ByteRange, Errno};
use outport_tests::requires;

use crate::place::{MIB, Place, run};

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
