//! Random requests, several at once, each sector of them stamped.

use outport_block::bitmap::DirtyBitmap;
use outport_block::format::Codec;
use outport_block::trace::Trace;
use outport_block::{Buf, ByteRange};
use outport_tests::Rng;

use crate::disk::{BITMAP, Case, Disk, read_all};
use crate::history::{ABSENT, History, SECTOR, ZERO, backing_stamp, content, value_of};

/// Steps of one workload; a step is one to five requests.
const STEPS: usize = 60;

/// What a freshly made image holds.
fn first_values(case: Case) -> impl Iterator<Item = u64> {
    let size = case.size() / SECTOR;
    (0..case.size_max() / SECTOR).map(move |sector| match sector {
        _ if sector >= size => ABSENT,
        _ if sector < case.filled_sectors() => u64::from_le_bytes([0xa5; 8]),
        _ if sector < case.backing_sectors() => backing_stamp(sector),
        _ => ZERO,
    })
}

/// Run the workload that `seed` names on an open disk, and close it.
pub(crate) async fn run(disk: &mut Disk, trace: &Trace, seed: u64) -> History {
    let mut work = Work {
        disk,
        trace,
        rng: Rng::new(seed),
        history: History::new(first_values(disk.case)),
    };
    if disk_keeps_bitmaps(work.disk) {
        work.add_bitmap("early");
    }
    for _ in 0..STEPS {
        match work.rng.below(16) {
            0..7 => work.writes_at_once().await,
            7 => work.durable_write().await,
            8 => work.discard().await,
            9 | 10 => work.zeroes().await,
            11 => work.compressed().await,
            12 if work.disk.case.resizes => work.resize().await,
            12 if work.disk.case.bitmaps => work.bitmap().await,
            _ => work.flush().await,
        }
    }
    let seen = read_all(work.disk.node()).await.unwrap();
    assert!(
        seen == content(work.history.now()),
        "it reads otherwise than it was written (seed {seed})"
    );
    work.disk.node().close().await.unwrap();
    let all = ByteRange::between(0, work.disk.case.size_max());
    work.history.keep(all, trace);
    let damage = disk.damage.lock().unwrap().clone();
    assert!(damage.is_empty(), "{damage:?}");
    work.history
}

fn disk_keeps_bitmaps(disk: &Disk) -> bool {
    disk.case.bitmaps && disk.node().bitmaps().find(BITMAP).is_some()
}

struct Work<'a> {
    disk: &'a Disk,
    trace: &'a Trace,
    rng: Rng,
    history: History,
}

impl Work<'_> {
    fn size(&self) -> u64 {
        self.disk.node().len_bytes()
    }

    /// One more persistent bitmap of sectors.
    fn add_bitmap(&self, name: &str) {
        let node = self.disk.node();
        let bitmap = DirtyBitmap::new(name, SECTOR as u32, node.size(), true).unwrap();
        bitmap.set_persistent(true);
        node.bitmaps().insert(bitmap);
        node.bitmaps().publish();
    }

    /// The bitmap that the image was made with goes, as by a command.
    async fn bitmap(&mut self) {
        let bitmaps = self.disk.node().bitmaps();
        if let Some(bitmap) = bitmaps.find(BITMAP).filter(|_| self.rng.one_in(2)) {
            bitmaps.remove(&bitmap);
            bitmaps.publish();
            let image = self.disk.node().image().unwrap();
            image.forget_removed().await.unwrap();
        }
    }

    fn stamp(&mut self) -> u64 {
        self.rng.next_u64() >> 8 | 1
    }

    /// Whole sectors, at most `max` bytes of them.
    fn range(&mut self, max: u64) -> ByteRange {
        let size = self.size();
        let start = self.rng.below(size / SECTOR) * SECTOR;
        let len = self.rng.between(1, max / SECTOR) * SECTOR;
        ByteRange::between(start, size.min(start + len))
    }

    async fn writes_at_once(&mut self) {
        let stamp = self.stamp();
        let mut ranges: Vec<ByteRange> = Vec::new();
        for _ in 0..self.rng.between(1, 4) {
            let range = self.range(2 * self.disk.case.cluster);
            if !ranges.iter().any(|other| other.overlaps(range)) {
                ranges.push(range);
            }
        }
        // A flush beside them covers what was written before.
        let mark = self.rng.one_in(3).then(|| self.history.flush_issued());
        let (node, trace) = (self.disk.node(), self.trace);
        let flush = async {
            if let Some(mark) = mark {
                node.flush().await.unwrap();
                trace.mark(mark);
            }
        };
        let writes = ranges.iter().map(async |range| {
            let sectors = (range.len() / SECTOR) as usize;
            let buf = Buf::from_slice(&content(std::iter::repeat_n(stamp, sectors)));
            node.write(range.offset(), &buf, false).await.unwrap();
        });
        for range in &ranges {
            self.history.wrote(*range, stamp);
        }
        futures_util::future::join(futures_util::future::join_all(writes), flush).await;
    }

    async fn durable_write(&mut self) {
        let (stamp, range) = (self.stamp(), self.range(self.disk.case.cluster));
        self.history.wrote(range, stamp);
        let bytes = content(History::sectors(range).map(|_| stamp));
        let node = self.disk.node();
        node.write(range.offset(), &Buf::from_slice(&bytes), true)
            .await
            .unwrap();
        self.history.keep(range, self.trace);
    }

    async fn discard(&mut self) {
        let range = self.range(3 * self.disk.case.cluster);
        self.disk.node().discard(range).await.unwrap();
        self.look(range).await;
    }

    async fn zeroes(&mut self) {
        let (range, unmap) = (self.range(3 * self.disk.case.cluster), self.rng.one_in(2));
        self.history.wrote(range, ZERO);
        self.disk.node().write_zeroes(range, unmap).await.unwrap();
    }

    async fn compressed(&mut self) {
        let (stamp, cluster) = (self.stamp(), self.disk.case.cluster);
        let start = self.rng.below(self.size() / cluster) * cluster;
        let range = ByteRange::between(start, start + cluster);
        self.history.wrote(range, stamp);
        let bytes = Buf::from_slice(&content(History::sectors(range).map(|_| stamp)));
        let node = self.disk.node();
        node.write_compressed(start, &bytes, Codec::Deflate)
            .await
            .unwrap();
    }

    async fn resize(&mut self) {
        let case = self.disk.case;
        let old = self.size();
        let new = self.rng.between(case.size() / 2, case.size_max()) / SECTOR * SECTOR;
        if new < old {
            // Halfway the clusters are gone and the length is not: both are of stage `mapping`.
            let cut = ByteRange::between(new, old);
            for sector in History::sectors(cut) {
                if self.disk.case.backing {
                    self.history.at(sector, backing_stamp(sector as u64));
                }
                self.history.at(sector, ZERO);
                self.history.at(sector, ABSENT);
            }
        }
        if new > old && case.backing {
            // Halfway the length may be there, and what hides the backing file not yet.
            for sector in History::sectors(ByteRange::between(old, new)) {
                self.history.at(sector, backing_stamp(sector as u64));
            }
        }
        self.disk.node().resize(new).await.unwrap();
        if new > old {
            self.look(ByteRange::between(old, new)).await;
        }
        // Done means durable.
        let all = ByteRange::between(0, case.size_max());
        self.history.keep(all, self.trace);
    }

    async fn flush(&mut self) {
        let mark = self.history.flush_issued();
        self.disk.node().flush().await.unwrap();
        self.trace.mark(mark);
    }

    /// What a request made of these sectors is the format's choice.
    async fn look(&mut self, range: ByteRange) {
        let buf = Buf::zeroed(range.len() as usize);
        let buf = self.disk.node().read(range.offset(), buf).await.unwrap();
        let sectors = buf.as_slice().chunks(SECTOR as usize);
        for (sector, bytes) in History::sectors(range).zip(sectors) {
            let value = value_of(bytes).unwrap_or_else(|| panic!("sector {sector} is a mixture"));
            self.history.saw(sector, value, self.disk.case.backing);
        }
    }
}
