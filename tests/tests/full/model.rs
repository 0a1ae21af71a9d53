//! What a disk may hold: for every block, its contents that a client could see now, and those
//! that a killed daemon may leave.
//!
//! A block holds one number, repeated; each write brings a number that no other write has.

use std::collections::BTreeSet;

/// Bytes of a block: the unit of writing.
pub(crate) const BLOCK: u64 = 4096;

/// Bytes that are compared as one: a write that was not acknowledged may be cut between them.
const SECTOR: usize = 512;

/// Contents of one block.
#[derive(Clone, Debug)]
struct Block {
    /// One of these is read now, and after an orderly end that told no loss.
    now: BTreeSet<u64>,
    /// One of these is read after the daemon was killed: `now` of the last flush, and later.
    after_kill: BTreeSet<u64>,
}

/// A disk.
#[derive(Debug)]
pub(crate) struct Model {
    blocks: Vec<Block>,
    next: u64,
}

impl Model {
    /// A disk whose block `n` holds `content(n)`.
    pub(crate) fn new(blocks: u64, content: impl Fn(u64) -> u64) -> Self {
        let block = |n| {
            let now = BTreeSet::from([content(n)]);
            let after_kill = now.clone();
            Block { now, after_kill }
        };
        Self {
            blocks: (0..blocks).map(block).collect(),
            next: 1 << 32,
        }
    }

    /// Bytes for a write of `count` blocks, and the number of the first.
    pub(crate) fn data(&mut self, count: u64) -> (u64, Vec<u8>) {
        let first = self.next;
        self.next += count;
        let data = (first..self.next).flat_map(|it| it.to_le_bytes().repeat(BLOCK as usize / 8));
        (first, data.collect())
    }

    /// A write of numbers from `first` on was acknowledged.
    pub(crate) fn written(&mut self, at: u64, count: u64, first: u64) {
        for n in 0..count {
            self.put(at + n, first + n);
        }
    }

    /// These blocks were zeroed, and that was acknowledged.
    pub(crate) fn zeroed(&mut self, at: u64, count: u64) {
        (at..at + count).for_each(|n| self.put(n, 0));
    }

    fn put(&mut self, n: u64, number: u64) {
        let block = &mut self.blocks[n as usize];
        block.now = BTreeSet::from([number]);
        block.after_kill.insert(number);
    }

    /// A write was refused, or never answered: any part of it may be there.
    pub(crate) fn perhaps_written(&mut self, at: u64, count: u64, first: u64) {
        for n in 0..count {
            self.perhaps(at + n, first + n);
        }
    }

    /// These blocks were discarded, or zeroing them was refused.
    pub(crate) fn perhaps_zeroed(&mut self, at: u64, count: u64) {
        (at..at + count).for_each(|n| self.perhaps(n, 0));
    }

    fn perhaps(&mut self, n: u64, number: u64) {
        let block = &mut self.blocks[n as usize];
        block.now.insert(number);
        block.after_kill.insert(number);
    }

    /// A flush was acknowledged.
    pub(crate) fn flushed(&mut self) {
        for block in &mut self.blocks {
            block.after_kill.clone_from(&block.now);
        }
    }

    /// Compares the whole disk, and knows its content from now on. `told` is true when more may
    /// be missing than was not acknowledged: the daemon was killed, or its end told the loss.
    pub(crate) fn compare(&mut self, content: &[u8], told: bool) -> Result<(), String> {
        if content.len() as u64 != self.blocks.len() as u64 * BLOCK {
            return Err(format!("the disk has {} bytes", content.len()));
        }
        let mut wrong = Vec::new();
        for (n, bytes) in content.chunks(BLOCK as usize).enumerate() {
            let block = &mut self.blocks[n];
            let allowed = if told { &block.after_kill } else { &block.now };
            let seen: BTreeSet<_> = bytes.chunks(SECTOR).map(number).collect();
            let good = seen
                .iter()
                .all(|it| it.is_some_and(|it| allowed.contains(&it)));
            if !good {
                wrong.push(format!("block {n}: {seen:x?}, not of {allowed:x?}"));
                continue;
            }
            block.now = seen.into_iter().flatten().collect();
            block.after_kill.clone_from(&block.now);
        }
        match wrong.first() {
            None => Ok(()),
            Some(first) => Err(format!("{} blocks are wrong; {first}", wrong.len())),
        }
    }
}

/// The number that a sector repeats, if it does.
fn number(sector: &[u8]) -> Option<u64> {
    let (numbers, _) = sector.as_chunks::<8>();
    let first = numbers.first()?;
    let same = numbers.iter().all(|it| it == first);
    same.then(|| u64::from_le_bytes(*first))
}
