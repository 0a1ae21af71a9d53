//! Guest ranges that lose their content.

use outport_sdk::{ByteRange, DiscardKind, Error, Extent, Result, Txn};

use crate::image::Qcow2;
use crate::map::Extents;
use crate::table::{Cluster, Subclusters};

/// Clusters that one call handles: bounds its time and what it queues. The host
/// asks again for the rest.
const CLUSTERS_MAX: u64 = 65_536;

impl Qcow2 {
    pub(crate) fn discard_range(
        &mut self,
        txn: &mut dyn Txn,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<Vec<Extent>> {
        let geometry = self.geometry();
        let granularity = u64::from(match kind {
            DiscardKind::Discard => geometry.discard_granularity,
            DiscardKind::ZeroUnmap | DiscardKind::ZeroKeep => geometry.zero_granularity,
        });
        if granularity == 0 {
            return Err(Error::unsupported(
                "This image cannot give up or zero ranges",
            ));
        }
        let end = range.end();
        if !range.offset.is_multiple_of(granularity)
            || range.len == 0
            || end > self.header.size
            || (!end.is_multiple_of(granularity) && end != self.header.size)
        {
            return Err(Error::invalid(
                "A discarded range is not aligned, or outside of the image",
            ));
        }
        self.discard_clusters(txn, range, kind)
    }

    /// The same without a look at the geometry.
    pub(crate) fn discard_clusters(
        &mut self,
        txn: &mut dyn Txn,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<Vec<Extent>> {
        let cluster_size = self.cluster_size();
        let mut extents = Extents::default();
        let mut next = range.offset;
        let mut left = CLUSTERS_MAX;
        while next < range.end() && left > 0 {
            left -= 1;
            let table = self.l2_table(txn.files(), next)?;
            // Like QEMU: zeroes are said where the image can say so, and hide a backing image.
            let told = match kind {
                DiscardKind::Discard => self.has_backing() && self.coding.can_zero(),
                DiscardKind::ZeroUnmap | DiscardKind::ZeroKeep => {
                    self.has_backing() || self.coding.can_zero()
                }
            };
            if table.is_none() && !told {
                // Nothing is mapped here, and what is not mapped reads as it may.
                let span = self.header.l2_span();
                let to = (next - next % span).saturating_add(span).min(range.end());
                self.push_unallocated(&mut extents, next, to);
                next = to;
                continue;
            }
            let guest = next & !(cluster_size - 1);
            let to = range.end().min(guest + cluster_size);
            let part = ByteRange::new(next, to - next);
            let old = match table {
                Some(table) => self.cluster(txn.files(), table.offset, guest)?,
                None => Cluster::UNALLOCATED,
            };
            let Some(new) = self.without(old, guest, part, kind) else {
                if next > range.offset {
                    break; // what was done so far counts
                }
                return Err(Error::unsupported(
                    "Part of a compressed cluster cannot be zeroed",
                ));
            };
            if new != old {
                let table = self.table_for_write(txn, guest)?;
                self.set_cluster(txn.files(), table, guest, new)?;
                let host = |c| match c {
                    Cluster::Standard { host, .. } => host,
                    Cluster::Compressed { .. } => None,
                };
                if matches!(old, Cluster::Compressed { .. }) || host(old) != host(new) {
                    self.release(old);
                }
            }
            let mut whole = Extents::default();
            self.push_cluster(&mut whole, guest, new, u64::MAX)
                .map_err(Error::io)?;
            for extent in whole.into_list() {
                extents.push_part(extent, part);
            }
            next = to;
        }
        Ok(extents.into_list())
    }

    /// What `old` becomes without the content of `part`; `None`: impossible.
    fn without(
        &self,
        old: Cluster,
        guest: u64,
        part: ByteRange,
        kind: DiscardKind,
    ) -> Option<Cluster> {
        let unit = self.unit();
        let all = self.coding.all();
        // Subclusters past the end of the image go along with the last one.
        let last = if part.end() >= self.header.size {
            self.coding.subclusters()
        } else {
            (part.end() - guest).div_ceil(unit) as u32
        };
        let gone = self
            .coding
            .bits(((part.offset - guest) / unit) as u32, last);
        // A prepared write will use the host cluster.
        let busy = self.busy.contains_key(&guest);
        if kind == DiscardKind::Discard && (busy || gone != all) {
            return Some(old);
        }
        let zeroes = Cluster::Standard {
            host: None,
            sub: Subclusters {
                allocated: 0,
                zero: all,
            },
        };
        let (host, sub) = match old {
            Cluster::Compressed { .. } if gone != all || busy => return None,
            Cluster::Compressed { .. } => {
                return Some(if kind == DiscardKind::Discard && !self.has_backing() {
                    Cluster::UNALLOCATED
                } else {
                    zeroes
                });
            }
            Cluster::Standard { host, sub } => (host, sub),
        };
        let told = kind != DiscardKind::Discard && self.coding.can_zero();
        if host.is_none() && sub == Subclusters::default() && !self.has_backing() && !told {
            return Some(old); // reads as zeroes already, and cannot or need not say so
        }
        let keep = busy || kind == DiscardKind::ZeroKeep || self.options.discard_no_unref;
        let keep = keep && host.is_some_and(|h| h.copied) && self.coding.can_zero();
        if kind == DiscardKind::Discard && !keep {
            return Some(match host {
                None if !self.has_backing() || !self.coding.can_zero() => old,
                // Like QEMU: allocated, without content, where the image can say so.
                None => zeroes,
                Some(_) if self.has_backing() || self.coding.can_zero() => zeroes,
                Some(_) => Cluster::UNALLOCATED,
            });
        }
        let sub = Subclusters {
            allocated: sub.allocated & !gone,
            zero: sub.zero | gone,
        };
        let host = if sub.allocated == 0 && !keep {
            None
        } else {
            host
        };
        Some(Cluster::Standard { host, sub })
    }
}
