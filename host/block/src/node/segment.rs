//! What is known of a range without waiting: where its bytes lie, and whether there are any.
//!
//! Any thread, on the hot path: nothing here waits or allocates.

use std::sync::Arc;

use super::{Kind, Node, NodeFuture, whole};
use crate::{ByteRange, Errno};

/// The first piece of a range, as far as it is known without waiting.
#[derive(Clone, Debug)]
pub enum Segment {
    /// In a host file, in the page cache or not.
    File {
        /// The file node.
        node: Arc<Node>,
        /// Where in it.
        offset: u64,
        /// How long.
        len: u64,
    },
    /// Zeroes.
    Zero {
        /// How long.
        len: u64,
    },
    /// Read it to know.
    Unknown {
        /// How long.
        len: u64,
    },
}

impl Segment {
    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        match self {
            Self::File { len, .. } | Self::Zero { len } | Self::Unknown { len } => *len,
        }
    }

    /// No bytes?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is known, without waiting, of how bytes read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// As zeroes.
    Zero,
    /// Reading them tells.
    Data,
    /// Nothing yet: [`Node::learn`] or a read will ask.
    Nothing,
}

/// The first piece of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// How long it is; at least one byte.
    pub len: u64,
    /// What is known of it.
    pub known: Known,
}

impl Front {
    pub(crate) const fn zero(len: u64) -> Self {
        let known = Known::Zero;
        Self { len, known }
    }

    pub(crate) const fn data(len: u64) -> Self {
        let known = Known::Data;
        Self { len, known }
    }

    pub(crate) const fn nothing(len: u64) -> Self {
        let known = Known::Nothing;
        Self { len, known }
    }
}

/// Whom to ask where zeroes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// What is in memory: extent maps. Cheap enough for every request.
    Memory,
    /// File systems, too: up to two system calls per piece.
    FileSystem,
}

/// Allocation status of a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes; at least one.
    pub len: u64,
    /// Stored data.
    pub data: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// 0: nowhere allocated; 1: in this node; 2: in its backing node; ...
    pub depth: u32,
}

impl Node {
    /// The first piece of the range, as far as it is known without waiting.
    #[must_use]
    pub fn segment(self: &Arc<Self>, range: ByteRange) -> Segment {
        let len = range.len();
        match &self.kind {
            Kind::File(_) => Segment::File {
                node: self.clone(),
                offset: range.offset(),
                len,
            },
            Kind::Raw(raw) => {
                let window = raw.now();
                let shown = window.shown(range.offset(), len).ok();
                match shown.and_then(|(at, shown)| ByteRange::new(at, shown)) {
                    Some(range) if range.is_empty() && len > 0 => Segment::Zero { len },
                    Some(range) => window.child.segment(range),
                    None => Segment::Unknown { len },
                }
            }
            Kind::Null { zeroes: true, .. } => Segment::Zero { len },
            Kind::Null { .. } | Kind::Remote(_) => Segment::Unknown { len },
            Kind::Filter(filter) => filter.segment(range),
            Kind::Image(image) => image.segment(range),
        }
    }

    /// May bytes that [`Node::segment`] finds in a file move, or their place be reused, while
    /// somebody still looks at them? Only images do that, and only those that can be written.
    #[must_use]
    pub fn may_move(&self) -> bool {
        match &self.kind {
            Kind::Raw(raw) => raw.now().child.may_move(),
            Kind::Filter(filter) => filter.child().1.may_move(),
            Kind::Image(image) => {
                let below = || image.backing().is_some_and(|backing| backing.may_move());
                image.is_writable() || below()
            }
            Kind::File(_) | Kind::Null { .. } | Kind::Remote(_) => false,
        }
    }

    /// What is known of zeroes at the start of the range, which is not empty.
    ///
    /// True at some moment of the call: what was written before it began is no zero for it.
    #[must_use]
    pub fn front(&self, range: ByteRange, ask: Ask) -> Front {
        let len = range.len();
        match &self.kind {
            Kind::File(file) if ask == Ask::FileSystem => file.front(range),
            Kind::File(_) | Kind::Remote(_) => Front::data(len),
            Kind::Raw(raw) => {
                let window = raw.now();
                let shown = window.shown(range.offset(), len).ok();
                match shown.and_then(|(at, shown)| ByteRange::new(at, shown)) {
                    Some(range) if range.is_empty() => Front::zero(len),
                    Some(range) => window.child.front(range, ask),
                    None => Front::data(len),
                }
            }
            Kind::Null { zeroes: true, .. } => Front::zero(len),
            Kind::Null { .. } => Front::data(len),
            Kind::Filter(filter) => filter.front(range, ask),
            Kind::Image(image) => image.front(range, ask),
        }
    }

    /// Asks what [`Node::front`] did not know of the range, as a read of it would. What cannot be
    /// learned is for that read to report.
    pub fn learn(&self, range: ByteRange) -> NodeFuture<'_, ()> {
        Box::pin(async move {
            match &self.kind {
                Kind::Raw(raw) => {
                    let window = raw.get();
                    let (at, shown) = window.shown(range.offset(), range.len())?;
                    let range = ByteRange::new(at, shown).ok_or(Errno::Inval)?;
                    window.child.learn(range).await
                }
                Kind::Filter(filter) => filter.child().1.learn(range).await,
                Kind::Image(image) => {
                    let image = image.clone();
                    whole(async move { image.learn(range).await }).await
                }
                Kind::File(_) | Kind::Null { .. } | Kind::Remote(_) => Ok(()),
            }
        })
    }

    /// The next data at or after `offset`: a hint for formats.
    pub(crate) fn next_data(&self, offset: u64) -> std::result::Result<Option<ByteRange>, Errno> {
        match &self.kind {
            Kind::File(file) => file.next_data(offset),
            Kind::Filter(filter) => filter.child().1.next_data(offset),
            _ if offset >= self.len_bytes() => Ok(None),
            _ => Ok(Some(ByteRange::between(offset, self.len_bytes()))),
        }
    }
}
