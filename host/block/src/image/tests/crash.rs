//! Power cuts: every prefix and sampled reorderings of recorded workloads.

use std::sync::Arc;

use super::disk::{Disk, Random, Setup};
use super::toy::{Bug, Header, PACKED, ZERO};
use crate::engine::buffer::Buf;
use crate::trace::{CrashImage, Limits, Trace, crash_images};
use crate::{ByteRange, Errno};

const SECTOR: u64 = 512;

/// Who wrote what to each sector, and what was durable at each mark.
struct History {
    /// Stamps by sector, oldest first; 0: zeroes.
    stamps: Vec<Vec<u64>>,
    /// By mark: how many of a sector's stamps may be forgotten.
    durable: Vec<Vec<usize>>,
}

impl History {
    fn new(size: u64) -> Self {
        let sectors = size.div_ceil(SECTOR) as usize;
        Self {
            stamps: vec![vec![0]; sectors],
            durable: vec![vec![0; sectors]],
        }
    }

    fn wrote(&mut self, range: ByteRange, stamp: u64) {
        for sector in range.offset() / SECTOR..range.end() / SECTOR {
            self.stamps[sector as usize].push(stamp);
        }
    }

    /// All sectors of `range` are durable as they are.
    fn keep(&mut self, range: ByteRange, trace: &Trace) {
        let mut durable = self.durable.last().unwrap().clone();
        for sector in range.offset() / SECTOR..range.end() / SECTOR {
            let sector = sector as usize;
            durable[sector] = self.stamps[sector].len() - 1;
        }
        self.durable.push(durable);
        trace.mark(self.durable.len() as u64 - 1);
    }
}

fn stamped(stamp: u64, len: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat((len / 8) as usize)
}

/// Guest content of the image, or what is wrong with it.
fn guest_of(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let header = Header::decode(bytes).ok_or("no header")?;
    let cluster = header.cluster() as usize;
    let mut used = vec![false; header.capacity as usize];
    let mut guest = vec![0; header.size as usize];
    let word = |at: u64| {
        let at = at as usize;
        let bytes = bytes
            .get(at..at + 8)
            .map_or([0; 8], |b| b.try_into().unwrap());
        u64::from_le_bytes(bytes)
    };
    for (i, out) in guest.chunks_mut(cluster).enumerate() {
        let entry = word(header.entry_at((i * cluster) as u64));
        let offset = entry & !511;
        if offset == 0 {
            continue;
        }
        let index = offset >> header.bits;
        if index < header.first_data() || index >= header.capacity {
            return Err(format!("cluster {i} is mapped to {offset:#x}"));
        }
        if bytes.get((header.counts() + index) as usize) != Some(&1) {
            return Err(format!("cluster {i} at {offset:#x} is not counted"));
        }
        if std::mem::replace(&mut used[index as usize], true) {
            return Err(format!("cluster {i} shares {offset:#x}"));
        }
        assert_eq!(entry & PACKED, 0);
        if entry & ZERO == 0 {
            let stored = bytes.get(offset as usize..).unwrap_or(&[]);
            let len = out.len().min(stored.len());
            out[..len].copy_from_slice(&stored[..len]);
        }
    }
    Ok(guest)
}

fn judge(image: &CrashImage, history: &History) -> Result<(), String> {
    let guest = guest_of(&image.bytes)?;
    let mark = image.durable_marks.last().map_or(0, |m| *m as usize);
    for (i, sector) in guest.chunks(SECTOR as usize).enumerate() {
        let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
        if !sector.chunks(8).all(|w| w == &sector[..8]) {
            return Err(format!("sector {i} is a mixture"));
        }
        let from = history.durable[mark][i];
        let allowed = &history.stamps[i][from..];
        if !allowed.contains(&stamp) {
            return Err(format!(
                "sector {i} has {stamp:#x}, allowed are {allowed:x?} (mark {mark})"
            ));
        }
    }
    Ok(())
}

struct Outcome {
    points: usize,
    images: usize,
    first: Option<String>,
}

impl Outcome {
    /// The host's own checks were faster.
    fn refused() -> Self {
        Self {
            points: 0,
            images: 0,
            first: Some("refused".to_owned()),
        }
    }
}

/// Run a workload, cut the power everywhere, judge.
async fn cut_power(setup: Setup, seed: u64, steps: usize, bug: Bug) -> Outcome {
    let trace = Arc::new(Trace::default());
    let mut disk = Disk::with_trace(setup, Some(trace.clone())).await;
    // Only the header has changed since, and that is recorded too.
    let base = std::fs::read(disk.path()).unwrap();
    disk.factory.faults.set_bug(bug);
    let mut history = History::new(setup.size);
    let mut random = Random::new(seed);
    let cluster = 1u64 << setup.bits;
    let all = ByteRange::between(0, setup.size);
    let sector_range = |random: &mut Random, max: u64| {
        let start = random.below(setup.size / SECTOR) * SECTOR;
        let len = (1 + random.below(max / SECTOR)) * SECTOR;
        ByteRange::between(start, (start + len).min(setup.size))
    };
    for _ in 0..steps {
        let stamp = random.next() | 1;
        match random.below(12) {
            0..6 => {
                // Several at once, on ranges of their own.
                let mut ranges: Vec<ByteRange> = Vec::new();
                for _ in 0..=random.below(4) {
                    let range = sector_range(&mut random, 2 * cluster);
                    if !ranges.iter().any(|r| r.overlaps(range)) {
                        ranges.push(range);
                    }
                }
                let node = &disk.node;
                let writes = ranges.iter().map(|range| async move {
                    let buf = Buf::from_slice(&stamped(stamp, range.len()));
                    node.write(range.offset(), &buf, false).await
                });
                for range in &ranges {
                    history.wrote(*range, stamp);
                }
                for done in futures_util::future::join_all(writes).await {
                    if done.is_err() && bug != Bug::None {
                        return Outcome::refused();
                    }
                    done.unwrap();
                }
            }
            6 => {
                let range = sector_range(&mut random, cluster);
                history.wrote(range, stamp);
                let bytes = stamped(stamp, range.len());
                let done = disk.write(range.offset(), &bytes, true).await;
                if done.is_err() && bug != Bug::None {
                    return Outcome::refused();
                }
                done.unwrap();
                history.keep(range, &trace);
            }
            7 => {
                let range = sector_range(&mut random, 3 * cluster).align_out(cluster);
                let range = range.intersect(all).unwrap();
                history.wrote(range, 0);
                disk.node.discard(range).await.unwrap();
            }
            8 => {
                let range = sector_range(&mut random, 3 * cluster);
                history.wrote(range, 0);
                let unmap = random.below(2) == 0;
                disk.node.write_zeroes(range, unmap).await.unwrap();
            }
            _ => {
                disk.node.flush().await.unwrap();
                history.keep(all, &trace);
            }
        }
    }
    disk.node.close().await.unwrap();
    history.keep(all, &trace);
    let events = trace.events();
    let limits = Limits {
        seed: seed + 1,
        ..Limits::default()
    };
    let mut images = crash_images(&base, &events, limits);
    let mut first = None;
    let mut opened = 0;
    while let Some(image) = images.next() {
        if let Err(what) = judge(&image, &history) {
            first = Some(format!(
                "{what}; after event {}: {:?}; missing {:?}",
                image.after,
                events.get(image.after.saturating_sub(1)).map(short),
                image.missing
            ));
            break;
        }
        // Some are opened for real: what reading the bytes says is what the
        // block layer serves.
        if images.images().is_multiple_of(997) && opened < 5 {
            opened += 1;
            std::fs::write(disk.path(), &image.bytes).unwrap();
            disk.model = guest_of(&image.bytes).unwrap();
            disk.trace = None;
            disk.open_again().await;
            disk.compare_all().await;
        }
    }
    Outcome {
        points: images.points(),
        images: images.images(),
        first,
    }
}

fn short(event: &crate::trace::Event) -> String {
    let text = format!("{event:?}");
    text.chars().take(60).collect()
}

fn setup(bits: u32) -> Setup {
    Setup {
        bits,
        size: 24 << bits,
        // Little room: freed space is used again soon.
        capacity: 34,
        unmap: true,
        ..Setup::default()
    }
}

#[tokio::test]
async fn after_a_power_cut_all_that_was_flushed_is_there() {
    let (mut points, mut images) = (0, 0);
    for (seed, bits) in [(1, 9), (2, 10), (3, 12), (4, 9), (5, 11), (6, 13)] {
        let outcome = cut_power(setup(bits), seed, 60, Bug::None).await;
        assert_eq!(outcome.first, None, "seed {seed}");
        points += outcome.points;
        images += outcome.images;
    }
    println!("{points} crash points, {images} images");
}

#[tokio::test]
async fn a_mapping_that_is_written_too_early_is_found() {
    let mut found = 0;
    for seed in 1..5 {
        let outcome = cut_power(setup(10), seed, 60, Bug::MapsEarly).await;
        found += usize::from(outcome.first.is_some());
    }
    assert!(found >= 3, "found with {found} of 4 seeds");
}

#[tokio::test]
async fn space_that_is_reused_too_early_is_refused() {
    let mut refused = 0;
    for seed in 1..5 {
        let outcome = cut_power(setup(10), seed, 60, Bug::ReusesEarly).await;
        refused += usize::from(outcome.first.as_deref() == Some("refused"));
    }
    assert!(refused >= 3, "refused with {refused} of 4 seeds");
}

#[tokio::test]
async fn fua_is_durable_where_the_mapping_was_not_yet() -> Result<(), Errno> {
    let mut disk = Disk::new(Setup::default()).await;
    disk.write(0, &[1; 4096], false).await?;
    disk.write(8192, &[1; 4096], false).await?;
    // In place, but the cluster's mapping is only in memory.
    disk.write(512, &[2; 512], true).await?;
    disk.open_again().await;
    disk.compare(ByteRange::between(0, 4096)).await;
    Ok(())
}
