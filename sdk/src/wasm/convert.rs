//! Contract types from and to the types of this crate. Both sides are small
//! copies; the lists are as long as one `resolve` answer.

#![forbid(unsafe_code)]

use super::bindings::about::outport::plugin::{log, types};
use super::bindings::bitmaps::exports::outport::plugin::format_bitmaps;
use super::bindings::reader::outport::plugin::extents;
use super::bindings::writer::exports::outport::plugin::format_writer;
use super::bindings::writer::outport::plugin::txn;
use crate::{
    Bits, ByteRange, CheckReport, Child, ChildKind, Codec, DiscardKind, Errno, Error, Extent,
    Geometry, Grant, Granted, KeptBitmap, Location, LogLevel, Placement, Repair, SlotRange, Stage,
    WriteIntent, WriteKind,
};

macro_rules! errnos {
    ($($name:ident)*) => {
        impl From<Errno> for types::Errno {
            fn from(code: Errno) -> Self {
                match code { $(Errno::$name => Self::$name,)* }
            }
        }
        impl From<types::Errno> for Errno {
            fn from(code: types::Errno) -> Self {
                match code { $(types::Errno::$name => Self::$name,)* }
            }
        }
    };
}
errnos!(Eperm Enoent Eio Enomem Eacces Ebusy Eexist Einval Efbig Enospc Erofs Enotsup Eoverflow
    Ebadmsg Eshutdown Ecanceled);

impl From<Error> for types::Error {
    fn from(e: Error) -> Self {
        Self {
            code: e.code.into(),
            message: e.message,
        }
    }
}

impl From<types::Error> for Error {
    fn from(e: types::Error) -> Self {
        Self {
            code: e.code.into(),
            message: e.message,
        }
    }
}

impl From<ByteRange> for types::ByteRange {
    fn from(r: ByteRange) -> Self {
        Self {
            offset: r.offset,
            len: r.len,
        }
    }
}

impl From<types::ByteRange> for ByteRange {
    fn from(r: types::ByteRange) -> Self {
        Self {
            offset: r.offset,
            len: r.len,
        }
    }
}

impl From<Child> for extents::Child {
    fn from(c: Child) -> Self {
        let kind = match c.kind {
            ChildKind::Storage => extents::ChildKind::Storage,
            ChildKind::Backing => extents::ChildKind::Backing,
        };
        let Child {
            id,
            reference,
            format,
            required,
            ..
        } = c;
        Self {
            id,
            kind,
            reference,
            format,
            required,
        }
    }
}

impl From<extents::Grant> for Grant {
    fn from(g: extents::Grant) -> Self {
        let what = match g.what {
            extents::Granted::Slot(slot) => Granted::Slot(slot),
            extents::Granted::Backing(size) => Granted::Backing(size),
            extents::Granted::None => Granted::None,
        };
        Self { id: g.id, what }
    }
}

impl From<Geometry> for extents::Geometry {
    fn from(g: Geometry) -> Self {
        let Geometry {
            size,
            unit,
            cluster_size,
            zero_granularity,
            discard_granularity,
        } = g;
        Self {
            size,
            unit,
            cluster_size,
            zero_granularity,
            discard_granularity,
        }
    }
}

impl From<Extent> for extents::Extent {
    fn from(e: Extent) -> Self {
        Self {
            offset: e.range.offset,
            len: e.range.len,
            at: e.at.into(),
        }
    }
}

impl From<Location> for extents::Location {
    fn from(at: Location) -> Self {
        match at {
            Location::Raw {
                slot,
                offset,
                in_place,
            } => Self::Raw(extents::RawLoc {
                slot,
                offset,
                in_place,
                transform: 0,
            }),
            Location::Zero => Self::Zero,
            Location::Hole => Self::Hole,
            Location::Backing(offset) => Self::Backing(offset),
            Location::Coded {
                slot,
                offset,
                stored_len,
                codec,
                unit_offset,
                unit_len,
            } => {
                let codec = codec.into();
                Self::Coded(extents::CodedLoc {
                    slot,
                    offset,
                    stored_len,
                    codec,
                    unit_offset,
                    unit_len,
                })
            }
            Location::Special(id) => Self::Special(id),
        }
    }
}

impl From<Codec> for extents::Codec {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Deflate => Self::Deflate,
            Codec::Zlib => Self::Zlib,
            Codec::Gzip => Self::Gzip,
            Codec::Zstd => Self::Zstd,
        }
    }
}

impl From<LogLevel> for log::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Debug => Self::Debug,
            LogLevel::Info => Self::Info,
            LogLevel::Warn => Self::Warn,
            LogLevel::Error => Self::Error,
        }
    }
}

impl From<Stage> for txn::Stage {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Prepare => Self::Prepare,
            Stage::Mapping => Self::Mapping,
        }
    }
}

impl From<format_writer::WriteIntent> for WriteIntent {
    fn from(i: format_writer::WriteIntent) -> Self {
        let kind = match i.kind {
            format_writer::WriteKind::Data => WriteKind::Data,
            format_writer::WriteKind::Compressed => WriteKind::Compressed,
        };
        Self {
            range: i.range.into(),
            kind,
            stored_len: i.stored_len,
        }
    }
}

impl From<Placement> for format_writer::Placement {
    fn from(p: Placement) -> Self {
        let Placement {
            token,
            intent,
            covers,
            slot,
            offset,
        } = p;
        Self {
            token,
            intent,
            covers: covers.into(),
            slot,
            offset,
        }
    }
}

impl From<format_writer::DiscardKind> for DiscardKind {
    fn from(kind: format_writer::DiscardKind) -> Self {
        match kind {
            format_writer::DiscardKind::Discard => Self::Discard,
            format_writer::DiscardKind::ZeroUnmap => Self::ZeroUnmap,
            format_writer::DiscardKind::ZeroKeep => Self::ZeroKeep,
        }
    }
}

impl From<format_writer::SlotRange> for SlotRange {
    fn from(r: format_writer::SlotRange) -> Self {
        Self {
            slot: r.slot,
            range: r.range.into(),
        }
    }
}

impl From<format_writer::Repair> for Repair {
    fn from(fix: format_writer::Repair) -> Self {
        Self {
            leaks: fix.contains(format_writer::Repair::LEAKS),
            errors: fix.contains(format_writer::Repair::ERRORS),
        }
    }
}

impl From<CheckReport> for format_writer::CheckReport {
    fn from(r: CheckReport) -> Self {
        Self {
            corruptions: r.corruptions,
            leaks: r.leaks,
            corruptions_fixed: r.corruptions_fixed,
            leaks_fixed: r.leaks_fixed,
            check_errors: r.check_errors,
            image_end: r.image_end,
            total_clusters: r.total_clusters,
            allocated_clusters: r.allocated_clusters,
            fragmented_clusters: r.fragmented_clusters,
            compressed_clusters: r.compressed_clusters,
            messages: r.messages,
        }
    }
}

impl From<KeptBitmap> for format_bitmaps::Bitmap {
    fn from(b: KeptBitmap) -> Self {
        let KeptBitmap {
            name,
            granularity,
            enabled,
            consistent,
        } = b;
        Self {
            name,
            granularity,
            enabled,
            consistent,
        }
    }
}

impl From<format_bitmaps::Bitmap> for KeptBitmap {
    fn from(b: format_bitmaps::Bitmap) -> Self {
        let format_bitmaps::Bitmap {
            name,
            granularity,
            enabled,
            consistent,
        } = b;
        Self {
            name,
            granularity,
            enabled,
            consistent,
        }
    }
}

impl From<Bits> for format_bitmaps::Bits {
    fn from(bits: Bits) -> Self {
        let Bits { first, data } = bits;
        Self { first, data }
    }
}

impl From<format_bitmaps::Bits> for Bits {
    fn from(bits: format_bitmaps::Bits) -> Self {
        let format_bitmaps::Bits { first, data } = bits;
        Self { first, data }
    }
}
