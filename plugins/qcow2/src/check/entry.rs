//! Judging one L1 or L2 entry: what it counts as, what is wrong with it, and
//! what it becomes when errors are mended. Numbers only, no file.
//!
//! A mended entry keeps the guest's data where the entry still names it
//! (reserved bits are cleared); an entry that names no usable place becomes a
//! zero cluster, or in a version 2 image an unallocated one.

use crate::header::Header;
use crate::table::{COPIED, OFFSET_MASK, RawEntry};

const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// A range ends a cluster or more past the end of the file. (Tables and the last
/// data cluster may be cut off inside their last cluster.)
pub(super) fn exceeds(file_len: u64, cluster_bits: u32, offset: u64, len: u64) -> bool {
    match offset.checked_add(len) {
        Some(end) => end.saturating_sub(file_len) >= 1 << cluster_bits,
        None => true,
    }
}

pub(super) fn exceeding(offset: u64, len: u64) -> String {
    format!(
        "ERROR: counting reference for region exceeding the end of the file by one cluster or \
         more: offset {offset:#x} size {len:#x}"
    )
}

/// What an L2 entry counts as in the statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// No host cluster.
    None,
    /// A host cluster at this offset.
    Standard(u64),
    Compressed,
}

/// The judgement of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict<T> {
    /// How many things are wrong, and what, in words.
    pub(super) faults: Vec<String>,
    /// The host range that it refers to, inside the file.
    pub(super) region: Option<(u64, u64)>,
    /// The offset whose refcount decides about the COPIED flag.
    pub(super) flagged: Option<u64>,
    pub(super) class: Class,
    /// What it should be.
    pub(super) mended: Option<T>,
}

impl<T> Verdict<T> {
    const fn new() -> Self {
        Self {
            faults: Vec::new(),
            region: None,
            flagged: None,
            class: Class::None,
            mended: None,
        }
    }
}

/// What a judgement needs to know of the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    cluster_bits: u32,
    extended: bool,
    zero_flag: bool,
    data_file: bool,
    file_len: u64,
}

impl Judge {
    pub(super) const fn new(header: &Header, file_len: u64) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            zero_flag: header.version >= 3,
            data_file: header.has_data_file(),
            file_len,
        }
    }

    const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// An L1 entry.
    pub(super) fn l1(self, raw: u64) -> Verdict<u64> {
        let mut v = Verdict::new();
        if raw & !(OFFSET_MASK | COPIED) != 0 {
            v.faults.push(format!(
                "ERROR found L1 entry with reserved bits set: {raw:x}"
            ));
            v.mended = Some(raw & (OFFSET_MASK | COPIED));
        }
        let offset = raw & OFFSET_MASK;
        if offset == 0 {
            return v;
        }
        v.flagged = Some(offset);
        v.class = Class::Standard(offset);
        if exceeds(
            self.file_len,
            self.cluster_bits,
            offset,
            self.cluster_size(),
        ) {
            v.faults.push(exceeding(offset, self.cluster_size()));
            v.mended = Some(0);
            return v;
        }
        v.region = Some((offset, self.cluster_size()));
        if offset & (self.cluster_size() - 1) != 0 {
            v.faults.push(format!(
                "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
            v.mended = Some(0);
        }
        v
    }

    /// The L2 entry of the cluster at guest offset `guest`.
    pub(super) fn l2(self, raw: RawEntry, guest: u64) -> Verdict<RawEntry> {
        if raw[0] & COMPRESSED != 0 {
            self.compressed(raw)
        } else {
            self.standard(raw, guest)
        }
    }

    fn compressed(self, raw: RawEntry) -> Verdict<RawEntry> {
        let mut v = Verdict::new();
        if self.data_file {
            v.faults.push(format!(
                "ERROR compressed cluster with data file, entry={:#x}",
                raw[0]
            ));
            v.mended = Some(self.lost());
            return v;
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = raw[0] & ((1 << offset_bits) - 1);
        let sectors = ((raw[0] & (COMPRESSED - 1)) >> offset_bits) + 1;
        let len = sectors * SECTOR - offset % SECTOR;
        if raw[0] & COPIED != 0 {
            v.faults.push(format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
            v.mended = Some([raw[0] & !COPIED, raw[1]]);
        }
        if self.extended && raw[1] != 0 {
            v.faults.push(format!(
                "ERROR: coffset={offset:#x}: compressed cluster has a subcluster bitmap"
            ));
            v.mended = Some([raw[0] & !COPIED, 0]);
        }
        v.class = Class::Compressed;
        if exceeds(self.file_len, self.cluster_bits, offset, len) {
            v.faults.push(exceeding(offset, len));
            v.mended = Some(self.lost());
        } else {
            v.region = Some((offset, len));
        }
        v
    }

    fn standard(self, raw: RawEntry, guest: u64) -> Verdict<RawEntry> {
        let mut v = Verdict::new();
        let [entry, bitmap] = raw;
        let can_zero = self.zero_flag && !self.extended;
        let known = OFFSET_MASK | COPIED | if can_zero { ZERO } else { 0 };
        let mut clean = [entry & known, if self.extended { bitmap } else { 0 }];
        if entry & !known != 0 {
            v.faults.push(format!(
                "ERROR found l2 entry with reserved bits set: {entry:x}"
            ));
        }
        let offset = entry & OFFSET_MASK;
        let has_host = offset != 0 || (self.data_file && entry & COPIED != 0);
        if self.extended {
            let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
            if !has_host && allocated != 0 {
                v.faults.push(
                    "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned(),
                );
                clean[1] = zero << 32;
            } else if allocated & zero != 0 {
                v.faults.push(format!(
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster \
                     allocation bitmap"
                ));
                clean[1] = (zero & !allocated) << 32 | allocated;
            }
        }
        if has_host {
            self.host_cluster(&mut v, &mut clean, offset, guest);
        }
        v.mended = (!v.faults.is_empty()).then_some(clean);
        v
    }

    /// An entry with a host offset.
    fn host_cluster(
        self,
        v: &mut Verdict<RawEntry>,
        clean: &mut RawEntry,
        offset: u64,
        guest: u64,
    ) {
        v.class = Class::Standard(offset);
        v.flagged = Some(offset);
        if !self.data_file {
            v.region = Some((offset, self.cluster_size()));
        }
        if offset & (self.cluster_size() - 1) != 0 {
            let what = match clean[0] & ZERO {
                0 => "Data",
                _ => "Preallocated",
            };
            v.faults.push(format!(
                "ERROR offset={offset:x}: {what} cluster is not properly aligned; L2 entry \
                 corrupted."
            ));
            *clean = self.lost();
        } else if self.data_file && offset != guest {
            v.faults.push(format!(
                "ERROR offset={offset:x}: differs from the guest offset {guest:x}, in an image \
                 with an external data file"
            ));
            clean[0] = guest | COPIED | clean[0] & ZERO;
        }
        let outside = exceeds(
            self.file_len,
            self.cluster_bits,
            offset,
            self.cluster_size(),
        );
        if outside && !self.data_file {
            v.faults.push(exceeding(offset, self.cluster_size()));
            v.region = None;
            *clean = self.lost();
        }
    }

    /// The entry of a cluster whose content is nowhere.
    const fn lost(self) -> RawEntry {
        match (self.zero_flag, self.extended) {
            (false, _) => [0, 0],
            (true, false) => [ZERO, 0],
            (true, true) => [0, 0xffff_ffff << 32],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(extended: bool) -> Judge {
        let file_len = 0x10_0000;
        Judge {
            cluster_bits: 16,
            extended,
            zero_flag: true,
            data_file: false,
            file_len,
        }
    }

    #[test]
    fn mended_entries_have_no_faults() {
        for extended in [false, true] {
            let judge = judge(extended);
            for entry in [
                0x5_0200,
                0x5_0002,
                COPIED | 0x9999_0000,
                1 << 60,
                COMPRESSED | 1 << 50,
            ] {
                for bitmap in [0, 0x1_0000_0001, 1] {
                    let verdict = judge.l2([entry, bitmap], 0);
                    let Some(mended) = verdict.mended else {
                        continue;
                    };
                    let again = judge.l2(mended, 0);
                    assert_eq!(again.faults, Vec::<String>::new(), "{entry:#x} {bitmap:#x}");
                    assert_eq!(again.mended, None);
                }
            }
            for entry in [0x5_0200, 0x9999_0000, 1 << 60, 0x5_0001] {
                let mended = judge.l1(entry).mended.unwrap();
                assert!(judge.l1(mended).faults.is_empty());
            }
        }
    }

    #[test]
    fn a_cluster_may_be_cut_off_but_not_lie_outside() {
        assert!(!exceeds(0x1_8000, 16, 0x1_0000, 0x1_0000));
        assert!(exceeds(0x1_0000, 16, 0x1_0000, 0x1_0000));
        assert!(exceeds(0x1_0000, 16, u64::MAX, 2));
    }
}
