//! [`TestNode`]: an open image with the daemon's data plane around it, natively.

use super::codec;
use super::disk::Disk;
use super::extents::{ExtentMap, Judge, check_geometry, grant, part};
use super::host::{MemoryHost, TRANSFER_MAX, broken};
use super::write::Reservations;
use crate::{
    ByteRange, CheckReport, Errno, Error, Extent, Format, Geometry, Grant, Location, Repair,
    Result, WritableFormat,
};

/// An open image: reads and writes guest bytes as the daemon does, through
/// `resolve`, `prepare_write`, payload, `commit_write`, and refuses what the
/// daemon would refuse.
#[derive(Debug)]
pub struct TestNode<T> {
    pub(super) host: MemoryHost,
    pub(super) image: T,
    pub(super) geometry: Geometry,
    pub(super) known: ExtentMap,
    pub(super) reserved: Reservations,
    pub(super) writable: bool,
    options: String,
}

impl<T: Format> TestNode<T> {
    /// Open read-only. `options` is the JSON object of the plugin's options.
    pub fn open_read_only(mut host: MemoryHost, options: &str) -> Result<Self> {
        let (mut image, grants) = open::<T>(&mut host, options, false)?;
        let geometry = image.activate(&host, &grants)?;
        Self::checked(host, image, geometry, options, false)
    }

    fn checked(
        host: MemoryHost,
        image: T,
        geometry: Geometry,
        options: &str,
        writable: bool,
    ) -> Result<Self> {
        check_geometry(&geometry)?;
        Ok(Self {
            host,
            image,
            geometry,
            known: ExtentMap::default(),
            reserved: Reservations::default(),
            writable,
            options: options.to_owned(),
        })
    }

    /// Size and granularities.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The files and what was logged.
    pub const fn host(&self) -> &MemoryHost {
        &self.host
    }

    /// The files, as a power cut now would leave them at best.
    pub fn into_host(mut self) -> MemoryHost {
        self.host.detach();
        self.host
    }

    /// The plugin's value, for questions of its own tests.
    pub const fn image(&self) -> &T {
        &self.image
    }

    /// `len` guest bytes from `offset`.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.inside(offset, len)?;
        let (mut out, end) = (Vec::with_capacity(len), offset + len as u64);
        while (out.len() as u64) < end - offset {
            let at = offset + out.len() as u64;
            let extent = self.extent_at(at, end - at)?;
            let len = extent.range.end().min(end) - at;
            out.extend(self.load(part(extent, at, len))?);
        }
        Ok(out)
    }

    /// Everything.
    pub fn read_all(&mut self) -> Result<Disk> {
        let mut all = Disk::new(self.geometry.size);
        let mut at = 0;
        while at < self.geometry.size {
            let extent = self.extent_at(at, self.geometry.size - at)?;
            let end = extent.range.end();
            while at < end && !matches!(extent.at, Location::Zero | Location::Hole) {
                let len = (end - at).min(TRANSFER_MAX as u64);
                all.write(at, &self.load(part(extent, at, len))?);
                at += len;
            }
            at = end;
        }
        Ok(all)
    }

    /// The mapping of the whole image, adjacent extents as the plugin gave them.
    pub fn extents(&mut self) -> Result<Vec<Extent>> {
        let (mut all, mut at) = (Vec::new(), 0);
        while at < self.geometry.size {
            let extent = self.extent_at(at, self.geometry.size - at)?;
            at = extent.range.end();
            all.push(extent);
        }
        Ok(all)
    }

    /// The format's facts, parsed.
    pub fn facts(&mut self) -> Result<serde_json::Value> {
        let text = self.image.facts(&self.host)?;
        serde_json::from_str(&text).map_err(|e| broken(format!("the facts are no JSON: {e}")))
    }

    /// Where guest byte `at` is; asks for `len` bytes on a miss.
    pub(super) fn extent_at(&mut self, at: u64, len: u64) -> Result<Extent> {
        if let Some(known) = self.known.find(at) {
            return Ok(known);
        }
        let unit = u64::from(self.geometry.unit);
        let start = at - at % unit;
        let end = (at + len).next_multiple_of(unit).min(self.geometry.size);
        let asked = ByteRange::new(start, end - start);
        let extents = self.image.resolve(&self.host, asked)?;
        self.judge().resolved(asked, &extents)?;
        for extent in extents {
            self.judge().one(&extent)?;
            self.known.insert(extent);
        }
        self.known
            .find(at)
            .ok_or_else(|| broken(format!("resolve left out byte {at}")))
    }

    pub(super) const fn judge(&self) -> Judge<'_> {
        Judge {
            host: &self.host,
            geometry: &self.geometry,
            known: &self.known,
            writable: self.writable,
        }
    }

    pub(super) fn inside(&self, offset: u64, len: usize) -> Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.geometry.size => Ok(()),
            _ => Err(Error::new(
                Errno::Einval,
                "The request ends after the image",
            )),
        }
    }

    /// The bytes of one extent.
    fn load(&mut self, extent: Extent) -> Result<Vec<u8>> {
        let Extent { range, at } = extent;
        let len = range.len as usize;
        Ok(match at {
            Location::Raw { slot, offset, .. } => self.host.file(slot)?.disk.read(offset, len),
            Location::Zero | Location::Hole => vec![0; len],
            Location::Backing(offset) => match &self.host.backing {
                Some(backing) => backing.read(offset, len),
                None => return Err(broken("there is no backing image")),
            },
            Location::Coded {
                slot,
                offset,
                stored_len,
                codec,
                unit_offset,
                unit_len,
            } => {
                let stored = self.host.file(slot)?.disk.read(offset, stored_len as usize);
                let unit = codec::decode(codec, &stored, unit_len)?;
                unit[(range.offset - unit_offset) as usize..][..len].to_vec()
            }
            Location::Special(id) => {
                let mut bytes = Vec::with_capacity(len);
                while bytes.len() < len {
                    let step = (len - bytes.len()).min(TRANSFER_MAX);
                    let asked = ByteRange::new(range.offset + bytes.len() as u64, step as u64);
                    let more = self.image.read_special(&self.host, id, asked)?;
                    if more.len() != step {
                        return Err(broken("read_special returned another length"));
                    }
                    bytes.extend(more);
                }
                bytes
            }
        })
    }
}

impl<T: WritableFormat> TestNode<T> {
    /// Open writable.
    pub fn open(mut host: MemoryHost, options: &str) -> Result<Self> {
        let (mut image, grants) = open::<T>(&mut host, options, true)?;
        let activated = image.activate_writable(&mut host, &grants);
        let geometry = host.finish(activated)?;
        Self::checked(host, image, geometry, options, true)
    }

    /// FLUSH: when it returns, everything acknowledged is durable.
    pub fn flush(&mut self) -> Result<()> {
        let flushed = self.image.flush(&mut self.host);
        self.host.finish(flushed)?;
        self.write_back()
    }

    /// What the host does when its overlay is full: the barrier, without asking
    /// the plugin to flush.
    pub fn write_back(&mut self) -> Result<()> {
        let freed = self.host.barrier();
        if freed.is_empty() {
            return Ok(());
        }
        let reclaimed = self.image.reclaim(&mut self.host, &freed);
        self.host.finish(reclaimed)
    }

    /// A new guest-visible length.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        let resized = self.image.resize(&mut self.host, size);
        let geometry = self.host.finish(resized)?;
        check_geometry(&geometry)?;
        if geometry.size != size {
            return Err(broken(format!("resize to {size} made {}", geometry.size)));
        }
        self.geometry = geometry;
        self.known.clear();
        Ok(())
    }

    /// A whole check.
    pub fn check(&mut self, fix: Repair) -> Result<CheckReport> {
        let mut cursor = 0;
        loop {
            let slice = self.image.check(&mut self.host, fix, cursor);
            let (report, next) = self.host.finish(slice)?;
            if fix.errors || fix.leaks {
                self.known.clear();
            }
            match next {
                Some(next) if next != cursor => cursor = next,
                Some(_) => return Err(broken("check does not get on")),
                None => return Ok(report),
            }
        }
    }

    /// Clean close; the files stay.
    pub fn close(mut self) -> Result<MemoryHost> {
        self.shut()?;
        Ok(self.into_host())
    }

    /// Clean close, and open again with a fresh instance.
    pub fn reopen(&mut self) -> Result<()> {
        self.shut()?;
        let mut host = std::mem::take(&mut self.host);
        host.detach();
        *self = Self::open(host, &self.options)?;
        Ok(())
    }

    fn shut(&mut self) -> Result<()> {
        self.flush()?;
        let closed = self.image.close(&mut self.host);
        self.host.finish(closed)?;
        self.host.barrier();
        Ok(())
    }
}

fn open<T: Format>(
    host: &mut MemoryHost,
    options: &str,
    writable: bool,
) -> Result<(T, Vec<Grant>)> {
    let (image, children) = T::open(host, options, writable)?;
    let grants = children
        .iter()
        .map(|child| {
            Ok(Grant {
                id: child.id.clone(),
                what: grant(host, child)?,
            })
        })
        .collect::<Result<_>>()?;
    Ok((image, grants))
}
