//! The features and the configuration space of the device (virtio 1.2, sections 5.2.3 and 5.2.4).
//!
//! Pure. The capacity and the shape come from the node; one field can be written, `writeback`.

use bitflags::bitflags;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::limits::{DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, SEGMENTS_MAX};
use super::request::SECTOR;

bitflags! {
    /// Feature bits of the device and of its transport.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Features: u64 {
        const SEG_MAX = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
        const RO = 1 << blk::VIRTIO_BLK_F_RO;
        const BLK_SIZE = 1 << blk::VIRTIO_BLK_F_BLK_SIZE;
        const FLUSH = 1 << blk::VIRTIO_BLK_F_FLUSH;
        const TOPOLOGY = 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
        const CONFIG_WCE = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
        const MQ = 1 << blk::VIRTIO_BLK_F_MQ;
        const DISCARD = 1 << blk::VIRTIO_BLK_F_DISCARD;
        const WRITE_ZEROES = 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
        const INDIRECT_DESC = 1 << VIRTIO_RING_F_INDIRECT_DESC;
        const EVENT_IDX = 1 << VIRTIO_RING_F_EVENT_IDX;
        const VERSION_1 = 1 << VIRTIO_F_VERSION_1;
        const RING_PACKED = 1 << VIRTIO_F_RING_PACKED;
        /// Pages that are written are logged (vhost).
        const LOG_ALL = 1 << 26;
        /// There are features of the protocol (vhost-user).
        const PROTOCOL_FEATURES = 1 << 30;
    }
}

/// Bytes of the space as far as anything is in it.
pub(super) const CONFIG: usize = 60;

/// Where the field lies that can be written.
const WRITEBACK: usize = 32;

/// What an export is to its guest, but for its length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes, a power of two.
    pub(super) block_size: u32,
    /// Bytes of the node's clusters or pages.
    pub(super) preferred_io: u32,
    pub(super) queues: u16,
    pub(super) writable: bool,
    /// Discards do something.
    pub(super) discards: bool,
}

impl Shape {
    /// What is offered.
    pub(super) fn features(&self) -> Features {
        let mut features = Features::all();
        features.set(Features::RO, !self.writable);
        features.set(Features::MQ, self.queues > 1);
        features.set(Features::DISCARD, self.writable && self.discards);
        features.set(Features::WRITE_ZEROES, self.writable);
        features
    }

    /// The configuration space of a node of `size` bytes.
    pub(super) fn space(&self, size: u64, writeback: bool) -> [u8; CONFIG] {
        let block = self.block_size;
        let preferred = self.preferred_io.max(block);
        // A page is written whole by every medium; QEMU says one block.
        let physical = preferred.min(4096).max(block);
        let exponent = (physical / block).checked_ilog2().unwrap_or(0);
        let sectors = (u64::from(block) / SECTOR) as u32;
        let largest = DISCARD_SECTORS_MAX - DISCARD_SECTORS_MAX % sectors;
        let mut space = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(size / SECTOR).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &block.to_le_bytes());
        put(24, &[exponent as u8, 0]);
        put(26, &1_u16.to_le_bytes());
        put(28, &(preferred / block).to_le_bytes());
        put(WRITEBACK, &[u8::from(writeback), 0]);
        put(34, &self.queues.to_le_bytes());
        put(36, &largest.to_le_bytes());
        put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes());
        put(44, &(physical / SECTOR as u32).to_le_bytes());
        put(48, &largest.to_le_bytes());
        put(52, &DISCARD_SEGMENTS_MAX.to_le_bytes());
        put(56, &[1]);
        space
    }
}

/// What a write to the space means: the new `writeback`. `None`: nothing there can be written.
pub(super) fn written(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (usize::try_from(offset), bytes) {
        (Ok(WRITEBACK), [value @ (0 | 1)]) => Some(*value == 1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        block_size: 512,
        preferred_io: 65536,
        queues: 4,
        writable: true,
        discards: true,
    };

    #[test]
    fn the_space_is_laid_out_as_specified() {
        let space = SHAPE.space(1 << 20, true);
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| space[at + i]));
        assert_eq!(u32_at(0), 2048);
        assert_eq!(u32_at(12), 126);
        assert_eq!((u32_at(20), space[24]), (512, 3));
        assert_eq!(u32_at(28), 128);
        assert_eq!((space[32], space[34]), (1, 4));
        assert_eq!(u32_at(36), 1 << 22);
        assert_eq!((u32_at(40), u32_at(44)), (64, 8));
        let large = Shape {
            block_size: 1 << 21,
            ..SHAPE
        };
        assert_eq!(large.space(1 << 30, false)[24..36], {
            [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 0]
        });
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert_eq!(written(32, &[0]), Some(false));
        assert_eq!(written(32, &[1]), Some(true));
        for (offset, bytes) in [
            (32, &[2][..]),
            (32, &[]),
            (32, &[1, 0]),
            (31, &[1]),
            (0, &[0]),
        ] {
            assert_eq!(written(offset, bytes), None);
        }
    }

    #[test]
    fn a_read_only_device_offers_nothing_that_writes() {
        let shape = Shape {
            writable: false,
            queues: 1,
            ..SHAPE
        };
        let features = shape.features();
        assert!(features.contains(Features::RO));
        let writes = Features::DISCARD | Features::WRITE_ZEROES | Features::MQ;
        assert!(!features.intersects(writes));
    }
}
