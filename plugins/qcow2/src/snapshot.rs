//! The internal snapshots of an image: listed, never changed.

use outport_sdk::{Error, Files, Reader, Result};
use serde::Serialize;

use crate::header::{Header, L1_BYTES_MAX};
use crate::pages::IMAGE;

/// QEMU's limit for the snapshot table (65536 entries of 1 KiB).
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// QEMU's limit for the extra data of one entry.
const EXTRA_BYTES_MAX: u32 = 1024;

/// Names and IDs kept in memory for all snapshots together; the table may hold
/// up to 128 KiB for each.
const NAMES_BYTES_MAX: usize = 4 << 20;

/// Length of the fixed part of an entry.
const FIXED: u64 = 40;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Snapshot {
    #[serde(skip)]
    pub(crate) l1_offset: u64,
    #[serde(skip)]
    pub(crate) l1_size: u32,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) vm_state_size: u64,
    pub(crate) date_sec: u32,
    pub(crate) date_nsec: u32,
    pub(crate) vm_clock_sec: u64,
    pub(crate) vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) icount: Option<u64>,
    /// Guest-visible length when it was taken, if recorded.
    #[serde(skip)]
    pub(crate) disk_size: Option<u64>,
}

/// The snapshots, and the length of their table in bytes.
pub(crate) fn read_table(files: &dyn Files, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    let mut names = 0;
    for i in 0..header.snapshot_count {
        let (snapshot, len) = read_entry(files, header, at)
            .map_err(|e| Error::new(e.code, format!("Snapshot table entry {i}: {}", e.message)))?;
        names += snapshot.id.len() + snapshot.name.len();
        if names > NAMES_BYTES_MAX {
            return Err(Error::invalid(
                "The names in the snapshot table are too long",
            ));
        }
        snapshots.push(snapshot);
        at += len;
        if at - header.snapshots_offset > TABLE_BYTES_MAX {
            return Err(Error::invalid("The snapshot table is too large"));
        }
    }
    Ok((snapshots, at - header.snapshots_offset))
}

fn read_entry(files: &dyn Files, header: &Header, at: u64) -> Result<(Snapshot, u64)> {
    let fixed = files.read(IMAGE, at, FIXED as usize)?;
    let mut r = Reader::new(&fixed);
    let l1_offset = r.be_u64()?;
    let l1_size = r.be_u32()?;
    let (id_len, name_len) = (r.be_u16()?, r.be_u16()?);
    let (date_sec, date_nsec) = (r.be_u32()?, r.be_u32()?);
    let vm_clock = r.be_u64()?;
    let mut vm_state_size = u64::from(r.be_u32()?);
    let extra_len = r.be_u32()?;
    if extra_len > EXTRA_BYTES_MAX {
        return Err(Error::invalid("too much extra data"));
    }
    let table = u64::from(l1_size) * 8;
    if table > L1_BYTES_MAX {
        return Err(Error::invalid("its L1 table is larger than 32 MiB"));
    }
    if !l1_offset.is_multiple_of(header.cluster_size())
        || l1_offset
            .checked_add(table)
            .is_none_or(|end| end > i64::MAX as u64)
    {
        return Err(Error::invalid(format!(
            "invalid L1 table offset {l1_offset:#x}"
        )));
    }
    let variable_len = extra_len as usize + usize::from(id_len) + usize::from(name_len);
    let variable = files.read(IMAGE, at + FIXED, variable_len)?;
    let mut r = Reader::new(&variable);
    let extra = r.take(extra_len as usize)?;
    let id = String::from_utf8_lossy(r.take(usize::from(id_len))?).into_owned();
    let name = String::from_utf8_lossy(r.take(usize::from(name_len))?).into_owned();
    let mut extra = Reader::new(extra);
    if let Ok(size) = extra.be_u64() {
        vm_state_size = size;
    }
    let disk_size = extra.be_u64().ok();
    let icount = extra.be_u64().ok().filter(|n| *n != u64::MAX);
    let snapshot = Snapshot {
        l1_offset,
        l1_size,
        id,
        name,
        vm_state_size,
        date_sec,
        date_nsec,
        vm_clock_sec: vm_clock / 1_000_000_000,
        vm_clock_nsec: vm_clock % 1_000_000_000,
        icount,
        disk_size,
    };
    Ok((snapshot, (FIXED + variable_len as u64).next_multiple_of(8)))
}
