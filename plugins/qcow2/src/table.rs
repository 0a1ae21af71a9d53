//! L1 and L2 entries: encodings only.
//!
//! One shape serves images with and without extended L2 entries: a standard
//! cluster has a host cluster or not, and an allocation and a zero bit for each
//! subcluster; without extended entries there is one subcluster, the cluster
//! (qcow2.rst: Cluster mapping, Extended L2 Entries).

use crate::header::Header;

/// Bit 63: the refcount is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Bits 9 to 55.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

const SECTOR: u64 = 512;

/// Where something lies in a file, and whether it is ours alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) offset: u64,
    /// Its refcount is exactly one: it may be written in place.
    pub(crate) copied: bool,
}

/// One bit for each subcluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subclusters {
    pub(crate) allocated: u32,
    pub(crate) zero: u32,
}

/// What an L2 entry says of a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    Standard {
        host: Option<Host>,
        sub: Subclusters,
    },
    Compressed {
        offset: u64,
        stored_len: u32,
    },
}

impl Cluster {
    /// Nothing here: the backing file shows.
    pub(crate) const UNALLOCATED: Self = Self::Standard {
        host: None,
        sub: Subclusters {
            allocated: 0,
            zero: 0,
        },
    };

    pub(crate) fn is_unallocated(self) -> bool {
        self == Self::UNALLOCATED
    }
}

/// An L1 entry: the L2 table, if there is one. The error says what is wrong.
pub(crate) fn l1_decode(raw: u64, cluster_bits: u32) -> Result<Option<Host>, &'static str> {
    if raw & !(OFFSET_MASK | COPIED) != 0 {
        return Err("reserved bits are set");
    }
    let offset = raw & OFFSET_MASK;
    if offset & ((1 << cluster_bits) - 1) != 0 {
        return Err("the L2 table is not aligned to a cluster");
    }
    if offset == 0 {
        return Ok(None);
    }
    Ok(Some(Host {
        offset,
        copied: raw & COPIED != 0,
    }))
}

pub(crate) const fn l1_encode(table: Host) -> u64 {
    table.offset | if table.copied { COPIED } else { 0 }
}

/// How this image encodes L2 entries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L2Coding {
    cluster_bits: u32,
    extended: bool,
    /// Version 2 has no zero flag.
    zero_flag: bool,
    data_file: bool,
}

/// An L2 entry as stored; the second word is only there with extended entries.
pub(crate) type RawEntry = [u64; 2];

impl L2Coding {
    pub(crate) const fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            zero_flag: header.version >= 3,
            data_file: header.has_data_file(),
        }
    }

    /// Bytes of an entry.
    pub(crate) const fn entry_size(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Subclusters of a cluster.
    pub(crate) const fn subclusters(self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// The bits of all subclusters.
    pub(crate) const fn all(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Zero clusters can be expressed.
    pub(crate) const fn can_zero(self) -> bool {
        self.zero_flag
    }

    /// The bits of subclusters `first..end`.
    pub(crate) const fn bits(self, first: u32, end: u32) -> u32 {
        if end <= first {
            return 0;
        }
        let below_end = if end >= 32 { u32::MAX } else { (1 << end) - 1 };
        below_end & !((1 << first) - 1)
    }

    /// Bits of a compressed descriptor that hold the offset.
    const fn offset_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    pub(crate) fn decode(self, raw: RawEntry) -> Result<Cluster, &'static str> {
        let [entry, bitmap] = raw;
        if entry & COMPRESSED != 0 {
            return self.decode_compressed(raw);
        }
        let mut reserved = !(OFFSET_MASK | COPIED);
        if !self.extended && self.zero_flag {
            reserved &= !ZERO;
        }
        if entry & reserved != 0 {
            return Err("reserved bits are set");
        }
        let offset = entry & OFFSET_MASK;
        if offset & ((1 << self.cluster_bits) - 1) != 0 {
            return Err("the host offset is not aligned to a cluster");
        }
        let copied = entry & COPIED != 0;
        let host = if offset != 0 || (copied && self.data_file) {
            // Clusters of a data file have an implicit refcount of one.
            Some(Host {
                offset,
                copied: copied || self.data_file,
            })
        } else {
            None
        };
        let sub = if self.extended {
            Subclusters {
                allocated: bitmap as u32,
                zero: (bitmap >> 32) as u32,
            }
        } else if entry & ZERO != 0 {
            Subclusters {
                allocated: 0,
                zero: 1,
            }
        } else {
            Subclusters {
                allocated: u32::from(host.is_some()),
                zero: 0,
            }
        };
        if sub.allocated & sub.zero != 0 {
            return Err("a subcluster is both allocated and zero");
        }
        if sub.allocated != 0 && host.is_none() {
            return Err("subclusters are allocated, but there is no host cluster");
        }
        Ok(Cluster::Standard { host, sub })
    }

    fn decode_compressed(self, [entry, bitmap]: RawEntry) -> Result<Cluster, &'static str> {
        if self.data_file {
            return Err("a compressed cluster in an image with an external data file");
        }
        if entry & COPIED != 0 {
            return Err("a compressed cluster has the 'copied' flag");
        }
        if self.extended && bitmap != 0 {
            return Err("a compressed cluster has a subcluster bitmap");
        }
        let bits = self.offset_bits();
        let offset = entry & ((1 << bits) - 1);
        if offset >> 56 != 0 {
            return Err("reserved bits are set");
        }
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        let stored_len = sectors * SECTOR - offset % SECTOR;
        // At most 2^13 sectors of 512 bytes: 4 MiB.
        Ok(Cluster::Compressed {
            offset,
            stored_len: stored_len as u32,
        })
    }

    /// The inverse of `decode`; for a compressed cluster `stored_len` is rounded
    /// up to the end of a sector. `None`: the place cannot be expressed.
    pub(crate) fn encode(self, cluster: Cluster) -> Option<RawEntry> {
        match cluster {
            Cluster::Standard { host, sub } => {
                let mut entry = match host {
                    Some(h) => h.offset | if h.copied { COPIED } else { 0 },
                    None => 0,
                };
                if self.extended {
                    return Some([entry, u64::from(sub.zero) << 32 | u64::from(sub.allocated)]);
                }
                if sub.zero != 0 {
                    if !self.zero_flag {
                        return None;
                    }
                    entry |= ZERO;
                }
                Some([entry, 0])
            }
            Cluster::Compressed { offset, stored_len } => {
                let bits = self.offset_bits();
                if offset >> bits != 0 || offset >> 56 != 0 || stored_len == 0 {
                    return None;
                }
                let last = offset + u64::from(stored_len) - 1;
                let further = last / SECTOR - offset / SECTOR;
                if further >> (62 - bits) != 0 {
                    return None;
                }
                Some([COMPRESSED | further << bits | offset, 0])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coding(cluster_bits: u32, extended: bool) -> L2Coding {
        L2Coding {
            cluster_bits,
            extended,
            zero_flag: true,
            data_file: false,
        }
    }

    #[test]
    fn standard_entries_survive_a_round_trip() {
        let c = coding(16, false);
        for raw in [
            0,
            1,
            0x5_0000,
            0x5_0001,
            COPIED | 0x5_0000,
            COPIED | 0x5_0001,
        ] {
            assert_eq!(c.encode(c.decode([raw, 0]).unwrap()), Some([raw, 0]));
        }
        for bad in [0x5_0002, 0x5_0200, 1 << 56, 1 << 61] {
            assert!(c.decode([bad, 0]).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn compressed_entries_count_further_sectors() {
        for cluster_bits in 9..=21 {
            let c = coding(cluster_bits, false);
            let offset = 0x12_3456;
            for len in [1, 170, 171, 511, 512] {
                let raw = c
                    .encode(Cluster::Compressed {
                        offset,
                        stored_len: len,
                    })
                    .unwrap();
                let Cluster::Compressed {
                    offset: at,
                    stored_len,
                } = c.decode(raw).unwrap()
                else {
                    panic!("not compressed");
                };
                assert_eq!(at, offset);
                assert!(stored_len >= len && stored_len < len + 512);
                assert_eq!((at + u64::from(stored_len)) % 512, 0);
            }
        }
    }

    #[test]
    fn subcluster_bits_must_agree() {
        let c = coding(16, true);
        assert!(c.decode([COPIED | 0x5_0000, 0x1_0000_0001]).is_err());
        assert!(c.decode([0, 1]).is_err());
        assert!(c.decode([1, 0]).is_err());
        let raw = [COPIED | 0x5_0000, 0x1_0000_0002];
        assert_eq!(c.encode(c.decode(raw).unwrap()), Some(raw));
        assert_eq!(
            (c.bits(0, 32), c.bits(4, 8), c.bits(31, 32), c.bits(3, 3)),
            (u32::MAX, 0xf0, 1 << 31, 0)
        );
    }
}
