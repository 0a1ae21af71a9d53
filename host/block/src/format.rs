//! The format seam: what the block layer asks of an image format, in the words
//! of `wit/format.wit`. `host/plugin` implements it with Wasm components; tests
//! and native formats implement it in Rust.
//!
//! Called only by `node::format`, under the node's plugin lock, on the iothread
//! whose request missed. Invariant: nothing that comes back through this seam
//! is believed before `verify` looked at it, and no call has written anything:
//! metadata writes travel in the [`TxnLog`] and are applied by the host.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::{ByteRange, Errno};

/// A format call in progress. `Send`, because the store behind it may be
/// polled on any iothread (one at a time).
pub type FormatFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, FormatError>> + Send + 'a>>;

/// Why a format call did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// The format said no: an ordinary error of this request.
    Refused {
        /// What the client is told.
        code: Errno,
        /// What the operator reads.
        message: String,
    },
    /// The format broke its contract; the instance is dropped.
    Fault(Fault),
}

impl FormatError {
    /// What a client is told.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Fault(_) => Errno::Io,
        }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { message, .. } => f.write_str(message),
            Self::Fault(fault) => fmt::Display::fmt(fault, f),
        }
    }
}

impl std::error::Error for FormatError {}

/// How a plugin broke its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The code trapped (panic, unreachable, out-of-bounds access).
    Trap,
    /// It ran past its time limit.
    Deadline,
    /// It asked for more memory than it may have.
    Memory,
    /// It answered with an extent that cannot be true.
    BadExtent,
    /// It answered outside the contract in another way.
    BadAnswer,
}

impl FaultKind {
    /// The word used in events, metrics and logs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
            Self::BadExtent => "bad-extent",
            Self::BadAnswer => "bad-answer",
        }
    }
}

/// One broken contract, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How.
    pub kind: FaultKind,
    /// One sentence with the facts.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, message) = (self.kind.word(), &self.message);
        match self.kind {
            // A plugin that tells what a damaged image says cannot be told from one that lies.
            FaultKind::BadExtent => write!(
                f,
                "The image is damaged or its plugin is wrong ({word}): {message}; qemu-img check \
                 lists the damage of a format that it knows"
            ),
            _ => write!(f, "Plugin fault ({word}): {message}"),
        }
    }
}

/// Storage or backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildKind {
    /// Raw bytes that extents may point into.
    Storage,
    /// Another image, read where this one has nothing.
    Backing,
}

/// Something the image refers to: a request, which only the operator grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// "backing", "data-file", or a name of the format's own.
    pub id: String,
    /// Storage or backing.
    pub kind: ChildKind,
    /// The name found in the image.
    pub reference: Option<String>,
    /// The format named in the image.
    pub format: Option<String>,
    /// The image is unusable without it.
    pub required: bool,
}

/// What became of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// Storage: its slot.
    Slot(u32),
    /// Backing: its length in bytes.
    Backing(u64),
    /// There is none.
    None,
}

/// A child and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The child's id.
    pub id: String,
    /// What became of it.
    pub what: Granted,
}

/// Size and granularities of an open image (checked by `verify::geometry`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Guest-visible length in bytes.
    pub size: u64,
    /// Granularity of the mapping.
    pub unit: u32,
    /// Preferred I/O size.
    pub cluster_size: u32,
    /// Granularity of zeroing by `discard`; 0: cannot.
    pub zero_granularity: u32,
    /// Granularity of discards; 0: cannot.
    pub discard_granularity: u32,
}

/// Compression that the host undoes natively.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Raw deflate (RFC 1951).
    Deflate,
    /// zlib (RFC 1950).
    Zlib,
    /// gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// A decoded unit and its stored form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coded {
    /// Which file.
    pub slot: u32,
    /// First stored byte.
    pub offset: u64,
    /// Stored bytes, at most.
    pub stored_len: u32,
    /// How.
    pub codec: Codec,
    /// Guest offset of the decoded unit.
    pub unit_offset: u64,
    /// Its decoded length.
    pub unit_len: u32,
}

/// Where guest bytes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// As they are, in a file.
    Raw {
        /// Which file.
        slot: u32,
        /// First byte in it.
        offset: u64,
        /// May be overwritten without asking.
        in_place: bool,
    },
    /// Reads as zeroes, and the image says so.
    Zero,
    /// Nothing here and no backing.
    Hole,
    /// Read the backing child at this offset.
    Backing(u64),
    /// Stored compressed.
    Coded(Coded),
    /// Only the plugin can make these bytes.
    Special(u64),
}

/// A guest range and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Guest range.
    pub range: ByteRange,
    /// Where.
    pub at: Location,
}

/// What an allocating write wants to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteKind {
    /// Plain bytes.
    Data,
    /// One compressed cluster.
    Compressed,
}

/// Guest bytes that need space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteIntent {
    /// Guest range, nowhere mapped in place.
    pub range: ByteRange,
    /// Plain or compressed.
    pub kind: WriteKind,
    /// `Compressed`: stored length in bytes.
    pub stored_len: u32,
}

/// Reserved space that nothing points at yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Names it in one later commit or abort.
    pub token: u64,
    /// Which intent, by index.
    pub intent: u32,
    /// Guest bytes that move to `offset`.
    pub covers: ByteRange,
    /// Which file.
    pub slot: u32,
    /// Where in it.
    pub offset: u64,
}

/// What a discard must leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardKind {
    /// The content is not needed.
    Discard,
    /// Zeroes; space may be given back.
    ZeroUnmap,
    /// Zeroes; space is kept if there is any.
    ZeroKeep,
}

/// A range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRange {
    /// Which file.
    pub slot: u32,
    /// Which bytes.
    pub range: ByteRange,
}

/// What `check` may mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// Give leaked space back.
    pub leaks: bool,
    /// Mend errors.
    pub errors: bool,
}

/// What `check` found (the fields of QEMU's `ImageCheck`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are QEMU's")]
pub struct CheckReport {
    pub corruptions: u64,
    pub leaks: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    pub check_errors: u64,
    pub image_end: u64,
    pub total_clusters: u64,
    pub allocated_clusters: u64,
    pub fragmented_clusters: u64,
    pub compressed_clusters: u64,
    pub messages: Vec<String>,
}

/// Bytes that a new image takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Right after creation.
    pub required: u64,
    /// With every byte allocated.
    pub fully_allocated: u64,
}

/// When a queued write must be durable relative to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Nothing durable points at it yet.
    Prepare,
    /// Makes new state reachable, or old state unreachable.
    Mapping,
}

/// One queued effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOp {
    /// Metadata bytes for a file.
    Write {
        /// Which file.
        slot: u32,
        /// When.
        stage: Stage,
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zero bytes for a file.
    Zero {
        /// Which file.
        slot: u32,
        /// When.
        stage: Stage,
        /// Where.
        range: ByteRange,
    },
    /// The file is at least this long.
    Grow {
        /// Which file.
        slot: u32,
        /// Bytes.
        size: u64,
    },
    /// Unreachable once the mapping stage is durable.
    Free(SlotRange),
    /// Cut once the mapping stage is durable.
    Truncate {
        /// Which file.
        slot: u32,
        /// Bytes.
        size: u64,
    },
}

/// Everything one call queued, in the order it was queued.
pub type TxnLog = Vec<TxnOp>;

/// The answer of a call that may have queued writes.
#[derive(Debug)]
pub struct Call<T> {
    /// What it returned.
    pub value: T,
    /// What it queued.
    pub txn: TxnLog,
}

/// The files of one image as its plugin may see them. Implemented by the node;
/// reads go through the node's metadata overlay.
pub trait FormatFiles: Send + Sync {
    /// Length in bytes.
    fn size(&self, slot: u32) -> Result<u64, Errno>;
    /// Fill `buf` without waiting; `None`: would wait, use [`FormatFiles::read`].
    fn try_read(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Option<Result<(), Errno>>;
    /// Read `len` bytes; past the end they are zero.
    fn read(
        &self,
        slot: u32,
        offset: u64,
        len: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Errno>> + Send + '_>>;
    /// The next data at or after `offset`.
    fn next_data(&self, slot: u32, offset: u64) -> Result<Option<ByteRange>, Errno>;
    /// The plugin found damage.
    fn corrupt(&self, message: &str, offset: Option<u64>, size: Option<u64>, fatal: bool);
    /// The node's name, for log lines.
    fn node_name(&self) -> &str;
}

/// Bits that cross the seam at a time, and the multiple of which stretches to be stored start at.
pub const STRETCH_BYTES: usize = 2 << 20;

/// A dirty bitmap as an image keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBitmap {
    /// Unique in the image.
    pub name: String,
    /// Bytes per bit: a power of two, at least 512.
    pub granularity: u32,
    /// It records writes as soon as the image is open.
    pub enabled: bool,
    /// Its bits are right.
    pub consistent: bool,
}

/// A stretch of bits, the first one lowest in the first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Number of the first bit, a multiple of 64.
    pub first: u64,
    /// The bits.
    pub data: Vec<u8>,
}

/// A call that this format does not have.
fn unknown_call<'a, T: Send + 'a>() -> FormatFuture<'a, T> {
    Box::pin(std::future::ready(Err(FormatError::Refused {
        code: Errno::NotSup,
        message: Errno::NotSup.to_string(),
    })))
}

/// One open image. Dropping it is always safe; a fresh one can be opened from
/// the same [`FormatFactory`].
pub trait Format: Send {
    /// Read the header, report children.
    fn open<'a>(&'a mut self, options: &'a str, writable: bool) -> FormatFuture<'a, Vec<Child>>;
    /// All children are settled.
    fn activate(&mut self, grants: Vec<Grant>) -> FormatFuture<'_, Call<Geometry>>;
    /// Where the bytes of `range` are.
    fn resolve(&mut self, range: ByteRange) -> FormatFuture<'_, Vec<Extent>>;
    /// The bytes of a [`Location::Special`] extent.
    fn read_special(&mut self, id: u64, range: ByteRange) -> FormatFuture<'_, Vec<u8>>;
    /// Format facts: a JSON object.
    fn facts(&mut self) -> FormatFuture<'_, String>;
    /// Reserve space.
    fn prepare_write(
        &mut self,
        intents: Vec<WriteIntent>,
    ) -> FormatFuture<'_, Call<Vec<Placement>>>;
    /// Payload is written: the mapping.
    fn commit_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<Vec<Extent>>>;
    /// Give reservations back.
    fn abort_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<()>>;
    /// Drop or zero a front part of `range`.
    fn discard(
        &mut self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> FormatFuture<'_, Call<Vec<Extent>>>;
    /// Freed ranges can be used again.
    fn reclaim(&mut self, freed: Vec<SlotRange>) -> FormatFuture<'_, Call<()>>;
    /// Queue whatever was held back.
    fn flush(&mut self) -> FormatFuture<'_, Call<()>>;
    /// A new length.
    fn resize(&mut self, size: u64) -> FormatFuture<'_, Call<Geometry>>;
    /// One slice of a check.
    fn check(
        &mut self,
        fix: Repair,
        cursor: u64,
    ) -> FormatFuture<'_, Call<(CheckReport, Option<u64>)>>;
    /// Clean close.
    fn close(&mut self) -> FormatFuture<'_, Call<()>>;
    /// Write a new image into slot 0.
    fn create<'a>(&'a mut self, options: &'a str) -> FormatFuture<'a, Call<()>>;

    /// After `open` and before `activate`: the instance takes over an image that is in use, and
    /// must not repair it. A format that does not know this does as it always does.
    fn take_over(&mut self) -> FormatFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    // === dirty bitmaps: a format without them leaves all of these as they are ===

    /// Can its images keep dirty bitmaps?
    fn keeps_bitmaps(&self) -> bool {
        false
    }
    /// The bitmaps from number `first` on, not all of them; none: there are no more.
    fn list_bitmaps(&mut self, first: u32) -> FormatFuture<'_, Vec<KeptBitmap>> {
        let _ = first;
        unknown_call()
    }
    /// The first stretch at or after bit `from` that is not all clear.
    fn read_bits(&mut self, name: String, from: u64) -> FormatFuture<'_, Option<Stretch>> {
        let _ = (name, from);
        unknown_call()
    }
    /// May a bitmap like this be kept beside those of these names?
    fn check_bitmap(&mut self, bitmap: KeptBitmap, kept: Vec<String>) -> FormatFuture<'_, ()> {
        let _ = (bitmap, kept);
        unknown_call()
    }
    /// Put bits away; nothing points at them yet.
    fn store_bits(&mut self, bitmap: KeptBitmap, bits: Stretch) -> FormatFuture<'_, Call<()>> {
        let _ = (bitmap, bits);
        unknown_call()
    }
    /// Have these bitmaps and no other; `false`: make it durable, and call again.
    fn keep_bitmaps(&mut self, bitmaps: Vec<KeptBitmap>) -> FormatFuture<'_, Call<bool>> {
        let _ = bitmaps;
        unknown_call()
    }
}

/// A format by name: makes instances. Cheap to clone behind `Arc`.
pub trait FormatFactory: Send + Sync {
    /// Driver name in QMP.
    fn name(&self) -> &str;
    /// Can its images be written?
    fn writable(&self) -> bool;
    /// A fresh instance over `files`, nothing opened yet.
    fn instantiate(&self, files: Arc<dyn FormatFiles>) -> FormatFuture<'_, Box<dyn Format>>;
    /// A fault of one of its instances: counted, logged and announced by the
    /// plugin host.
    fn report_fault(&self, node_name: &str, fault: &Fault);
}
