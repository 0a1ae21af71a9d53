//! What a power cut may leave of a recorded file.
//!
//! A crash point lies after each event that changes what may be found. There,
//! all that a completed flush covers is present (a write is covered if it had
//! completed when the flush was issued); everything else that was issued may be
//! there or not, in any combination, and a write may be torn between sectors.
//!
//! ```text
//!   events:  W1 D1 F2 W3 F2' W4 | crash here: W1 present, {W3, W4} in any subset
//! ```
//!
//! Few unflushed effects: every subset. Many: all of them, all but one, only
//! one, and random ones, as [`Limits`] say. Each image is made once.

use std::collections::HashMap;

use super::Event;
use crate::ByteRange;

const SECTOR: usize = 512;

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Up to so many unflushed effects, every subset of them.
    pub exhaustive: u32,
    /// Beyond: so many random subsets at each crash point, and of "all but one"
    /// and "only one" this many each.
    pub samples: usize,
    /// Tear writes between sectors in random subsets.
    pub tear: bool,
    /// Of the random choices.
    pub seed: u64,
    /// No more images than this.
    pub images_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            exhaustive: 4,
            samples: 6,
            tear: true,
            seed: 1,
            images_max: usize::MAX,
        }
    }
}

/// One state that the file may be found in.
#[derive(Clone, Debug)]
pub struct CrashImage {
    /// The file.
    pub bytes: Vec<u8>,
    /// Marks that were set before the power was cut, in order: what was
    /// acknowledged as durable before the last of them must be there.
    pub durable_marks: Vec<u64>,
    /// The power was cut after so many events.
    pub after: usize,
    /// Indices of the events whose effect is missing, for the one who reads a
    /// failure.
    pub missing: Vec<usize>,
}

/// What is applied of one unflushed effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    All,
    None,
    /// Each sector by the toss of a coin with this seed.
    Torn(u64),
}

/// What an event does to the file.
#[derive(Clone, Copy, Debug)]
struct Effect {
    event: usize,
    completed: bool,
    durable: bool,
}

/// The images of one recording; see [`crash_images`].
#[derive(Debug)]
pub struct CrashImages<'a> {
    events: &'a [Event],
    limits: Limits,
    next: usize,
    /// With the effects that are durable together with all before them.
    durable: Vec<u8>,
    /// The others, in the order of issue: a later write to the same bytes wins,
    /// whichever of them a flush covered.
    pending: Vec<Effect>,
    /// What each flush in progress covers.
    flushes: HashMap<u64, Vec<usize>>,
    marks: Vec<u64>,
    choices: Vec<Vec<Part>>,
    random: u64,
    points: usize,
    images: usize,
}

/// Every state in which a power cut may leave a file that held `base` when
/// `events` began to be recorded, within `limits`.
#[must_use]
pub fn crash_images<'a>(base: &[u8], events: &'a [Event], limits: Limits) -> CrashImages<'a> {
    let mut all = CrashImages {
        events,
        limits,
        next: 0,
        durable: base.to_vec(),
        pending: Vec::new(),
        flushes: HashMap::new(),
        marks: Vec::new(),
        choices: Vec::new(),
        random: limits.seed.wrapping_mul(2).wrapping_add(1),
        points: 0,
        images: 0,
    };
    all.choices.push(Vec::new());
    all
}

impl CrashImages<'_> {
    /// Crash points so far.
    #[must_use]
    pub const fn points(&self) -> usize {
        self.points
    }

    /// Images so far.
    #[must_use]
    pub const fn images(&self) -> usize {
        self.images
    }

    fn toss(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn id(&self, index: usize) -> Option<u64> {
        match &self.events[index] {
            Event::Write { id, .. } | Event::Zero { id, .. } => Some(*id),
            _ => None,
        }
    }

    fn pending_at(&self, wanted: u64) -> Option<usize> {
        let ids = self.pending.iter().map(|effect| self.id(effect.event));
        ids.into_iter().position(|id| id == Some(wanted))
    }

    fn begin(&mut self, event: usize, completed: bool) {
        self.pending.push(Effect {
            event,
            completed,
            durable: false,
        });
    }

    fn settle(&mut self) {
        let settled = self.pending.iter().take_while(|e| e.durable).count();
        for effect in self.pending.drain(..settled) {
            apply(&mut self.durable, &self.events[effect.event], Part::All);
        }
    }

    /// Go past one event; `Some`: a crash point, and whether only images with
    /// the newest effect are new.
    fn advance(&mut self) -> Option<bool> {
        let index = self.next;
        self.next += 1;
        match &self.events[index] {
            Event::Write { .. } | Event::Zero { .. } => {
                self.begin(index, false);
                Some(true)
            }
            Event::Truncate(_) | Event::Grow(_) => {
                self.begin(index, true);
                Some(true)
            }
            Event::Done(id) => {
                if let Some(at) = self.pending_at(*id) {
                    self.pending[at].completed = true;
                }
                None
            }
            Event::Durable(id) => {
                let at = self.pending_at(*id)?;
                self.pending[at].durable = true;
                self.settle();
                Some(false)
            }
            Event::Flush(id) => {
                let done = self.pending.iter().filter(|e| e.completed);
                self.flushes.insert(*id, done.map(|e| e.event).collect());
                None
            }
            Event::Flushed(id) => {
                let covered = self.flushes.remove(id).unwrap_or_default();
                for effect in &mut self.pending {
                    effect.durable |= covered.contains(&effect.event);
                }
                self.settle();
                Some(false)
            }
            Event::Mark(mark) => {
                self.marks.push(*mark);
                Some(false)
            }
        }
    }

    /// What to try at this crash point.
    fn choose(&mut self, newest: bool) {
        let n = self.pending.iter().filter(|e| !e.durable).count();
        let mut out: Vec<Vec<Part>> = Vec::new();
        if n as u32 <= self.limits.exhaustive {
            for subset in 0..1u32 << n {
                let part = |i: usize| {
                    if subset & (1 << i) != 0 {
                        Part::All
                    } else {
                        Part::None
                    }
                };
                out.push((0..n).map(part).collect());
            }
        } else {
            out.push(vec![Part::All; n]);
            out.push(vec![Part::None; n]);
            for sample in 0..self.limits.samples.min(n) {
                let i = if n <= self.limits.samples {
                    sample
                } else {
                    self.toss() as usize % n
                };
                for (most, one) in [(Part::All, Part::None), (Part::None, Part::All)] {
                    let mut parts = vec![most; n];
                    parts[i] = one;
                    out.push(parts);
                }
            }
        }
        if n > 0 && (self.limits.tear || n as u32 > self.limits.exhaustive) {
            for _ in 0..self.limits.samples {
                let parts = (0..n).map(|_| self.some_part()).collect();
                out.push(parts);
            }
        }
        if newest {
            for parts in &mut out {
                if let Some(last @ Part::None) = parts.last_mut() {
                    *last = Part::All;
                }
            }
        }
        out.sort_unstable_by_key(|parts| parts.iter().map(|p| p.rank()).collect::<Vec<_>>());
        out.dedup();
        self.choices = out;
    }

    fn some_part(&mut self) -> Part {
        match self.toss() % 8 {
            0..4 => Part::All,
            4 if self.limits.tear => Part::Torn(self.toss()),
            _ => Part::None,
        }
    }

    fn image(&self, parts: &[Part]) -> CrashImage {
        let mut bytes = self.durable.clone();
        let mut missing = Vec::new();
        let mut parts = parts.iter();
        for effect in &self.pending {
            let part = match effect.durable {
                true => Part::All,
                false => *parts.next().unwrap_or(&Part::All),
            };
            apply(&mut bytes, &self.events[effect.event], part);
            if part != Part::All {
                missing.push(effect.event);
            }
        }
        CrashImage {
            bytes,
            durable_marks: self.marks.clone(),
            after: self.next,
            missing,
        }
    }
}

impl Part {
    const fn rank(self) -> u64 {
        match self {
            Self::All => 0,
            Self::None => 1,
            Self::Torn(seed) => 2 + (seed >> 2),
        }
    }
}

impl Iterator for CrashImages<'_> {
    type Item = CrashImage;

    fn next(&mut self) -> Option<CrashImage> {
        if self.images >= self.limits.images_max {
            return None;
        }
        while self.choices.is_empty() {
            if self.next >= self.events.len() {
                return None;
            }
            if let Some(newest) = self.advance() {
                self.points += 1;
                self.choose(newest);
            }
        }
        let parts = self.choices.pop()?;
        self.images += 1;
        Some(self.image(&parts))
    }
}

fn apply(bytes: &mut Vec<u8>, event: &Event, part: Part) {
    if part == Part::None {
        return;
    }
    match event {
        Event::Write { offset, data, .. } => {
            let at = *offset as usize;
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if is_applied(part, i) {
                    put(bytes, at + i * SECTOR, sector);
                }
            }
        }
        Event::Zero { range, .. } => {
            let inside = range.intersect(ByteRange::between(0, bytes.len() as u64));
            if let Some(inside) = inside {
                bytes[inside.offset() as usize..inside.end() as usize].fill(0);
            }
        }
        Event::Truncate(len) => bytes.resize(*len as usize, 0),
        Event::Grow(len) if *len as usize > bytes.len() => bytes.resize(*len as usize, 0),
        _ => {}
    }
}

fn is_applied(part: Part, sector: usize) -> bool {
    match part {
        Part::All => true,
        Part::None => false,
        Part::Torn(seed) => {
            let mixed = (seed ^ sector as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed >> 63 == 0
        }
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    let end = at + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(data);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn write(id: u64, at: u64, byte: u8) -> Event {
        Event::Write {
            id,
            offset: at,
            data: vec![byte],
        }
    }

    fn found(events: &[Event]) -> BTreeSet<Vec<u8>> {
        crash_images(&[0, 0, 0], events, Limits::default())
            .map(|image| image.bytes)
            .collect()
    }

    #[test]
    fn without_a_flush_any_subset_may_be_there() {
        let events = [write(1, 0, 1), Event::Done(1), write(2, 1, 2)];
        let all = [[0, 0, 0], [1, 0, 0], [0, 2, 0], [1, 2, 0]];
        assert_eq!(found(&events), all.map(|b| b.to_vec()).into());
    }

    #[test]
    fn a_flush_covers_what_was_done_when_it_was_issued() {
        let events = [
            write(1, 0, 1),
            Event::Done(1),
            write(2, 1, 2),
            Event::Flush(3),
            Event::Done(2),
            Event::Flushed(3),
            Event::Mark(7),
            write(4, 2, 4),
        ];
        let images = crash_images(&[0, 0, 0], &events, Limits::default());
        let after: BTreeSet<_> = images
            .filter(|image| image.durable_marks == [7])
            .map(|image| image.bytes)
            .collect();
        let all = [[1, 0, 0], [1, 2, 0], [1, 0, 4], [1, 2, 4]];
        assert_eq!(after, all.map(|b| b.to_vec()).into());
    }

    #[test]
    fn an_older_write_does_not_come_over_a_durable_one() {
        let events = [
            write(1, 0, 1),
            Event::Done(1),
            write(2, 0, 2),
            Event::Done(2),
            Event::Durable(2),
            Event::Mark(1),
        ];
        let images = crash_images(&[0], &events, Limits::default());
        let after = images.filter(|image| image.durable_marks == [1]);
        assert!(after.map(|image| image.bytes).all(|b| b == [2]));
    }

    #[test]
    fn a_write_may_be_torn_between_sectors() {
        let data = vec![1; 2 * SECTOR];
        let events = [Event::Write {
            id: 1,
            offset: 0,
            data,
        }];
        let limits = Limits {
            samples: 200,
            ..Limits::default()
        };
        let torn = crash_images(&[0; 2 * SECTOR], &events, limits)
            .filter(|image| image.bytes[0] != image.bytes[SECTOR])
            .count();
        assert!(torn > 0);
    }

    #[test]
    fn lengths_change_like_bytes() {
        let events = [Event::Truncate(1), Event::Grow(2), Event::Flush(1)];
        let all: BTreeSet<Vec<u8>> = [vec![0; 3], vec![0; 1], vec![0; 2]].into();
        assert_eq!(found(&events), all);
    }

    #[test]
    fn many_unflushed_writes_are_sampled_and_counted() {
        let events: Vec<Event> = (0..100).map(|i| write(i, 0, 1)).collect();
        let mut images = crash_images(&[0], &events, Limits::default());
        let count = images.by_ref().count();
        assert_eq!((count, 100), (images.images(), images.points()));
        assert!(count < 100 * 64);
    }
}
