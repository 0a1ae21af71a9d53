//! The format traits: `format.wit` in Rust words. The WIT file says what each
//! call may assume and what the host checks; this file repeats only the gist.

use crate::{Files, Result, Txn};

/// `len` bytes from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// A range; `offset + len` must not overflow.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte (saturating).
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Who the plugin is (`types.wit`, `meta`).
#[derive(Clone, Debug)]
pub struct Info {
    /// Driver name in QMP, e.g. `"simg"`.
    pub name: &'static str,
    /// The plugin's own version.
    pub version: &'static str,
    /// One sentence.
    pub description: &'static str,
    /// JSON Schema of the options object; empty: takes none.
    pub options_schema: &'static str,
}

/// What a child is to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildKind {
    /// Raw bytes that extents may point into.
    Storage,
    /// Another image, read where this one has nothing.
    Backing,
}

/// Something the image refers to; only the operator can grant it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// `"backing"`, `"data-file"`, or a name of the format's own.
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

/// What the host made of a child.
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
    /// What the host made of it.
    pub what: Granted,
}

/// Size and granularities of an open image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Guest-visible length in bytes.
    pub size: u64,
    /// Granularity of the mapping: a power of two, 512 to 2 MiB.
    pub unit: u32,
    /// Preferred I/O size.
    pub cluster_size: u32,
    /// Granularity of zeroing by `discard`; 0: cannot.
    pub zero_granularity: u32,
    /// Granularity of discards; 0: cannot.
    pub discard_granularity: u32,
}

impl Geometry {
    /// Of an image that is only read: mapped, and best read, in pieces of `unit` bytes.
    pub const fn read_only(size: u64, unit: u32) -> Self {
        Self {
            size,
            unit,
            cluster_size: unit,
            zero_granularity: 0,
            discard_granularity: 0,
        }
    }
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

/// Where bytes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// As they are, in a file.
    Raw {
        /// Which file.
        slot: u32,
        /// First byte in it.
        offset: u64,
        /// The host may overwrite them without asking.
        in_place: bool,
    },
    /// Reads as zeroes, and the image says so.
    Zero,
    /// Nothing here and no backing.
    Hole,
    /// Read the backing child at this offset.
    Backing(u64),
    /// Stored compressed.
    Coded {
        /// Which file.
        slot: u32,
        /// First stored byte.
        offset: u64,
        /// Stored bytes, at most; the stream may end earlier.
        stored_len: u32,
        /// How.
        codec: Codec,
        /// Guest offset of the decoded unit.
        unit_offset: u64,
        /// Its decoded length.
        unit_len: u32,
    },
    /// The host calls [`Format::read_special`] with this number.
    Special(u64),
}

impl Location {
    /// As they are, from `offset` of the image file, and only to be read.
    pub const fn stored(offset: u64) -> Self {
        Self::Raw {
            slot: 0,
            offset,
            in_place: false,
        }
    }
}

/// A guest range and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Guest range.
    pub range: ByteRange,
    /// Where.
    pub at: Location,
}

/// A read-only format. One value is one open image.
pub trait Format: Sized + 'static {
    /// Who the plugin is.
    fn info() -> Info;

    /// 0..100: how much the first bytes of a file of `size` bytes look like it.
    fn probe(head: &[u8], size: u64) -> u8;

    /// Read the header of slot 0 and report children. `options` is a JSON
    /// object that fits the schema. Writes nothing.
    fn open(files: &dyn Files, options: &str, writable: bool) -> Result<(Self, Vec<Child>)>;

    /// All children are settled. A read-only format has nothing to write; a
    /// writable one overrides [`WritableFormat::activate_writable`].
    fn activate(&mut self, files: &dyn Files, grants: &[Grant]) -> Result<Geometry>;

    /// Where the bytes of `range` are. Contiguous, from at or before
    /// `range.offset`, at least one unit; may run past the end.
    fn resolve(&mut self, files: &dyn Files, range: ByteRange) -> Result<Vec<Extent>>;

    /// The bytes of a [`Location::Special`] extent.
    fn read_special(&mut self, files: &dyn Files, id: u64, range: ByteRange) -> Result<Vec<u8>> {
        let _ = (files, id, range);
        Err(crate::Error::unsupported(
            "This format has no special extents",
        ))
    }

    /// Format facts for `query-named-block-nodes`: a JSON object.
    fn facts(&mut self, files: &dyn Files) -> Result<String> {
        let _ = files;
        Ok("{}".to_owned())
    }
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

/// What `check` found so far (the fields of QEMU's `ImageCheck`).
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

/// A writable format. Calls are never concurrent on one image.
pub trait WritableFormat: Format {
    /// Before [`WritableFormat::activate_writable`], of an instance that replaces one while the
    /// image is in use (`takeover.wit`). It finds an image that looks as if nobody had closed it,
    /// and must not repair it: writes to what is counted are under way, and what the last instance
    /// freed comes back through [`WritableFormat::reclaim`].
    fn take_over(&mut self) -> Result<()> {
        Ok(())
    }
    /// [`Format::activate`] of an image opened writable: may queue writes.
    fn activate_writable(&mut self, txn: &mut dyn Txn, grants: &[Grant]) -> Result<Geometry>;
    /// Reserve space for as many intents as possible.
    fn prepare_write(
        &mut self,
        txn: &mut dyn Txn,
        intents: &[WriteIntent],
    ) -> Result<Vec<Placement>>;
    /// Payload is written: queue the mapping, return the new extents.
    fn commit_write(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<Vec<Extent>>;
    /// Give reservations back.
    fn abort_write(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<()>;
    /// Drop or zero a front part of `range`; the extents cover what was done.
    fn discard(
        &mut self,
        txn: &mut dyn Txn,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<Vec<Extent>>;
    /// Freed ranges can be used again.
    fn reclaim(&mut self, txn: &mut dyn Txn, freed: &[SlotRange]) -> Result<()>;
    /// Queue whatever was held back.
    fn flush(&mut self, txn: &mut dyn Txn) -> Result<()>;
    /// A new guest-visible length.
    fn resize(&mut self, txn: &mut dyn Txn, size: u64) -> Result<Geometry>;
    /// One slice of a check; `None`: finished.
    fn check(
        &mut self,
        txn: &mut dyn Txn,
        fix: Repair,
        cursor: u64,
    ) -> Result<(CheckReport, Option<u64>)>;
    /// Clean close.
    fn close(&mut self, txn: &mut dyn Txn) -> Result<()>;
}

/// Bytes that a new image takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Right after creation.
    pub required: u64,
    /// With every byte allocated.
    pub fully_allocated: u64,
}

/// A format that can make new images.
pub trait CreatableFormat: WritableFormat {
    /// JSON Schema of the creation options.
    fn create_schema() -> &'static str;
    /// How large a new image would be.
    fn measure(options: &str) -> Result<Measurement>;
    /// Write a new image into slot 0 (empty), all through `txn`.
    fn create(txn: &mut dyn Txn, options: &str) -> Result<()>;
}

/// A dirty bitmap as an image keeps it (`bitmaps.wit`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBitmap {
    /// Unique in the image.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u32,
    /// It records writes as soon as the image is open.
    pub enabled: bool,
    /// Its bits are right.
    pub consistent: bool,
}

/// A stretch of bits, the first one lowest in the first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    /// Number of the first bit, a multiple of 64.
    pub first: u64,
    /// The bits.
    pub data: Vec<u8>,
}

/// A writable format whose images keep dirty bitmaps. Its [`WritableFormat::activate_writable`]
/// marks them as in use; [`KeepsBitmaps::list_bitmaps`] says how they were before.
pub trait KeepsBitmaps: WritableFormat {
    /// The bitmaps from number `first` on, some hundreds at a time; none: no more.
    fn list_bitmaps(&mut self, files: &dyn Files, first: u32) -> Result<Vec<KeptBitmap>>;
    /// The first stretch at or after bit `from` that is not all clear, at most 2 MiB.
    fn read_bits(&mut self, files: &dyn Files, name: &str, from: u64) -> Result<Option<Bits>>;
    /// May a bitmap like this be kept beside those that are `kept` already?
    fn check_bitmap(
        &mut self,
        files: &dyn Files,
        bitmap: &KeptBitmap,
        kept: &[String],
    ) -> Result<()>;
    /// Put bits away: stretches of 2 MiB from multiples of that, ascending; the rest is clear.
    fn store_bits(&mut self, txn: &mut dyn Txn, bitmap: &KeptBitmap, bits: &Bits) -> Result<()>;
    /// Have these bitmaps and no other; `false`: flush, and call again.
    fn keep_bitmaps(&mut self, txn: &mut dyn Txn, bitmaps: &[KeptBitmap]) -> Result<bool>;
}
