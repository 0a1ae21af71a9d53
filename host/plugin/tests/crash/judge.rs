//! What a power cut may leave behind, and what it may not.

use std::fmt;
use std::path::PathBuf;

use outport_block::format::Repair;
use outport_block::trace::CrashImage;
use outport_block::{Buf, ByteRange, Node};
use outport_tests::try_run;

use crate::disk::{Case, Disk, file_node, read_all};
use crate::history::{History, SECTOR};
use crate::support::bundled;

/// One image in so many goes to `qemu-img check` as it is.
const CHECKED: usize = 13;

/// ... is written to through the plugin, closed, and then checked by qemu-img.
const WRITTEN: usize = 41;

/// ... is read by `qemu-img convert` too.
const CONVERTED: usize = 97;

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) points: usize,
    /// Opened, compared and checked through the plugin: all of them.
    pub(crate) images: usize,
    /// Of these: not closed, with reference counts that may be behind.
    pub(crate) dirty: usize,
    pub(crate) written: usize,
    pub(crate) checked: usize,
    pub(crate) converted: usize,
    /// Bitmaps that said something.
    pub(crate) bitmaps: usize,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.points += other.points;
        self.images += other.images;
        self.dirty += other.dirty;
        self.written += other.written;
        self.checked += other.checked;
        self.converted += other.converted;
        self.bitmaps += other.bitmaps;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            points,
            images,
            dirty,
            written,
            checked,
            converted,
            bitmaps,
        } = self;
        write!(
            f,
            "{points} crash points, {images} images read and checked through the plugin \
             ({dirty} dirty, {written} written on), {checked} by qemu-img check, \
             {converted} by qemu-img convert, {bitmaps} bitmaps"
        )
    }
}

/// Judges the images of one recording.
pub(crate) struct Judge<'a> {
    case: Case,
    disk: &'a Disk,
    history: &'a History,
    path: PathBuf,
    pub(crate) tally: Tally,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(case: Case, disk: &'a Disk, history: &'a History) -> Self {
        Self {
            case,
            disk,
            history,
            path: disk.beside("crash.qcow2"),
            tally: Tally::default(),
        }
    }

    /// # Errors
    /// What is wrong with it.
    pub(crate) async fn judge(&mut self, image: &CrashImage, number: usize) -> Result<(), String> {
        std::fs::write(&self.path, &image.bytes).unwrap();
        let dirty = is_dirty(&image.bytes);
        self.tally.dirty += usize::from(dirty);
        let guest = self.reopen(dirty).await?;
        self.history.judge(&guest, &image.durable_marks)?;
        if number.is_multiple_of(CONVERTED) {
            self.convert(&guest)?;
        }
        if number.is_multiple_of(WRITTEN) {
            self.write_on(guest.len() as u64, number).await?;
            self.check(false)
        } else if number.is_multiple_of(CHECKED) {
            self.check(dirty)
        } else {
            Ok(())
        }
    }

    /// Open it for reading, which mends nothing; its content.
    async fn reopen(&mut self, dirty: bool) -> Result<Vec<u8>, String> {
        let file = file_node(&self.path, true, None);
        let node = self.disk.open(bundled(), file, false).await;
        let node = node.map_err(|e| format!("it does not open: {e}"))?;
        let guest = read_all(&node).await;
        let guest = guest.map_err(|e| format!("it cannot be read: {e}"))?;
        let image = node.image().unwrap();
        let report = image.check(Repair::default(), |_| {}).await;
        let report = report.map_err(|e| format!("it cannot be checked: {e}"))?;
        // Reference counts of a dirty image may be behind: that is what dirty says.
        if report.corruptions + report.check_errors > 0 && !dirty {
            return Err(format!("the plugin's check says {report:?}"));
        }
        self.judge_bitmaps(&node, &guest)?;
        let damage = std::mem::take(&mut *self.disk.damage.lock().unwrap());
        if damage.is_empty() || dirty {
            Ok(guest)
        } else {
            Err(format!("reading finds damage: {damage:?}"))
        }
    }

    /// A bitmap that says something says nothing wrong: what changed is dirty.
    fn judge_bitmaps(&mut self, node: &Node, guest: &[u8]) -> Result<(), String> {
        let bitmaps = node.bitmaps().all();
        for bitmap in bitmaps.iter().filter(|it| !it.is_inconsistent()) {
            self.tally.bitmaps += 1;
            let bits = bitmap.bits();
            let clean = |sector: &usize| {
                let at = *sector as u64 * SECTOR;
                !bits.run(ByteRange::between(at, at + SECTOR)).1
            };
            if let Some(sector) = self.history.changed(guest).find(clean) {
                let name = bitmap.name();
                return Err(format!("sector {sector} changed and is clean in '{name}'"));
            }
        }
        Ok(())
    }

    /// It is an image to go on with: write to it, close it, read it back.
    async fn write_on(&mut self, size: u64, number: usize) -> Result<(), String> {
        self.tally.written += 1;
        let file = file_node(&self.path, false, None);
        let node = self.disk.open(bundled(), file, true).await;
        let node = node.map_err(|e| format!("it does not open for writing: {e}"))?;
        let at = number as u64 * self.case.cluster % size;
        let len = self.case.cluster.min(size - at) as usize;
        let data = Buf::from_slice(&vec![0x77; len]);
        let wrote = node.write(at, &data, false).await;
        wrote.map_err(|e| format!("it cannot be written: {e}"))?;
        let closed = node.close().await;
        closed.map_err(|e| format!("it cannot be closed: {e}"))?;
        Ok(())
    }

    /// Leaks are allowed, nothing else. A dirty image is mended first: so does whoever opens it.
    fn check(&mut self, dirty: bool) -> Result<(), String> {
        self.tally.checked += 1;
        let path = self.path.to_str().unwrap();
        let mut args = vec!["check", "-q", "-f", "qcow2"];
        if dirty {
            args.extend(["-r", "all"]);
        }
        args.push(path);
        let output = try_run("qemu-img", &args);
        match output.code {
            Some(0 | 3) => Ok(()),
            code => Err(format!(
                "qemu-img check ended with {code:?}: {}{}",
                output.out, output.err
            )),
        }
    }

    fn convert(&mut self, guest: &[u8]) -> Result<(), String> {
        self.tally.converted += 1;
        let raw = self.disk.beside("crash.raw");
        let (from, to) = (self.path.to_str().unwrap(), raw.to_str().unwrap());
        let output = try_run(
            "qemu-img",
            &["convert", "-f", "qcow2", "-O", "raw", from, to],
        );
        if output.code != Some(0) {
            return Err(format!("qemu-img convert: {}", output.err));
        }
        if std::fs::read(raw).unwrap() == guest {
            Ok(())
        } else {
            Err("qemu-img reads something else than the plugin".to_owned())
        }
    }
}

/// Version 3 with the dirty bit (qcow2.rst: incompatible features).
fn is_dirty(bytes: &[u8]) -> bool {
    bytes[4..8] == [0, 0, 0, 3] && bytes[79] & 1 != 0
}
