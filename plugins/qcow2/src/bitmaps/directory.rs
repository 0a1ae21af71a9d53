//! The bitmap directory: bytes in, bytes out (qcow2.rst: Bitmap directory).

use outport_sdk::{Error, KeptBitmap, Reader, Result};

/// QEMU's limits: bitmaps of one image, and bytes of their directory.
pub(crate) const BITMAPS_MAX: u32 = 65_535;
pub(crate) const DIRECTORY_BYTES_MAX: u64 = 64 << 20;

/// QEMU's limits for one bitmap: entries of its table, and bytes of bits.
pub(super) const TABLE_ENTRIES_MAX: u64 = 0x800_0000;
pub(super) const BITS_BYTES_MAX: u64 = 512 << 20;

/// Of a name (specification).
pub(super) const NAME_BYTES_MAX: usize = 1023;

/// Of a granularity, as a power of two (specification).
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// Fixed part of an entry.
pub(crate) const FIXED: usize = 24;

/// Where the flags lie in it.
pub(super) const FLAGS_AT: u64 = 12;

/// Bits of `flags`.
pub(super) mod flag {
    /// Nobody has stored it since it was opened for writing.
    pub(in crate::bitmaps) const IN_USE: u32 = 1;
    /// It records writes as soon as the image is open.
    pub(in crate::bitmaps) const AUTO: u32 = 2;
    /// Whoever does not know the extra data may use the bitmap all the same.
    pub(in crate::bitmaps) const EXTRA_COMPATIBLE: u32 = 4;
    pub(super) const KNOWN: u32 = IN_USE | AUTO | EXTRA_COMPATIBLE;
}

/// The only type there is: dirty tracking.
const DIRTY_TRACKING: u8 = 1;

/// One bitmap of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where its table lies, and how many entries that has.
    pub(super) table: u64,
    pub(super) entries: u32,
    pub(super) flags: u32,
    pub(super) granularity_bits: u8,
    /// Kept as it is.
    pub(super) extra: Vec<u8>,
    pub(super) name: Vec<u8>,
}

impl Entry {
    /// Bytes that it takes.
    pub(super) fn stored_len(&self) -> u64 {
        let len = FIXED + self.extra.len() + self.name.len();
        len.next_multiple_of(8) as u64
    }

    pub(crate) const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Not stored by whoever had it open last.
    pub(crate) const fn is_in_use(&self) -> bool {
        self.has(flag::IN_USE)
    }

    /// Enabled when the image is opened.
    pub(crate) const fn is_auto(&self) -> bool {
        self.has(flag::AUTO)
    }

    /// Bytes per bit.
    pub(crate) const fn granularity(&self) -> u32 {
        1 << self.granularity_bits
    }

    /// Its name, unless that is no text: then it is nobody's to use, and stays as it is.
    pub(crate) fn name(&self) -> Option<&str> {
        std::str::from_utf8(&self.name).ok()
    }

    /// Its extra data, if there is any, does not forbid its use.
    pub(super) fn is_understood(&self) -> bool {
        self.extra.is_empty() || self.has(flag::EXTRA_COMPATIBLE)
    }

    /// What the host is told of it.
    pub(super) fn kept(&self) -> Option<KeptBitmap> {
        Some(KeptBitmap {
            name: self.name()?.to_owned(),
            granularity: self.granularity(),
            enabled: self.is_auto(),
            consistent: !self.is_in_use() && self.is_understood(),
        })
    }

    fn read(r: &mut Reader<'_>) -> Result<(Self, u8)> {
        let (table, entries, flags) = (r.be_u64()?, r.be_u32()?, r.be_u32()?);
        let (kind, granularity_bits) = (r.u8()?, r.u8()?);
        let (name_len, extra_len) = (usize::from(r.be_u16()?), r.be_u32()? as usize);
        let extra = r.take(extra_len)?.to_vec();
        let name = r.take(name_len)?.to_vec();
        let entry = Self {
            table,
            entries,
            flags,
            granularity_bits,
            extra,
            name,
        };
        // The last one may lack its padding.
        let padding = entry.stored_len() as usize - FIXED - extra_len - name_len;
        r.skip(padding.min(r.remaining()))?;
        Ok((entry, kind))
    }

    fn check(&self, kind: u8, cluster_bits: u32) -> Result<()> {
        let entries = u64::from(self.entries);
        let fits = kind == DIRTY_TRACKING
            && self.flags & !flag::KNOWN == 0
            && GRANULARITY_BITS.contains(&self.granularity_bits)
            && (1..=NAME_BYTES_MAX).contains(&self.name.len())
            && self.table != 0
            && self.table.is_multiple_of(1 << cluster_bits)
            && self.table.checked_add(entries * 8).is_some()
            && entries <= TABLE_ENTRIES_MAX
            && entries << cluster_bits <= BITS_BYTES_MAX;
        if fits {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&self.name);
        Err(Error::invalid(format!(
            "Bitmap '{name}' doesn't satisfy the constraints"
        )))
    }
}

/// The entries of a directory of `count` bitmaps.
pub(crate) fn parse(bytes: &[u8], count: u32, cluster_bits: u32) -> Result<Vec<Entry>> {
    let mut r = Reader::new(bytes);
    let mut entries = Vec::new();
    let mut names = std::collections::HashSet::new();
    for _ in 0..count {
        if r.remaining() < FIXED {
            return Err(Error::invalid(
                "Less bitmaps found than specified in header extension",
            ));
        }
        let read = Entry::read(&mut r);
        let (entry, kind) = read.map_err(|_| Error::invalid("Broken bitmap directory"))?;
        entry.check(kind, cluster_bits)?;
        if !names.insert(entry.name.clone()) {
            let name = String::from_utf8_lossy(&entry.name);
            return Err(Error::invalid(format!("Bitmap already exists: {name}")));
        }
        entries.push(entry);
    }
    if r.remaining() >= FIXED {
        return Err(Error::invalid(
            "More bitmaps found than specified in header extension",
        ));
    }
    Ok(entries)
}

/// The bytes of a directory.
pub(super) fn serialise(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let end = out.len() + entry.stored_len() as usize;
        out.extend(entry.table.to_be_bytes());
        out.extend(entry.entries.to_be_bytes());
        out.extend(entry.flags.to_be_bytes());
        out.extend([DIRTY_TRACKING, entry.granularity_bits]);
        // At most 1023 and what came from a directory of 64 MiB.
        out.extend((entry.name.len() as u16).to_be_bytes());
        out.extend((entry.extra.len() as u32).to_be_bytes());
        out.extend(&entry.extra);
        out.extend(&entry.name);
        out.resize(end, 0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, extra: usize) -> Entry {
        Entry {
            table: 0x5_0000,
            entries: 1,
            flags: flag::AUTO,
            granularity_bits: 16,
            extra: vec![9; extra],
            name: name.into(),
        }
    }

    #[test]
    fn a_directory_survives_a_round_trip() {
        let entries = [entry("one", 0), entry("twenty-two", 13), entry("3", 8)];
        let bytes = serialise(&entries);
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(parse(&bytes, 3, 16).unwrap(), entries);
        for (count, said) in [(2, "More bitmaps"), (4, "Less bitmaps")] {
            let error = parse(&bytes, count, 16).unwrap_err();
            assert!(error.message.starts_with(said), "{}", error.message);
        }
        for end in 0..bytes.len() {
            let _ = parse(&bytes[..end], 3, 16);
        }
    }

    #[test]
    fn what_no_entry_may_say() {
        let bad = |change: &dyn Fn(&mut Entry)| {
            let mut entry = entry("one", 0);
            change(&mut entry);
            parse(&serialise(&[entry]), 1, 16).unwrap_err().message
        };
        let odd: [&dyn Fn(&mut Entry); 6] = [
            &|it| it.flags = 8,
            &|it| it.granularity_bits = 8,
            &|it| it.granularity_bits = 32,
            &|it| it.table = 512,
            &|it| it.table = 0,
            &|it| it.entries = 1 << 14,
        ];
        for change in odd {
            assert_eq!(bad(change), "Bitmap 'one' doesn't satisfy the constraints");
        }
        assert!(bad(&|it| it.name = vec![b'x'; 1024]).ends_with("doesn't satisfy the constraints"));
        let two = serialise(&[entry("one", 0), entry("one", 0)]);
        assert_eq!(
            parse(&two, 2, 16).unwrap_err().message,
            "Bitmap already exists: one"
        );
    }
}
