//! A node over an image: the data plane of a host, one request at a time.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use flate2::write::DeflateEncoder;
use outport_plugin_qcow2::Qcow2;
use outport_sdk::{
    ByteRange, Codec, DiscardKind, Extent, Format, Geometry, Grant, Granted, Location, Placement,
    Result, WritableFormat, WriteIntent, WriteKind,
};

use crate::host::Host;

/// A deterministic source of numbers (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// What a write is still waiting for.
struct InFlight {
    placement: Placement,
}

pub(crate) struct Node {
    pub(crate) host: Host,
    pub(crate) image: Qcow2,
    pub(crate) geometry: Geometry,
    pub(crate) backing: Option<Vec<u8>>,
}

impl Node {
    /// Open the image in `files[0]`; a data file is `files[1]`.
    pub(crate) fn open(
        files: Vec<Vec<u8>>,
        backing: Option<Vec<u8>>,
        options: &str,
        writable: bool,
    ) -> Result<Self> {
        let mut host = Host::new(files);
        let (mut image, children) = Qcow2::open(&host, options, writable)?;
        let grants: Vec<Grant> = children
            .iter()
            .map(|c| Grant {
                id: c.id.clone(),
                what: match (c.id.as_str(), &backing) {
                    ("backing", Some(b)) => Granted::Backing(b.len() as u64),
                    ("data-file", _) => Granted::Slot(1),
                    _ => Granted::None,
                },
            })
            .collect();
        let geometry = if writable {
            host.call(|txn| image.activate_writable(txn, &grants))?
        } else {
            image.activate(&host, &grants)?
        };
        Ok(Self {
            host,
            image,
            geometry,
            backing,
        })
    }

    pub(crate) fn resolve(&mut self, offset: u64) -> Result<Vec<Extent>> {
        let unit = u64::from(self.geometry.unit);
        let at = offset - offset % unit;
        let len = unit.min(self.geometry.size - at);
        let extents = self.image.resolve(&self.host, ByteRange::new(at, len))?;
        self.check_extents(&extents);
        assert!(extents[0].range.offset <= at);
        assert!(
            extents.last().unwrap().range.end() >= at + len,
            "{extents:?} {at}"
        );
        Ok(extents)
    }

    fn check_extents(&self, extents: &[Extent]) {
        let unit = u64::from(self.geometry.unit);
        let aligned = |n: u64| n.is_multiple_of(unit) || n == self.geometry.size;
        for pair in extents.windows(2) {
            assert_eq!(pair[0].range.end(), pair[1].range.offset, "a gap");
        }
        for e in extents {
            assert!(e.range.len > 0, "an empty extent");
            assert!(
                aligned(e.range.offset) && aligned(e.range.end()),
                "{e:?} is not aligned"
            );
            assert!(e.range.end() <= self.geometry.size);
        }
    }

    /// The extent that holds `offset`, and how far it reaches.
    fn extent_at(&mut self, offset: u64) -> Result<Extent> {
        let extents = self.resolve(offset)?;
        Ok(*extents
            .iter()
            .find(|e| e.range.offset <= offset && offset < e.range.end())
            .unwrap())
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let at = offset + out.len() as u64;
            let extent = self.extent_at(at)?;
            let skip = at - extent.range.offset;
            let n = (extent.range.len - skip).min((len - out.len()) as u64) as usize;
            match extent.at {
                Location::Zero | Location::Hole => out.resize(out.len() + n, 0),
                Location::Raw { slot, offset, .. } => {
                    out.extend(self.file_bytes(slot, offset + skip, n));
                }
                Location::Backing(offset) => {
                    let backing = self.backing.as_deref().unwrap();
                    let rest = backing.get((offset + skip) as usize..).unwrap_or_default();
                    let there = rest.len().min(n);
                    out.extend(&rest[..there]);
                    out.resize(out.len() + n - there, 0);
                }
                Location::Coded {
                    slot,
                    offset,
                    stored_len,
                    codec,
                    unit_offset,
                    unit_len,
                } => {
                    let stored = self.file_bytes(slot, offset, stored_len as usize);
                    let unit = decode(codec, &stored, unit_len as usize);
                    let from = (at - unit_offset) as usize;
                    out.extend(&unit[from..from + n]);
                }
                Location::Special(_) => panic!("qcow2 has no special extents"),
            }
        }
        Ok(out)
    }

    fn file_bytes(&self, slot: u32, offset: u64, len: usize) -> Vec<u8> {
        let file = &self.host.files[slot as usize];
        let mut out = file.get(offset as usize..).unwrap_or_default().to_vec();
        out.resize(len, 0);
        out
    }

    pub(crate) fn content(&mut self) -> Vec<u8> {
        let size = self.geometry.size as usize;
        self.read(0, size).unwrap()
    }

    // === writing ===

    /// Several writes at once, as a queue of requests would be; they do not
    /// overlap. Some placements are aborted and asked for again.
    pub(crate) fn write_all(&mut self, writes: &[(u64, Vec<u8>)], rng: &mut Rng) -> Result<()> {
        let mut todo: Vec<(u64, Vec<u8>)> = writes.to_vec();
        while !todo.is_empty() {
            // In place first.
            let mut rest = Vec::new();
            for (offset, data) in todo {
                let mut done = 0;
                while done < data.len() {
                    let at = offset + done as u64;
                    let extent = self.extent_at(at)?;
                    let n = ((extent.range.end() - at) as usize).min(data.len() - done);
                    if let Location::Raw {
                        slot,
                        offset: host,
                        in_place: true,
                    } = extent.at
                    {
                        let skip = at - extent.range.offset;
                        self.host.payload(slot, host + skip, &data[done..done + n]);
                    } else {
                        rest.push((at, data[done..done + n].to_vec()));
                    }
                    done += n;
                }
            }
            if rest.is_empty() {
                return Ok(());
            }
            let intents: Vec<WriteIntent> = rest
                .iter()
                .map(|(offset, data)| WriteIntent {
                    range: ByteRange::new(*offset, data.len() as u64),
                    kind: WriteKind::Data,
                    stored_len: 0,
                })
                .collect();
            let image = &mut self.image;
            let placements = self.host.call(|txn| image.prepare_write(txn, &intents))?;
            assert!(!placements.is_empty(), "no placement");
            let mut commit = Vec::new();
            let mut abort = Vec::new();
            for p in &placements {
                let unit = u64::from(self.geometry.unit);
                assert!(p.covers.offset.is_multiple_of(unit));
                assert!(
                    p.covers.end().is_multiple_of(unit) || p.covers.end() == self.geometry.size
                );
                // The present content, and over it what is written.
                let mut bytes = self.read(p.covers.offset, p.covers.len as usize)?;
                for (offset, data) in &rest {
                    overlay(&mut bytes, p.covers.offset, *offset, data);
                }
                if rng.below(8) == 0 {
                    abort.push(p.token);
                } else {
                    self.host.payload(p.slot, p.offset, &bytes);
                    commit.push(p.token);
                }
            }
            if rng.below(2) == 0 {
                commit.reverse();
            }
            if rng.below(2) == 0 && !abort.is_empty() {
                let image = &mut self.image;
                self.host.call(|txn| image.abort_write(txn, &abort))?;
                abort.clear();
            }
            self.commit(&placements, &commit)?;
            if !abort.is_empty() {
                let image = &mut self.image;
                self.host.call(|txn| image.abort_write(txn, &abort))?;
            }
            // What was not placed or was aborted goes round again; in place now,
            // if it was.
            todo = rest;
        }
        Ok(())
    }

    fn commit(&mut self, placements: &[Placement], tokens: &[u64]) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let image = &mut self.image;
        let extents = self.host.call(|txn| image.commit_write(txn, tokens))?;
        let mut covered: Vec<ByteRange> = placements
            .iter()
            .filter(|p| tokens.contains(&p.token))
            .map(|p| p.covers)
            .collect();
        covered.sort_by_key(|r| r.offset);
        let mut got: Vec<ByteRange> = extents.iter().map(|e| e.range).collect();
        got.sort_by_key(|r| r.offset);
        assert_eq!(
            join(&got),
            join(&covered),
            "a commit returns what it covers"
        );
        for e in extents {
            let now = self.extent_at(e.range.offset)?;
            let skip = e.range.offset - now.range.offset;
            match (now.at, e.at) {
                (
                    Location::Raw {
                        offset: a,
                        in_place: true,
                        ..
                    },
                    Location::Raw {
                        offset: b,
                        in_place: true,
                        ..
                    },
                ) => {
                    assert_eq!(a + skip, b);
                }
                (a, b) => assert_eq!(a, b),
            }
        }
        Ok(())
    }

    /// One whole cluster, compressed if that makes it smaller.
    pub(crate) fn write_compressed(
        &mut self,
        offset: u64,
        data: &[u8],
        zstd: bool,
    ) -> Result<bool> {
        let mut whole = data.to_vec();
        whole.resize(self.geometry.cluster_size as usize, 0);
        let stored = encode(zstd, &whole);
        if stored.len() >= whole.len() {
            return Ok(false);
        }
        let intent = WriteIntent {
            range: ByteRange::new(offset, data.len() as u64),
            kind: WriteKind::Compressed,
            stored_len: stored.len() as u32,
        };
        let image = &mut self.image;
        let placements = self.host.call(|txn| image.prepare_write(txn, &[intent]))?;
        assert_eq!(placements.len(), 1);
        self.host
            .payload(placements[0].slot, placements[0].offset, &stored);
        self.commit(&placements, &[placements[0].token])?;
        Ok(true)
    }

    /// Discard all of `range`, part by part; false: not possible there.
    pub(crate) fn discard(&mut self, range: ByteRange, kind: DiscardKind) -> Result<bool> {
        let mut from = range.offset;
        while from < range.end() {
            let rest = ByteRange::new(from, range.end() - from);
            let image = &mut self.image;
            let extents = match self.host.call(|txn| image.discard(txn, rest, kind)) {
                Err(e) if e.code == outport_sdk::Errno::Enotsup => return Ok(false),
                other => other?,
            };
            self.check_extents(&extents);
            assert_eq!(extents[0].range.offset, from);
            from = extents.last().unwrap().range.end();
        }
        assert_eq!(from, range.end());
        Ok(true)
    }

    pub(crate) fn resize(&mut self, size: u64) -> Result<()> {
        let image = &mut self.image;
        let old = self.geometry.size;
        self.geometry = self.host.call(|txn| image.resize(txn, size))?;
        // The host zeroes the rest of the cluster that the old end was in.
        let cluster = u64::from(self.geometry.cluster_size);
        let end = old.next_multiple_of(cluster).min(size);
        if end > old {
            self.write_all(&[(old, vec![0; (end - old) as usize])], &mut Rng(1))?;
        }
        Ok(())
    }

    /// Make everything durable and give freed space back.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let image = &mut self.image;
        self.host.call(|txn| image.flush(txn))?;
        let freed = self.host.barrier();
        // Punch: whoever still reads there is wrong.
        for range in &freed {
            let file = &mut self.host.files[range.slot as usize];
            let end = (range.range.end() as usize).min(file.len());
            let start = (range.range.offset as usize).min(end);
            file[start..end].fill(0xdd);
        }
        let image = &mut self.image;
        self.host.call(|txn| image.reclaim(txn, &freed))
    }

    /// Flush until nothing comes back, then close.
    pub(crate) fn close(mut self) -> Result<Vec<Vec<u8>>> {
        loop {
            self.flush()?;
            if self.host.freed.is_empty() {
                break;
            }
        }
        let image = &mut self.image;
        self.host.call(|txn| image.close(txn))?;
        assert_eq!(*self.host.corruptions.borrow(), Vec::<String>::new());
        Ok(self.host.files)
    }
}

fn join(ranges: &[ByteRange]) -> Vec<ByteRange> {
    let mut out: Vec<ByteRange> = Vec::new();
    for r in ranges {
        match out.last_mut() {
            Some(last) if last.end() == r.offset => last.len += r.len,
            _ => out.push(*r),
        }
    }
    out
}

fn overlay(bytes: &mut [u8], at: u64, offset: u64, data: &[u8]) {
    let from = at.max(offset);
    let to = (at + bytes.len() as u64).min(offset + data.len() as u64);
    if from < to {
        bytes[(from - at) as usize..(to - at) as usize]
            .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
    }
}

pub(crate) fn decode(codec: Codec, stored: &[u8], len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    match codec {
        Codec::Deflate => flate2::read::DeflateDecoder::new(stored)
            .read_exact(&mut out)
            .unwrap(),
        Codec::Zstd => zstd::stream::read::Decoder::new(stored)
            .unwrap()
            .single_frame()
            .read_exact(&mut out)
            .unwrap(),
        other => panic!("{other:?}"),
    }
    out
}

pub(crate) fn encode(zstd: bool, data: &[u8]) -> Vec<u8> {
    if zstd {
        return zstd::bulk::compress(data, 3).unwrap();
    }
    // The window that QEMU uses is 4 KiB; any raw deflate stream whose window
    // is not larger is fine, so keep it small by flushing matches: none at all.
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::new(1));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

// === qemu-img ===

/// Run a tool; its output, or a panic with its words.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

pub(crate) fn qemu_io(image: &Path, commands: &[String]) {
    let mut args = Vec::new();
    for c in commands {
        args.extend(["-c", c.as_str()]);
    }
    let path = image.to_str().unwrap();
    args.push(path);
    run("qemu-io", &args);
}
