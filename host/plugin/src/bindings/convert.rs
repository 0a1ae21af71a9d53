//! Contract types from and to the types of `block::format`.
//!
//! Pure. What a plugin said is checked here for being *representable*: ranges
//! that do not overflow, lists and texts within their limits. Whether an extent
//! is true (inside the file, not over metadata) is the node's question.

use outport_block::format as seam;
use outport_block::format::{FaultKind, Location};
use outport_block::{ByteRange, Errno};

use super::{extents, format_create, format_writer, types};
use crate::limits::{
    CHECK_MESSAGES_MAX, CHILDREN_MAX, EXTENTS_MAX, JSON_BYTES_MAX, MESSAGE_BYTES_MAX,
    NAME_BYTES_MAX, PLACEMENTS_MAX, TRANSFER_MAX, sentence,
};

impl super::types::Host for crate::store::HostState {}
impl super::extents::Host for crate::store::HostState {}

/// An answer outside the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) kind: FaultKind,
    pub(crate) message: String,
}

impl Malformed {
    pub(crate) fn answer(message: impl Into<String>) -> Self {
        Self {
            kind: FaultKind::BadAnswer,
            message: message.into(),
        }
    }

    fn extent(message: impl Into<String>) -> Self {
        Self {
            kind: FaultKind::BadExtent,
            message: message.into(),
        }
    }
}

type Checked<T> = Result<T, Malformed>;

macro_rules! errnos {
    ($($wit:ident $block:ident,)*) => {
        impl From<Errno> for types::Errno {
            fn from(e: Errno) -> Self {
                match e { $(Errno::$block => Self::$wit,)* }
            }
        }
        impl From<types::Errno> for Errno {
            fn from(e: types::Errno) -> Self {
                match e { $(types::Errno::$wit => Self::$block,)* }
            }
        }
    };
}
errnos!(
    Eperm Perm, Enoent NoEnt, Eio Io, Enomem NoMem, Eacces Access, Ebusy Busy, Eexist Exist,
    Einval Inval, Efbig FBig, Enospc NoSpc, Erofs RoFs, Enotsup NotSup, Eoverflow Overflow,
    Ebadmsg BadMsg, Eshutdown Shutdown, Ecanceled Canceled,
);

/// An ordinary refusal.
pub(crate) fn refused(e: types::Error) -> seam::FormatError {
    let message = sentence(e.message, MESSAGE_BYTES_MAX);
    seam::FormatError::Refused {
        code: e.code.into(),
        message,
    }
}

pub(crate) fn to_range(r: ByteRange) -> types::ByteRange {
    types::ByteRange {
        offset: r.offset(),
        len: r.len(),
    }
}

fn range(offset: u64, len: u64, what: &str) -> Checked<ByteRange> {
    ByteRange::new(offset, len)
        .ok_or_else(|| Malformed::extent(format!("{what} {offset:#x}+{len:#x} overflows")))
}

fn bounded<T>(list: &[T], max: usize, what: &str) -> Checked<()> {
    if list.len() > max {
        return Err(Malformed::answer(format!(
            "{} {what}; the limit is {max}",
            list.len()
        )));
    }
    Ok(())
}

pub(crate) fn to_grants(grants: Vec<seam::Grant>) -> Vec<extents::Grant> {
    let one = |g: seam::Grant| extents::Grant {
        id: g.id,
        what: match g.what {
            seam::Granted::Slot(slot) => extents::Granted::Slot(slot),
            seam::Granted::Backing(size) => extents::Granted::Backing(size),
            seam::Granted::None => extents::Granted::None,
        },
    };
    grants.into_iter().map(one).collect()
}

pub(crate) fn children(list: Vec<extents::Child>) -> Checked<Vec<seam::Child>> {
    bounded(&list, CHILDREN_MAX, "children")?;
    let name = |s: &str, what: &str| {
        if s.len() > NAME_BYTES_MAX {
            return Err(Malformed::answer(format!(
                "A child's {what} of {} bytes",
                s.len()
            )));
        }
        Ok(())
    };
    let one = |c: extents::Child| {
        name(&c.id, "id")?;
        c.reference
            .as_deref()
            .map_or(Ok(()), |s| name(s, "reference"))?;
        c.format.as_deref().map_or(Ok(()), |s| name(s, "format"))?;
        let kind = match c.kind {
            extents::ChildKind::Storage => seam::ChildKind::Storage,
            extents::ChildKind::Backing => seam::ChildKind::Backing,
        };
        let extents::Child {
            id,
            reference,
            format,
            required,
            ..
        } = c;
        Ok(seam::Child {
            id,
            kind,
            reference,
            format,
            required,
        })
    };
    list.into_iter().map(one).collect()
}

pub(crate) fn geometry(g: extents::Geometry) -> Checked<seam::Geometry> {
    if g.size > ByteRange::END_MAX {
        return Err(Malformed::answer(format!("A size of {} bytes", g.size)));
    }
    let extents::Geometry {
        size,
        unit,
        cluster_size,
        zero_granularity,
        discard_granularity,
    } = g;
    Ok(seam::Geometry {
        size,
        unit,
        cluster_size,
        zero_granularity,
        discard_granularity,
    })
}

pub(crate) fn extents(list: Vec<extents::Extent>) -> Checked<Vec<seam::Extent>> {
    bounded(&list, EXTENTS_MAX, "extents")?;
    let mut out = Vec::with_capacity(list.len());
    for e in &list {
        out.push(seam::Extent {
            range: range(e.offset, e.len, "Extent")?,
            at: location(e)?,
        });
    }
    Ok(out)
}

fn location(e: &extents::Extent) -> Checked<Location> {
    Ok(match &e.at {
        extents::Location::Raw(raw) => {
            range(raw.offset, e.len, "Raw location")?;
            if raw.transform != 0 {
                let what = format!("Transform {} is reserved", raw.transform);
                return Err(Malformed::extent(what));
            }
            Location::Raw {
                slot: raw.slot,
                offset: raw.offset,
                in_place: raw.in_place,
            }
        }
        extents::Location::Zero => Location::Zero,
        extents::Location::Hole => Location::Hole,
        extents::Location::Backing(offset) => {
            range(*offset, e.len, "Backing location")?;
            Location::Backing(*offset)
        }
        extents::Location::Coded(c) => {
            range(c.offset, c.stored_len.into(), "Stored unit")?;
            range(c.unit_offset, c.unit_len.into(), "Decoded unit")?;
            if c.unit_len as usize > TRANSFER_MAX {
                let what = format!("A decoded unit of {} bytes; the limit is 2 MiB", c.unit_len);
                return Err(Malformed::extent(what));
            }
            Location::Coded(seam::Coded {
                slot: c.slot,
                offset: c.offset,
                stored_len: c.stored_len,
                codec: match c.codec {
                    extents::Codec::Deflate => seam::Codec::Deflate,
                    extents::Codec::Zlib => seam::Codec::Zlib,
                    extents::Codec::Gzip => seam::Codec::Gzip,
                    extents::Codec::Zstd => seam::Codec::Zstd,
                },
                unit_offset: c.unit_offset,
                unit_len: c.unit_len,
            })
        }
        extents::Location::Special(id) => Location::Special(*id),
    })
}

/// `asked`: the length that `read-special` was asked for.
pub(crate) fn special(bytes: Vec<u8>, asked: ByteRange) -> Checked<Vec<u8>> {
    if bytes.len() as u64 != asked.len() {
        let what = format!("{} bytes where {} were asked for", bytes.len(), asked.len());
        return Err(Malformed::answer(what));
    }
    Ok(bytes)
}

pub(crate) fn json(text: String) -> Checked<String> {
    if text.len() > JSON_BYTES_MAX {
        return Err(Malformed::answer(format!(
            "A JSON text of {} bytes",
            text.len()
        )));
    }
    Ok(text)
}

pub(crate) fn to_intents(list: Vec<seam::WriteIntent>) -> Vec<format_writer::WriteIntent> {
    let one = |i: seam::WriteIntent| format_writer::WriteIntent {
        range: to_range(i.range),
        kind: match i.kind {
            seam::WriteKind::Data => format_writer::WriteKind::Data,
            seam::WriteKind::Compressed => format_writer::WriteKind::Compressed,
        },
        stored_len: i.stored_len,
    };
    list.into_iter().map(one).collect()
}

/// `intents`: how many were asked for.
pub(crate) fn placements(
    list: Vec<format_writer::Placement>,
    intents: usize,
) -> Checked<Vec<seam::Placement>> {
    bounded(&list, PLACEMENTS_MAX, "placements")?;
    let one = |p: format_writer::Placement| {
        if p.intent as usize >= intents {
            let what = format!("A placement for intent {} of {intents}", p.intent);
            return Err(Malformed::answer(what));
        }
        let covers = range(p.covers.offset, p.covers.len, "Placement")?;
        range(p.offset, p.covers.len, "Placement")?;
        let format_writer::Placement {
            token,
            intent,
            slot,
            offset,
            ..
        } = p;
        Ok(seam::Placement {
            token,
            intent,
            covers,
            slot,
            offset,
        })
    };
    list.into_iter().map(one).collect()
}

pub(crate) fn to_discard(kind: seam::DiscardKind) -> format_writer::DiscardKind {
    match kind {
        seam::DiscardKind::Discard => format_writer::DiscardKind::Discard,
        seam::DiscardKind::ZeroUnmap => format_writer::DiscardKind::ZeroUnmap,
        seam::DiscardKind::ZeroKeep => format_writer::DiscardKind::ZeroKeep,
    }
}

pub(crate) fn to_freed(list: Vec<seam::SlotRange>) -> Vec<format_writer::SlotRange> {
    let one = |f: seam::SlotRange| format_writer::SlotRange {
        slot: f.slot,
        range: to_range(f.range),
    };
    list.into_iter().map(one).collect()
}

pub(crate) fn to_repair(fix: seam::Repair) -> format_writer::Repair {
    let mut flags = format_writer::Repair::empty();
    if fix.leaks {
        flags |= format_writer::Repair::LEAKS;
    }
    if fix.errors {
        flags |= format_writer::Repair::ERRORS;
    }
    flags
}

pub(crate) fn report(r: format_writer::CheckReport) -> seam::CheckReport {
    let messages = r.messages.into_iter().take(CHECK_MESSAGES_MAX);
    seam::CheckReport {
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
        messages: messages.map(|m| sentence(m, MESSAGE_BYTES_MAX)).collect(),
    }
}

pub(crate) fn measurement(m: format_create::Measurement) -> seam::Measurement {
    seam::Measurement {
        required: m.required,
        fully_allocated: m.fully_allocated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(offset: u64, len: u64, transform: u32) -> extents::Extent {
        let at = extents::RawLoc {
            slot: 0,
            offset,
            in_place: false,
            transform,
        };
        extents::Extent {
            offset: 0,
            len,
            at: extents::Location::Raw(at),
        }
    }

    #[test]
    fn errnos_round_trip() {
        for e in Errno::ALL {
            assert_eq!(Errno::from(types::Errno::from(e)), e);
        }
    }

    #[test]
    fn an_extent_that_overflows_or_uses_reserved_fields_is_bad() {
        assert!(extents(vec![raw(0, 512, 0)]).is_ok());
        for bad in [raw(u64::MAX, 512, 0), raw(0, u64::MAX, 0), raw(0, 512, 1)] {
            assert_eq!(
                extents(vec![bad]).map_err(|e| e.kind),
                Err(FaultKind::BadExtent)
            );
        }
    }

    #[test]
    fn a_list_past_its_limit_is_a_bad_answer() {
        let many = vec![raw(0, 512, 0); EXTENTS_MAX + 1];
        assert_eq!(extents(many).map_err(|e| e.kind), Err(FaultKind::BadAnswer));
    }
}
