//! The verifier under random answers: any bytes are a conversation of a host and a plugin.
//!
//! Not used by a daemon. Whatever the plugin says, nothing panics; and what the verifier
//! believed is held against rules that are stated a second time, on lists and without its
//! sets ([`book`]). Breaking one is a find.

mod book;

use crate::ByteRange;
use crate::format::{
    Child, ChildKind, Codec, Coded, Extent, Geometry, Location, Placement, SlotRange, Stage, TxnOp,
    WriteIntent, WriteKind,
};

use super::{Claims, Pending, Verifier, children, geometry};
use book::Book;

/// Files that exist; the plugin also names one more.
const SLOTS: u32 = 2;

/// Rounds of one conversation.
const TURNS_MAX: usize = 200;

/// Bytes as decisions; when there are none left, all are 0.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn below(&mut self, n: u64) -> u64 {
        u64::from(self.byte()) % n
    }

    fn one_in(&mut self, n: u8) -> bool {
        self.byte() % n == n - 1
    }

    /// Mostly a small multiple of 512, sometimes beside one, seldom anything at all.
    fn number(&mut self) -> u64 {
        let small = self.below(64) * 512;
        match self.byte() {
            0..220 => small,
            220..240 => small + self.below(512),
            240..250 => small + 1 + (self.below(4) << 54),
            _ => u64::from_be_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn range(&mut self) -> ByteRange {
        let (offset, len) = (self.number(), self.number());
        ByteRange::new(offset, len).unwrap_or(ByteRange::between(512, 1024))
    }

    fn slot(&mut self) -> u32 {
        match self.byte() {
            0..160 => 0,
            160..250 => 1,
            _ => SLOTS,
        }
    }
}

/// How often the plugin was believed, and how often not.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    believed: usize,
    refused: usize,
}

/// A conversation. The first bytes say what image it is about.
pub(crate) fn verifier(bytes: &[u8]) {
    converse(bytes);
}

fn converse(bytes: &[u8]) -> Count {
    let mut script = Script(bytes);
    let geometry = some_geometry(&mut script);
    let _ = children(&some_children(&mut script));
    let mut talk = Talk {
        script,
        verifier: Verifier::new(SLOTS as usize, &geometry),
        book: Book::new(SLOTS, &geometry),
        geometry,
        count: Count::default(),
    };
    for _ in 0..TURNS_MAX {
        if talk.script.0.is_empty() {
            break;
        }
        talk.turn();
    }
    talk.count
}

/// What the plugin says of itself, if the host can serve that; else something that it can.
fn some_geometry(script: &mut Script<'_>) -> Geometry {
    let told = Geometry {
        size: script.number(),
        unit: script.number() as u32,
        cluster_size: script.number() as u32,
        zero_granularity: script.number() as u32,
        discard_granularity: 0,
    };
    if geometry(&told).is_ok() {
        Book::assert_served(&told);
        return told;
    }
    let unit = 512 << script.below(3);
    Geometry {
        size: 16384 + script.below(9) * 512,
        unit,
        cluster_size: unit << script.below(3),
        zero_granularity: 0,
        discard_granularity: 0,
    }
}

fn some_children(script: &mut Script<'_>) -> Vec<Child> {
    let child = |script: &mut Script<'_>| Child {
        id: script.below(4).to_string(),
        kind: match script.below(3) {
            0 => ChildKind::Backing,
            _ => ChildKind::Storage,
        },
        reference: None,
        format: None,
        required: false,
    };
    (0..script.below(4)).map(|_| child(script)).collect()
}

struct Talk<'a> {
    script: Script<'a>,
    verifier: Verifier,
    book: Book,
    geometry: Geometry,
    count: Count,
}

impl Talk<'_> {
    fn turn(&mut self) {
        match self.script.byte() % 16 {
            0..6 => self.answer_extents(),
            6..10 => self.answer_placements(),
            10 => {
                let size = self.script.below(64) * 512;
                self.geometry.size = size;
                self.verifier.set_size(size);
                self.book.size = size;
            }
            11 => {
                let guest = self.script.range();
                self.verifier.evict(guest);
                self.book.evict(guest);
            }
            12 => {
                let (slot, range) = (self.script.slot(), self.script.range());
                self.verifier.disown(slot, range);
                self.book.disown(slot, range);
            }
            13 => {
                let (slot, range) = (self.script.slot(), self.script.range());
                self.verifier.freed(SlotRange { slot, range });
                self.book.freed(slot, range);
            }
            14 => {
                let (slot, range) = (self.script.slot(), self.script.range());
                self.verifier.released(SlotRange { slot, range });
                self.book.released(slot, range);
            }
            _ => self.queue_only(),
        }
    }

    /// What the call queued; `None`: that alone was refused.
    fn queued(&mut self) -> Option<(Vec<TxnOp>, Pending)> {
        let ops = match self.script.byte() {
            0..128 => 0,
            n => u64::from(n) % 3 + 1,
        };
        let txn: Vec<TxnOp> = (0..ops).map(|_| self.some_op()).collect();
        match self.verifier.transaction(&txn) {
            Ok(pending) => {
                self.book.assert_queued(&txn);
                Some((txn, pending))
            }
            Err(_) => {
                self.count.refused += 1;
                None
            }
        }
    }

    fn some_op(&mut self) -> TxnOp {
        let script = &mut self.script;
        let slot = script.slot();
        let stage = match script.below(2) {
            0 => Stage::Prepare,
            _ => Stage::Mapping,
        };
        match script.below(8) {
            0..4 => TxnOp::Write {
                slot,
                stage,
                offset: script.number(),
                data: vec![0; script.below(4) as usize * 512],
            },
            4 | 5 => TxnOp::Zero {
                slot,
                stage,
                range: script.range(),
            },
            6 => TxnOp::Grow {
                slot,
                size: script.number(),
            },
            _ => TxnOp::Free(SlotRange {
                slot,
                range: script.range(),
            }),
        }
    }

    fn queue_only(&mut self) {
        if let Some((txn, pending)) = self.queued() {
            self.verifier.adopt(&pending, Claims::default());
            self.book.adopt_queued(&txn);
            self.count.believed += 1;
        }
    }

    // === extents ===

    fn answer_extents(&mut self) {
        let unit = u64::from(self.geometry.unit);
        let asked = ByteRange::between(0, self.geometry.size.max(1));
        let start = self.script.number() % asked.end();
        let asked = ByteRange::between(start, start + 1);
        let extents = self.some_extents(start / unit * unit);
        let near = match self.script.one_in(4) {
            true => self.script.range(),
            false => ByteRange::between(0, ByteRange::END_MAX),
        };
        let len = self.script.number();
        let Some((txn, pending)) = self.queued() else {
            return;
        };
        let believed = self
            .verifier
            .extents(asked, &extents, near, &pending, &|_| len);
        let Ok(claims) = believed else {
            self.count.refused += 1;
            return;
        };
        self.count.believed += 1;
        let claimed = self.book.assert_extents(asked, &extents, near, &txn, len);
        self.verifier.adopt(&pending, claims);
        self.book.adopt_queued(&txn);
        self.book.adopt_claims(&claimed);
    }

    fn some_extents(&mut self, mut at: u64) -> Vec<Extent> {
        let unit = u64::from(self.geometry.unit);
        let mut extents = Vec::new();
        for _ in 0..=self.script.below(4) {
            let script = &mut self.script;
            let mut len = (1 + script.below(4)) * unit;
            if !script.one_in(8) {
                len = len.min(self.geometry.size.saturating_sub(at));
            }
            if script.one_in(40) {
                at = script.number();
            }
            if script.one_in(40) {
                len = script.number();
            }
            let Some(range) = ByteRange::new(at, len) else {
                break;
            };
            extents.push(Extent {
                range,
                at: self.some_location(range),
            });
            at = range.end();
        }
        extents
    }

    fn some_location(&mut self, range: ByteRange) -> Location {
        let script = &mut self.script;
        match script.below(12) {
            0..7 => Location::Raw {
                slot: script.slot(),
                offset: script.number(),
                in_place: !script.one_in(4),
            },
            7 => Location::Zero,
            8 => Location::Hole,
            9 => Location::Backing(script.number()),
            10 => Location::Special(script.number()),
            _ => Location::Coded(Coded {
                slot: script.slot(),
                offset: script.number(),
                stored_len: script.number() as u32,
                codec: Codec::Deflate,
                unit_offset: range.offset().saturating_sub(script.number()),
                unit_len: script.number() as u32,
            }),
        }
    }

    // === placements ===

    fn answer_placements(&mut self) {
        let cluster = u64::from(self.geometry.cluster_size);
        let mut intents = Vec::new();
        for _ in 0..=self.script.below(3) {
            let start = self.script.number() % self.geometry.size.max(1);
            let end = (start + 1 + self.script.number() % cluster).min(self.geometry.size);
            intents.push(WriteIntent {
                range: ByteRange::between(start.min(end), end),
                kind: match self.script.one_in(3) {
                    true => WriteKind::Compressed,
                    false => WriteKind::Data,
                },
                stored_len: self.script.number() as u32,
            });
        }
        let placements: Vec<Placement> = (0..=self.script.below(3))
            .map(|_| self.some_placement(&intents))
            .collect();
        let Some((txn, pending)) = self.queued() else {
            return;
        };
        let taken = self.script.below(16);
        let is_taken = |token| token == taken;
        let believed = self
            .verifier
            .placements(&intents, &placements, &pending, &is_taken);
        let Ok(claims) = believed else {
            self.count.refused += 1;
            return;
        };
        self.count.believed += 1;
        let claimed = self
            .book
            .assert_placements(&intents, &placements, &txn, taken);
        self.verifier.adopt(&pending, claims);
        self.book.adopt_queued(&txn);
        self.book.adopt_claims(&claimed);
    }

    fn some_placement(&mut self, intents: &[WriteIntent]) -> Placement {
        let unit = u64::from(self.geometry.unit);
        let script = &mut self.script;
        let intent = script.below(intents.len() as u64 + 1).min(2) as u32;
        let covers = match intents.get(intent as usize) {
            Some(intent) if !script.one_in(8) => intent.range.align_out(unit),
            _ => script.range(),
        };
        Placement {
            token: script.below(16),
            intent,
            covers,
            slot: script.slot(),
            offset: script.number(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_conversation_panics_or_makes_the_host_believe_a_lie() {
        let mut state = 1_u64;
        let mut noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let mut all = Count::default();
        for _ in 0..3000 {
            let bytes: Vec<u8> = (0..1000).map(|_| noise()).collect();
            let count = converse(&bytes);
            all.believed += count.believed;
            all.refused += count.refused;
        }
        println!("{all:?}");
        // Neither is rare, or the rules are not put to the test.
        assert!(all.believed > 5000 && all.refused > 5000, "{all:?}");
    }
}
