//! What clients of an export may read, and what becomes of what they read.
//!
//! Asked on the connection's iothread before each read; neither waits nor allocates. Invariant: no
//! byte is sent that a restricted export does not let out.

use std::sync::Arc;

use outport_block::ByteRange;
use outport_block::bitmap::DirtyBitmap;

/// What clients of an export may read, and what becomes of it.
#[derive(Clone, Debug, Default)]
pub struct Reads {
    /// Only where one of these is dirty; `None`: everything.
    pub within: Option<Vec<Arc<DirtyBitmap>>>,
    /// What was read is discarded before it is sent: each byte can be read once. What a client with
    /// a read-only grant reads stays.
    pub discard: bool,
}

impl Reads {
    /// May all of the range be read?
    #[must_use]
    pub fn permit(&self, range: ByteRange) -> bool {
        let Some(bitmaps) = &self.within else {
            return true;
        };
        let mut rest = range;
        while !rest.is_empty() {
            let runs = bitmaps.iter().map(|bitmap| bitmap.bits().run(rest));
            let Some(len) = runs.filter(|run| run.1).map(|run| run.0).max() else {
                return false;
            };
            rest = ByteRange::between(rest.offset() + len, range.end());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_permitted_where_some_bitmap_is_dirty() {
        let bitmap = |start, end| {
            let bitmap = DirtyBitmap::new("b", 512, 4096, false).unwrap();
            bitmap.bits().mark(ByteRange::between(start, end));
            bitmap
        };
        let within = Some(vec![bitmap(512, 1024), bitmap(1000, 2000)]);
        let reads = Reads {
            within,
            discard: false,
        };
        for (start, end, permitted) in [
            (512, 1024, true),
            (600, 2048, true),
            (2047, 2048, true),
            (2047, 2049, false),
            (511, 513, false),
            (3000, 3001, false),
        ] {
            let range = ByteRange::between(start, end);
            assert_eq!(reads.permit(range), permitted, "{range:?}");
        }
        assert!(Reads::default().permit(ByteRange::between(0, 4096)));
    }
}
