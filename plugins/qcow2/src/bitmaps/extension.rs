//! Putting the bitmaps extension into a header that is in use, without a moment at which a power
//! cut leaves no header (qcow2.rst: Bitmaps extension).
//!
//! Sectors are written whole or not at all, so a change is either inside one sector, or nobody
//! reads it yet: the extension while the autoclear bit is off, bytes behind the last extension,
//! a backing file name that nothing points at. What depends on another change waits until that
//! one is durable: a step at a time, each of which begins with what the header holds by then.

use outport_sdk::{Error, Result, Stage};

use crate::header::{Header, autoclear, extension_kind, field};

const SECTOR: usize = 512;

/// The extension with its head, and the end of all extensions.
const EXTENSION_BYTES: usize = 32;
const END_BYTES: usize = 8;

/// What the extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) count: u32,
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

impl Target {
    fn data(self) -> Vec<u8> {
        let mut data = self.count.to_be_bytes().to_vec();
        data.extend([0; 4]);
        data.extend(self.bytes.to_be_bytes());
        data.extend(self.offset.to_be_bytes());
        data
    }
}

/// What to write now.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) writes: Vec<(Stage, u64, Vec<u8>)>,
    /// It says what it is to say once this is durable.
    pub(super) done: bool,
}

impl Step {
    fn write(mut self, stage: Stage, at: usize, bytes: impl Into<Vec<u8>>) -> Self {
        self.writes.push((stage, at as u64, bytes.into()));
        self
    }

    /// The autoclear bit, on or off.
    fn bit(self, header: &Header, on: bool) -> Self {
        let bits = header.autoclear & !autoclear::BITMAPS;
        let bits = bits | if on { autoclear::BITMAPS } else { 0 };
        let at = field::AUTOCLEAR as usize;
        self.write(Stage::Mapping, at, bits.to_be_bytes())
    }

    const fn done(mut self) -> Self {
        self.done = true;
        self
    }
}

/// Where things lie in a header.
struct Layout {
    /// The bitmaps extension, and whether others follow it.
    bitmaps: Option<(usize, bool)>,
    /// The mark that ends the extensions, or where there is no room for one.
    end: usize,
    /// Where extensions must end.
    limit: usize,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_be_bytes(*word))
}

/// Of a header that was parsed, so that its lengths are right.
fn layout(cluster: &[u8], header: &Header) -> Layout {
    let name = match &header.backing_file {
        Some(_) => u64::from(word(cluster, 8)) << 32 | u64::from(word(cluster, 12)),
        None => cluster.len() as u64,
    };
    let limit = usize::try_from(name).map_or(cluster.len(), |name| name.min(cluster.len()));
    let mut layout = Layout {
        bitmaps: None,
        end: header.header_length as usize,
        limit,
    };
    while layout.end + END_BYTES <= limit {
        let (kind, len) = (word(cluster, layout.end), word(cluster, layout.end + 4));
        if kind == extension_kind::END {
            break;
        }
        match &mut layout.bitmaps {
            Some((_, followed)) => *followed = true,
            None if kind == extension_kind::BITMAPS => layout.bitmaps = Some((layout.end, false)),
            None => {}
        }
        layout.end += END_BYTES + (len as usize).next_multiple_of(8);
    }
    layout
}

/// The next step on the way to a header that says `target`; the first cluster is `cluster`.
pub(super) fn step(cluster: &[u8], header: &Header, target: Option<Target>) -> Result<Step> {
    if header.version < 3 {
        return Err(Error::unsupported(
            "Cannot store dirty bitmaps in qcow2 v2 files",
        ));
    }
    let layout = layout(cluster, header);
    let active = header.autoclear & autoclear::BITMAPS != 0;
    let step = Step::default();
    let Some(target) = target else {
        return Ok(match layout.bitmaps {
            _ if active => step.bit(header, false),
            // The last one goes; before others it stays, and means nothing.
            Some((at, false)) => step.write(Stage::Mapping, at, [0; END_BYTES]).done(),
            _ => step.done(),
        });
    };
    let Some((at, _)) = layout.bitmaps else {
        return make_room(cluster, header, &layout, target);
    };
    let data = at + END_BYTES;
    let in_one_sector = data / SECTOR == (data + target.data().len() - 1) / SECTOR;
    Ok(match active {
        false => {
            let step = step.write(Stage::Prepare, data, target.data());
            step.bit(header, true).done()
        }
        true if in_one_sector => step.write(Stage::Mapping, data, target.data()).done(),
        // For a moment there are no bitmaps at all.
        true => step.bit(header, false),
    })
}

/// There is no extension yet, so the bit is off.
fn make_room(cluster: &[u8], header: &Header, layout: &Layout, target: Target) -> Result<Step> {
    let step = Step::default();
    if layout.end + END_BYTES > layout.limit {
        // Without the mark what lies behind would be taken for extensions.
        return Err(no_room());
    }
    let after = layout.end + EXTENSION_BYTES + END_BYTES;
    if after > layout.limit {
        if header.backing_file.is_none() {
            return Err(no_room());
        }
        // The name moves to behind where it ends now and the extension will.
        let len = word(cluster, 16) as usize;
        let bytes = cluster.get(layout.limit..layout.limit + len);
        let bytes = bytes.ok_or_else(no_room)?.to_vec();
        let to = (layout.limit + len).next_multiple_of(8).max(after);
        if to + len > cluster.len() {
            return Err(no_room());
        }
        let offset = (to as u64).to_be_bytes();
        let step = step.write(Stage::Prepare, to, bytes);
        return Ok(step.write(Stage::Mapping, 8, offset));
    }
    let mut extension = extension_kind::BITMAPS.to_be_bytes().to_vec();
    extension.extend((target.data().len() as u32).to_be_bytes());
    extension.extend(target.data());
    let behind = layout.end + END_BYTES..after;
    let behind = cluster.get(behind).ok_or_else(no_room)?;
    if behind.iter().any(|byte| *byte != 0) {
        // Something lay here once. It must not be taken for an extension if the sectors of ours
        // are not written together.
        let zeroes = vec![0; behind.len()];
        let step = step.write(Stage::Prepare, layout.end + END_BYTES, zeroes);
        return Ok(step.write(Stage::Mapping, layout.end, extension));
    }
    let step = step.write(Stage::Prepare, layout.end, extension);
    Ok(step.bit(header, true).done())
}

fn no_room() -> Error {
    Error::unsupported("The header has no room for the bitmaps extension")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Extension;
    use crate::header::tests::sample;

    const TARGET: Target = Target {
        count: 3,
        bytes: 96,
        offset: 0x9_0000,
    };

    fn bitmaps(header: &Header) -> Option<Target> {
        let (count, bytes, offset) = header.active_bitmaps()?;
        Some(Target {
            count,
            bytes,
            offset,
        })
    }

    /// Whatever sectors of a step's stage were written, the header parses, says one of `allowed`,
    /// and keeps all else.
    fn torn(before: &[u8], writes: &[(u64, Vec<u8>)], kept: &Header, allowed: &[Option<Target>]) {
        let mut after = before.to_vec();
        for (at, bytes) in writes {
            after[*at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        let sectors = before.len() / SECTOR;
        let differing: Vec<_> = (0..sectors)
            .map(|n| n * SECTOR..(n + 1) * SECTOR)
            .filter(|sector| before[sector.clone()] != after[sector.clone()])
            .collect();
        for some in 0..1_u32 << differing.len() {
            let mut bytes = before.to_vec();
            for (n, sector) in differing.iter().enumerate() {
                if some >> n & 1 == 1 {
                    bytes[sector.clone()].copy_from_slice(&after[sector.clone()]);
                }
            }
            let header = Header::parse(&bytes).unwrap();
            assert!(
                allowed.contains(&bitmaps(&header)),
                "{:?}",
                bitmaps(&header)
            );
            assert_eq!(header.backing_file, kept.backing_file);
            let others = |header: &Header| {
                let mut all = header.extensions.clone();
                all.retain(|it| !matches!(it, Extension::Bitmaps { .. }));
                all
            };
            assert_eq!(others(&header), others(kept));
        }
    }

    /// Walks there step by step, with every torn state of every stage on the way.
    fn walk(mut cluster: Vec<u8>, to: Option<Target>) -> (Vec<u8>, usize) {
        for steps in 1..6 {
            let header = Header::parse(&cluster).unwrap();
            let from = bitmaps(&header);
            let step = step(&cluster, &header, to).unwrap();
            for stage in [Stage::Prepare, Stage::Mapping] {
                let writes: Vec<_> = step
                    .writes
                    .iter()
                    .filter(|it| it.0 == stage)
                    .map(|it| (it.1, it.2.clone()))
                    .collect();
                torn(&cluster, &writes, &header, &[from, to, None]);
                if stage == Stage::Prepare {
                    // Nothing that was right is wrong before the mapping stage.
                    torn(&cluster, &writes, &header, &[from]);
                }
                for (at, bytes) in writes {
                    cluster[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
            }
            if step.done {
                assert_eq!(bitmaps(&Header::parse(&cluster).unwrap()), to);
                return (cluster, steps);
            }
        }
        panic!("no end");
    }

    #[test]
    fn every_layout_gets_there_through_torn_writes() {
        // Unknown extensions of all lengths move ours across the sectors.
        for len in (0..1024).step_by(8) {
            for backing in [None, Some("base.raw".to_owned()), Some("x".repeat(600))] {
                let mut header = sample();
                header.backing_file = backing.clone();
                header.extensions.push(Extension::Unknown {
                    kind: 7,
                    data: vec![5; len],
                });
                let mut cluster = header.serialise().unwrap();
                cluster.resize(65536, 0);
                let (cluster, steps) = walk(cluster, Some(TARGET));
                assert!(steps <= 3, "{steps}");
                let other = Target {
                    offset: 0x11_0000,
                    ..TARGET
                };
                let (cluster, _) = walk(cluster, Some(other));
                let (cluster, steps) = walk(cluster, None);
                assert_eq!(steps, 2);
                assert!(!Header::parse(&cluster).unwrap().has_bitmaps());
                walk(cluster, Some(TARGET));
            }
        }
    }

    #[test]
    fn a_full_header_says_so() {
        let mut header = sample();
        header.cluster_bits = 9;
        header.size = 512;
        header.backing_file = None;
        header.extensions = vec![Extension::Unknown {
            kind: 7,
            data: vec![0; 352],
        }];
        let mut cluster = header.serialise().unwrap();
        cluster.resize(512, 0);
        let header = Header::parse(&cluster).unwrap();
        assert!(step(&cluster, &header, Some(TARGET)).is_err());
    }
}
