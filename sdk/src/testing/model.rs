//! Random operations on a writable image, and on plain bytes beside it.

use super::disk::Disk;
use super::host::broken;
use super::node::TestNode;
use super::random::Random;
use crate::{ByteRange, Codec, Result, WritableFormat};
use std::fmt;

/// One operation of a client or of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes in flight together, none overlapping another.
    Write {
        /// Where and what.
        writes: Vec<(u64, Vec<u8>)>,
        /// Commit them one by one, in the opposite order.
        split: bool,
    },
    /// One whole cluster, compressed by the host.
    WriteCompressed {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// How.
        codec: Codec,
    },
    /// WRITE_ZEROES.
    Zero {
        /// Which bytes.
        range: ByteRange,
        /// Keep space allocated.
        keep: bool,
    },
    /// DISCARD.
    Discard(ByteRange),
    /// A write that fails after `prepare_write`.
    Abort(ByteRange),
    /// The host's overlay is full.
    WriteBack,
    /// FLUSH.
    Flush,
    /// A new length.
    Resize(u64),
    /// Clean close and open.
    Reopen,
}

/// Short: where, how much, and the byte that says which operation it was.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { writes, split } => {
                f.write_str(if *split {
                    "Write, committed backwards,"
                } else {
                    "Write"
                })?;
                writes.iter().try_for_each(|(at, data)| {
                    let byte = data.get(1).or(data.first()).copied().unwrap_or(0);
                    write!(f, " {at}+{} of {byte:#04x}", data.len())
                })
            }
            Self::WriteCompressed {
                offset,
                data,
                codec,
            } => {
                write!(f, "WriteCompressed {offset}+{} by {codec:?}", data.len())
            }
            Self::Zero { range, keep } => {
                write!(f, "Zero {}+{} keep={keep}", range.offset, range.len)
            }
            Self::Discard(range) => write!(f, "Discard {}+{}", range.offset, range.len),
            Self::Abort(range) => write!(f, "Abort {}+{}", range.offset, range.len),
            other => write!(f, "{other:?}"),
        }
    }
}

/// What [`random_ops`] makes.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Names the sequence.
    pub seed: u64,
    /// How many operations.
    pub ops: usize,
    /// Length of the image at the start.
    pub size: u64,
    /// Cluster of the format.
    pub cluster_size: u64,
    /// Compressed writes with this codec.
    pub codec: Option<Codec>,
    /// Let it be resized, up to this length.
    pub resize_max: Option<u64>,
}

/// A reproducible sequence. Half of all operations hit the first few clusters,
/// so that things happen to the same bytes again and again.
pub fn random_ops(w: &Workload) -> Vec<Op> {
    let mut random = Random::new(w.seed);
    let mut size = w.size;
    let mut ops = Vec::with_capacity(w.ops);
    for index in 0..w.ops {
        let fill = (index % 255) as u8 + 1;
        ops.push(match random.below(20) {
            0..9 => write(&mut random, w, size, fill),
            9 if w.codec.is_some() => compressed(&mut random, w, size, fill),
            9 | 10 => Op::Zero {
                range: range(&mut random, w, size),
                keep: random.one_in(3),
            },
            11..13 => Op::Discard(range(&mut random, w, size)),
            13 => Op::Abort(range(&mut random, w, size)),
            14 => Op::WriteBack,
            15 => Op::Reopen,
            16 if w.resize_max.is_some() => {
                let limit = w.resize_max.unwrap_or(size) / 512;
                size = (1 + random.below(limit)) * 512;
                Op::Resize(size)
            }
            _ => Op::Flush,
        });
    }
    ops
}

fn range(random: &mut Random, w: &Workload, size: u64) -> ByteRange {
    let hot = if random.one_in(2) {
        size.min(4 * w.cluster_size)
    } else {
        size
    };
    let mut offset = random.below(hot);
    let mut len = 1 + random.below(2 * w.cluster_size);
    if !random.one_in(4) {
        offset -= offset % 512;
        len = len.next_multiple_of(512);
    }
    if random.one_in(4) {
        offset -= offset % w.cluster_size;
        len = len.next_multiple_of(w.cluster_size);
    }
    ByteRange::new(offset, len.min(size - offset))
}

/// Bytes that say which operation wrote them, and where.
fn content(range: ByteRange, fill: u8) -> Vec<u8> {
    (0..range.len)
        .map(|i| {
            if i % 7 == 0 {
                (range.offset >> 9) as u8
            } else {
                fill
            }
        })
        .collect()
}

fn write(random: &mut Random, w: &Workload, size: u64, fill: u8) -> Op {
    let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
    for _ in 0..=random.below(3) {
        let new = range(random, w, size);
        let apart =
            |(at, data): &(u64, Vec<u8>)| new.end() <= *at || at + data.len() as u64 <= new.offset;
        if writes.iter().all(apart) {
            writes.push((new.offset, content(new, fill)));
        }
    }
    Op::Write {
        writes,
        split: random.one_in(2),
    }
}

fn compressed(random: &mut Random, w: &Workload, size: u64, fill: u8) -> Op {
    let offset = random.below(size) / w.cluster_size * w.cluster_size;
    let data = content(
        ByteRange::new(offset, w.cluster_size.min(size - offset)),
        fill,
    );
    Op::WriteCompressed {
        offset,
        data,
        codec: w.codec.unwrap_or(Codec::Deflate),
    }
}

/// Run `op` on the node and on `model`, the bytes that it should have then.
pub(super) fn apply<T: WritableFormat>(
    node: &mut TestNode<T>,
    model: &mut Disk,
    op: &Op,
) -> Result<()> {
    match op {
        Op::Write { writes, split } => {
            let slices: Vec<(u64, &[u8])> = writes.iter().map(|(at, d)| (*at, &d[..])).collect();
            node.write_batch(&slices, *split)?;
            writes.iter().for_each(|(at, data)| model.write(*at, data));
        }
        Op::WriteCompressed {
            offset,
            data,
            codec,
        } => {
            node.write_compressed(*offset, data, *codec)?;
            model.write(*offset, data);
        }
        Op::Zero { range, keep } => {
            node.write_zeroes(range.offset, range.len, *keep)?;
            model.zero(*range);
        }
        Op::Discard(range) => {
            node.discard(range.offset, range.len)?;
            // Zeroes, the backing image, or what was there: the format's choice.
            model.write(range.offset, &node.read(range.offset, range.len as usize)?);
        }
        Op::Abort(range) => node.abort_write(*range)?,
        Op::WriteBack => node.write_back()?,
        Op::Flush => node.flush()?,
        Op::Resize(size) => {
            node.resize(*size)?;
            let old = model.len();
            model.set_len(*size);
            if *size > old {
                // New bytes of an image with a backing file show the backing.
                let grown = node.read(old, (*size - old) as usize)?;
                model.write(old, &grown);
            }
        }
        Op::Reopen => node.reopen()?,
    }
    Ok(())
}

/// Run all `ops`; after each, what it touched reads as the model says, and at
/// the end everything does. The error names the operation.
pub fn run<T: WritableFormat>(node: &mut TestNode<T>, ops: &[Op]) -> Result<()> {
    let mut model = node.read_all()?;
    for (index, op) in ops.iter().enumerate() {
        let named = |e: crate::Error| crate::Error::new(e.code, format!("Op {index} ({op}): {e}"));
        apply(node, &mut model, op).map_err(named)?;
        let whole = matches!(op, Op::Reopen | Op::Resize(_)) || index + 1 == ops.len();
        if whole || index % 16 == 0 {
            compare(&node.read_all()?, &model).map_err(named)?;
        }
    }
    Ok(())
}

fn compare(found: &Disk, model: &Disk) -> Result<()> {
    if found.len() != model.len() {
        return Err(broken(format!(
            "{} bytes instead of {}",
            found.len(),
            model.len()
        )));
    }
    if !found.differs(model, ByteRange::new(0, model.len())) {
        return Ok(());
    }
    let (found, model) = (found.to_vec(), model.to_vec());
    let at = found
        .iter()
        .zip(&model)
        .position(|(a, b)| a != b)
        .unwrap_or(0);
    Err(broken(format!(
        "byte {at} reads {:#04x} instead of {:#04x}",
        found[at], model[at]
    )))
}
