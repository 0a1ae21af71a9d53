//! Allocation status, for NBD's metadata contexts, `qemu-img map` and jobs.
//!
//! On the iothread of whoever asks. What is asked may be all of a disk, and so may be the answer:
//! where the extent map does not know, the plugin's own answer is told, checked, and is not put
//! into the map. An answer larger than the map would push its own front out, and one that fills
//! it pushes out what readers need. Invariant: nothing of such an answer is read or written by.

use crate::format::{Extent, Location};
use crate::node::Status;
use crate::{ByteRange, Errno};

use super::Image;
use super::map::{Place, Run};

impl Image {
    /// Status of a front part of `range`.
    pub(crate) async fn status(&self, range: ByteRange) -> Result<Status, Errno> {
        let _pass = self.gate.enter().await;
        let run = self.run_of_any_length(range).await?;
        let here = Status {
            len: run.len,
            data: false,
            zero: false,
            depth: 1,
        };
        Ok(match run.place {
            Place::Raw { .. } | Place::Coded(_) | Place::Special(_) => {
                Status { data: true, ..here }
            }
            Place::Zero => Status { zero: true, ..here },
            // With a backing image: behind its end. As in QEMU these zeroes count as its own.
            Place::Hole => Status {
                zero: true,
                depth: if self.backing().is_some() { 2 } else { 0 },
                ..here
            },
            Place::Backing(offset) => match self.backing() {
                None => Status {
                    zero: true,
                    depth: 0,
                    ..here
                },
                Some(backing) => {
                    let inside = backing.size().saturating_sub(offset).min(run.len);
                    if inside == 0 {
                        return Ok(Status {
                            zero: true,
                            depth: 2,
                            ..here
                        });
                    }
                    let below = ByteRange::between(offset, offset + inside);
                    let status = backing.status(below).await?;
                    let depth = if status.depth == 0 {
                        0
                    } else {
                        status.depth + 1
                    };
                    Status { depth, ..status }
                }
            },
            Place::Unknown => return Err(Errno::Io),
        })
    }

    /// What lies at the start of `range`, and how far.
    async fn run_of_any_length(&self, range: ByteRange) -> Result<Run, Errno> {
        let run = self.map.run(range);
        if run.place != Place::Unknown {
            return Ok(run);
        }
        let mut plugin = self.plugin.lock().await;
        // A trap is tried again inside `call`, a lie here.
        for _ in 0..2 {
            let extents = self
                .call(&mut plugin, |f| f.resolve(range))
                .await
                .map_err(|e| self.not_mapped(range, &e))?;
            let nothing_kept = ByteRange::between(range.offset(), range.offset());
            match self.check_resolved(&plugin, range, nothing_kept, &extents) {
                Ok(_no_claims) => return first_run(range, &extents).ok_or(Errno::Io),
                Err(fault) => {
                    let e = self.lie(&mut plugin, fault);
                    self.not_mapped(range, &e);
                }
            }
        }
        Err(Errno::Io)
    }
}

/// The run of extents of one kind that `range` begins in. They follow one another.
fn first_run(range: ByteRange, extents: &[Extent]) -> Option<Run> {
    let from = range.offset();
    let mut rest = extents.iter().skip_while(|it| it.range.end() <= from);
    let first = rest.next()?;
    let place = place(first, from);
    let mut end = first.range.end();
    for next in rest {
        if end >= range.end() || !goes_on(place, from, next) {
            break;
        }
        end = next.range.end();
    }
    Some(Run {
        place,
        len: end.min(range.end()).saturating_sub(from),
    })
}

fn place(extent: &Extent, at: u64) -> Place {
    let within = at.saturating_sub(extent.range.offset());
    match extent.at {
        Location::Raw { slot, offset, .. } => Place::Raw {
            slot,
            offset: offset + within,
            in_place: false,
        },
        Location::Zero => Place::Zero,
        Location::Hole => Place::Hole,
        Location::Backing(offset) => Place::Backing(offset + within),
        Location::Coded(unit) => Place::Coded(unit),
        Location::Special(id) => Place::Special(id),
    }
}

/// Does the extent say the same of its bytes as `place`, which is at `from`, says of those there?
/// Where stored bytes lie makes no difference.
fn goes_on(place: Place, from: u64, next: &Extent) -> bool {
    let stored = |place| {
        matches!(
            place,
            Place::Raw { .. } | Place::Coded(_) | Place::Special(_)
        )
    };
    match (place, self::place(next, next.range.offset())) {
        (Place::Zero, Place::Zero) | (Place::Hole, Place::Hole) => true,
        (Place::Backing(here), Place::Backing(there)) => {
            there.wrapping_sub(here) == next.range.offset().wrapping_sub(from)
        }
        (here, there) => stored(here) && stored(there),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64, at: Location) -> Extent {
        Extent {
            range: ByteRange::new(offset, len).unwrap(),
            at,
        }
    }

    #[test]
    fn a_run_goes_as_far_as_the_answer() {
        let raw = |offset| Location::Raw {
            slot: 0,
            offset,
            in_place: true,
        };
        let extents = [
            extent(0, 512, raw(1 << 20)),
            extent(512, 512, raw(1 << 30)),
            extent(1024, 1 << 50, Location::Hole),
            extent(1024 + (1 << 50), 512, Location::Backing(512)),
            extent(1536 + (1 << 50), 512, Location::Backing(1024)),
            extent(2048 + (1 << 50), 512, Location::Backing(0)),
        ];
        let run = |offset, len| {
            let run = first_run(ByteRange::new(offset, len).unwrap(), &extents).unwrap();
            (run.place, run.len)
        };
        let stored = Place::Raw {
            slot: 0,
            offset: (1 << 20) + 100,
            in_place: false,
        };
        assert_eq!(run(100, 1 << 60), (stored, 924));
        assert_eq!(run(1024, 1 << 60), (Place::Hole, 1 << 50));
        assert_eq!(run(2048, 4096), (Place::Hole, 4096));
        assert_eq!(run(1024 + (1 << 50), 4096), (Place::Backing(512), 1024));
        assert_eq!(run(1124 + (1 << 50), 10), (Place::Backing(612), 10));
    }
}
