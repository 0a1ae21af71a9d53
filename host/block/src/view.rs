//! What a provider of metadata contexts may see of a node: its length and what the host knows of
//! its ranges, never its data. In the words of `wit/metactx.wit`.
//!
//! Asked on the iothread whose client wants a block status.

use std::hash::{Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;

use crate::bitmap::DirtyBitmap;
use crate::metacontext::ContextExtent;
use crate::node::Kind;
use crate::rule::{self, Rule};
use crate::{ByteRange, Errno, Node};

/// A view that may wait for metadata.
pub type Viewing<'a, T> = Pin<Box<dyn Future<Output = Result<T, Errno>> + Send + 'a>>;

/// A run of bytes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// How many bytes.
    pub len: u64,
    /// They lie in a file.
    pub data: bool,
    /// They read as zeroes.
    pub zero: bool,
    /// The image of the chain that has them: 1 is the top one, 0 none.
    pub depth: u32,
}

/// Read-only looks at one node.
pub trait NodeView: Send + Sync {
    /// Its length in bytes.
    fn size(&self) -> u64;

    /// What is allocated in `range`, which is inside the node: runs without a gap from its start,
    /// at most `runs_max` of them. They may end before the range does.
    fn allocation(&self, range: ByteRange, runs_max: usize) -> Viewing<'_, Vec<Allocation>>;

    /// Its dirty bitmaps.
    fn bitmap_names(&self) -> Vec<String>;

    /// Bytes for each bit of a bitmap.
    ///
    /// # Errors
    /// There is none of this name.
    fn bitmap_granularity(&self, name: &str) -> Result<u32, Errno>;

    /// The bits of a bitmap for `range`, which is inside the node, lowest bit first.
    ///
    /// # Errors
    /// There is none of this name.
    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>, Errno>;

    /// What follows from a rule for `range`, which is inside the node: extents without a gap from
    /// its start, at most `extents_max` of them.
    fn by_rule<'a>(
        &'a self,
        rule: &'a Rule,
        range: ByteRange,
        extents_max: usize,
    ) -> Viewing<'a, Vec<ContextExtent>>;

    /// A number that stays while the answers to these questions do; none: nobody follows that.
    fn version(&self) -> Option<u64> {
        None
    }
}

/// One node, seen so.
#[derive(Debug)]
pub struct Sight {
    node: Arc<Node>,
    /// A bitmap of another node that is shown in place of this one's.
    borrowed: Option<(Arc<Node>, Arc<DirtyBitmap>)>,
}

impl Sight {
    /// Of this node.
    #[must_use]
    pub const fn new(node: Arc<Node>) -> Self {
        let borrowed = None;
        Self { node, borrowed }
    }

    /// Of this node, with one bitmap, which may be another node's.
    #[must_use]
    pub const fn with_bitmap(node: Arc<Node>, of: Arc<Node>, bitmap: Arc<DirtyBitmap>) -> Self {
        let borrowed = Some((of, bitmap));
        Self { node, borrowed }
    }

    fn bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>, Errno> {
        let bitmap = match &self.borrowed {
            Some((_, bitmap)) => Some(bitmap.clone()).filter(|it| it.name() == name),
            None => self.node.bitmaps().find(name),
        };
        let bitmap = bitmap.ok_or(Errno::NoEnt)?;
        // What was not kept up to date says nothing.
        if bitmap.is_inconsistent() {
            return Err(Errno::BadMsg);
        }
        Ok(bitmap)
    }
}

impl NodeView for Sight {
    fn size(&self) -> u64 {
        self.node.size()
    }

    fn allocation(&self, range: ByteRange, runs_max: usize) -> Viewing<'_, Vec<Allocation>> {
        Box::pin(async move {
            let mut runs: Vec<Allocation> = Vec::new();
            let mut at = range.offset();
            while at < range.end() {
                let rest = ByteRange::between(at, range.end());
                let status = self.node.status(rest).await?;
                let len = status.len.min(rest.len());
                at += len;
                let (data, zero, depth) = (status.data, status.zero, status.depth);
                let full = runs.len() >= runs_max;
                match runs.last_mut() {
                    Some(last) if (last.data, last.zero, last.depth) == (data, zero, depth) => {
                        last.len += len;
                    }
                    _ if full => break,
                    _ => runs.push(Allocation {
                        len,
                        data,
                        zero,
                        depth,
                    }),
                }
            }
            Ok(runs)
        })
    }

    fn bitmap_names(&self) -> Vec<String> {
        let bitmaps = match &self.borrowed {
            Some((_, bitmap)) => vec![bitmap.clone()],
            None => self.node.bitmaps().all(),
        };
        bitmaps
            .iter()
            .map(|bitmap| bitmap.name().to_owned())
            .collect()
    }

    fn bitmap_granularity(&self, name: &str) -> Result<u32, Errno> {
        Ok(self.bitmap(name)?.granularity())
    }

    fn bitmap_bits(&self, name: &str, range: ByteRange) -> Result<Vec<u8>, Errno> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let bits = self.bitmap(name)?.bits();
        let first = range.offset() / bits.granularity();
        let count = range.end().div_ceil(bits.granularity()) - first;
        let bytes = usize::try_from(count.div_ceil(8)).map_err(|_| Errno::FBig)?;
        // Two words for each: the second has what the first one shifts out.
        let (word, shift) = (first / 64, first % 64);
        let mut packed = Vec::with_capacity(bytes.next_multiple_of(8));
        let mut low = bits.word(word);
        for at in (word + 1..).take(bytes.div_ceil(8)) {
            let high = bits.word(at);
            let both = u128::from(high) << 64 | u128::from(low);
            packed.extend(((both >> shift) as u64).to_le_bytes());
            low = high;
        }
        packed.truncate(bytes);
        if let (Some(last), rest @ 1..) = (packed.last_mut(), count % 8) {
            *last &= (1 << rest) - 1;
        }
        Ok(packed)
    }

    fn by_rule<'a>(
        &'a self,
        rule: &'a Rule,
        range: ByteRange,
        extents_max: usize,
    ) -> Viewing<'a, Vec<ContextExtent>> {
        match rule {
            Rule::Bitmap { name, clean, dirty } => {
                let bitmap = self.bitmap(name);
                let flags = [*clean, *dirty];
                let told = bitmap.map(|it| rule::dirty(&it.bits(), flags, range, extents_max));
                Box::pin(std::future::ready(told))
            }
            Rule::AllocationDepth => Box::pin(rule::depths(&self.node, range, extents_max)),
        }
    }

    /// Of the chain: which nodes there are, and what was done to each.
    fn version(&self) -> Option<u64> {
        let mut hasher = std::hash::DefaultHasher::new();
        let borrowed = self.borrowed.iter().map(|(node, _)| node.clone());
        let mut nodes: Vec<Arc<Node>> = borrowed.collect();
        nodes.push(self.node.clone());
        while let Some(node) = nodes.pop() {
            if node.remote_name().is_some() {
                // Others may write to it.
                return None;
            }
            (Arc::as_ptr(&node).addr(), node.bitmaps().version()).hash(&mut hasher);
            // Whoever writes to what holds an image is the image.
            match node.kind() {
                Kind::Image(image) => nodes.extend(image.backing()),
                _ => nodes.extend(node.children().into_iter().map(|(_, child)| child)),
            }
        }
        Some(hasher.finish())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_write_or_a_bitmap_s_change_makes_another_version() {
        let null = Kind::Null {
            size: AtomicU64::new(1 << 20),
            zeroes: true,
        };
        let node = Node::new("n", "null-co", false, null);
        let sight = Sight::new(node.clone());
        let mut seen = vec![sight.version().unwrap()];
        assert_ne!(
            sight.version().unwrap(),
            seen[0],
            "writes count from now on"
        );
        let mut next = || {
            let version = sight.version().unwrap();
            assert_eq!(sight.version().unwrap(), version);
            assert!(!seen.contains(&version), "{seen:?}");
            seen.push(version);
        };
        next();
        node.bitmaps().mark(ByteRange::between(0, 512));
        next();
        node.bitmaps().publish();
        next();
    }

    #[test]
    fn bits_begin_at_the_granule_of_the_range_s_start() {
        let null = Kind::Null {
            size: AtomicU64::new(1 << 20),
            zeroes: true,
        };
        let node = Node::new("n", "null-co", false, null);
        let bitmap = DirtyBitmap::new("b", 4096, 1 << 20, true).unwrap();
        bitmap.bits().mark(ByteRange::between(8192, 8193));
        bitmap.bits().mark(ByteRange::between(40_960, 49_152));
        node.bitmaps().insert(bitmap);
        let sight = Sight::new(node);
        assert_eq!(sight.bitmap_names(), ["b"]);
        assert_eq!(sight.bitmap_granularity("b"), Ok(4096));
        let bits = |from, to| {
            sight
                .bitmap_bits("b", ByteRange::between(from, to))
                .unwrap()
        };
        // Granules 2, 10 and 11.
        assert_eq!(bits(0, 49_152), [0b0000_0100, 0b0000_1100]);
        assert_eq!(bits(9000, 45_000), [0b0000_0001, 0b0000_0001]);
        assert_eq!(bits(0, 8192), [0]);
        let whole = sight
            .bitmap_bits("b", ByteRange::between(0, 1 << 20))
            .unwrap();
        assert_eq!(whole.len(), 32);
        assert_eq!(
            sight.bitmap_bits("x", ByteRange::between(0, 1)),
            Err(Errno::NoEnt)
        );
    }
}
