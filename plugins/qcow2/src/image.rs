//! One open image: its state, how it is opened, and how a call that changes it
//! either happens whole or not at all.
//!
//! Everything in memory is either a copy of what the transaction holds or can be
//! made again from the file. A call that fails has queued nothing, so after an
//! error the copies are dropped and made again ([`Qcow2::refresh`]).

use std::collections::HashMap;

use outport_sdk::{
    ByteRange, Child, ChildKind, Errno, Error, Files, Geometry, Grant, Granted, LogLevel, Repair,
    Result, Stage, Txn,
};

use crate::alloc::Allocator;
use crate::bitmaps::Bitmaps;
use crate::header::{Header, autoclear, field, incompatible};
use crate::options::Options;
use crate::pages::{IMAGE, Pages};
use crate::regions::Regions;
use crate::release::Releases;
use crate::snapshot::{self, Snapshot};
use crate::table::{Cluster, Host, L2Coding, RawEntry, l1_decode};
use crate::write::{Busy, Reservation};

/// Slices of a repair at activation; a check that needs more does not end.
const REPAIR_SLICES_MAX: u32 = 1 << 20;

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    pub(crate) options: Options,
    pub(crate) writable: bool,
    /// Another instance had it open until now, and those who use it go on.
    pub(crate) takes_over: bool,
    pub(crate) header: Header,
    pub(crate) coding: L2Coding,
    pub(crate) snapshots: Vec<Snapshot>,
    snapshot_table_bytes: u64,
    /// Where guest clusters live: the image file, or the external data file.
    pub(crate) data_slot: u32,
    /// Length of the backing image, if one was granted.
    pub(crate) backing_len: Option<u64>,
    pub(crate) regions: Regions,
    /// Where tables were when a repair in slices began.
    pub(crate) former: Option<Regions>,
    pub(crate) pages: Pages,
    /// No table lies past this: the file's length or what was allocated since.
    pub(crate) file_end: u64,
    /// The file with the data is at least this long.
    pub(crate) data_len: u64,
    pub(crate) alloc: Allocator,
    /// Prepared writes by token.
    pub(crate) reservations: HashMap<u64, Reservation>,
    /// Guest clusters with prepared writes, by guest offset.
    pub(crate) busy: HashMap<u64, Busy>,
    pub(crate) next_token: u64,
    pub(crate) releases: Releases,
    /// What is known of persistent bitmaps, and what is being stored of them.
    pub(crate) bitmaps: Bitmaps,
    /// A check between two slices.
    pub(crate) check: Option<Box<crate::check::Check>>,
    /// A call failed half-way: the copies below are not what the file has.
    stale: bool,
}

// === opening ===

impl Qcow2 {
    pub(crate) fn open_image(
        files: &dyn Files,
        options: &str,
        writable: bool,
    ) -> Result<(Self, Vec<Child>)> {
        let options = Options::parse(options)?;
        let header = read_header(files)?;
        if writable {
            refuse_writing(&header)?;
        }
        let (snapshots, snapshot_table_bytes) = snapshot::read_table(files, &header)?;
        let children = children(&header);
        let image = Self {
            coding: L2Coding::new(&header),
            regions: Regions::fixed(&header, &snapshots, snapshot_table_bytes),
            pages: Pages::new(header.cluster_size(), options.cache_pages),
            former: None,
            options,
            writable,
            takes_over: false,
            header,
            snapshots,
            snapshot_table_bytes,
            data_slot: IMAGE,
            backing_len: None,
            file_end: 0,
            data_len: 0,
            alloc: Allocator::default(),
            reservations: HashMap::new(),
            busy: HashMap::new(),
            next_token: 1,
            releases: Releases::default(),
            bitmaps: Bitmaps::default(),
            check: None,
            stale: true,
        };
        Ok((image, children))
    }

    pub(crate) fn settle_children(&mut self, grants: &[Grant]) -> Result<()> {
        for grant in grants {
            match (grant.id.as_str(), grant.what) {
                ("data-file", Granted::Slot(slot)) if self.header.has_data_file() => {
                    self.data_slot = slot;
                }
                ("backing", Granted::Backing(len)) => self.backing_len = Some(len),
                (_, Granted::None) => {}
                (id, _) => return Err(Error::invalid(format!("Unexpected child '{id}'"))),
            }
        }
        if self.header.has_data_file() && self.data_slot == IMAGE {
            return Err(Error::invalid("'data-file' is required for this image"));
        }
        if self.header.data_file_raw() && self.has_backing() {
            return Err(Error::invalid(
                "A backing file is impossible with a raw external data file",
            ));
        }
        Ok(())
    }

    /// What the first writable opening owes the image: repair if it was left
    /// dirty, and no autoclear bit that we would not keep true.
    pub(crate) fn prepare_for_writing(&mut self, txn: &mut dyn Txn) -> Result<()> {
        if self.header.version < 3 {
            return Ok(());
        }
        let mut known = autoclear::KNOWN;
        if !self.header.has_data_file() {
            known &= !autoclear::DATA_FILE_RAW;
        }
        if self.header.autoclear & !known != 0 {
            self.header.autoclear &= known;
            let bits = self.header.autoclear;
            txn.write(IMAGE, Stage::Prepare, field::AUTOCLEAR, &bits.to_be_bytes())?;
        }
        let dirty = self.header.incompatible & incompatible::DIRTY != 0;
        if dirty && self.takes_over {
            // Which growth the mark is for is not known any more: it stays until the close.
            self.releases.inherit_growth();
        } else if dirty {
            self.repair(txn)?;
            self.header.incompatible &= !incompatible::DIRTY;
            let bits = self.header.incompatible;
            txn.write(
                IMAGE,
                Stage::Mapping,
                field::INCOMPATIBLE,
                &bits.to_be_bytes(),
            )?;
        }
        self.take_bitmaps(txn)
    }

    fn repair(&mut self, txn: &mut dyn Txn) -> Result<()> {
        txn.log(
            LogLevel::Warn,
            "The image was not closed properly: repairing reference counts",
        );
        let fix = Repair {
            leaks: true,
            errors: true,
        };
        let mut cursor = 0;
        for _ in 0..REPAIR_SLICES_MAX {
            let (report, next) = crate::check::check_slice(self, txn, fix, cursor)?;
            let Some(next) = next else {
                if report.check_errors > 0 || report.corruptions > report.corruptions_fixed {
                    return Err(Error::io(format!(
                        "The image was not closed properly and cannot be repaired: {} errors left",
                        report.check_errors + report.corruptions - report.corruptions_fixed
                    )));
                }
                return self.after_repair(txn);
            };
            cursor = next;
        }
        Err(Error::io("The repair of the image does not end"))
    }

    /// The refcounts were rebuilt. Tables that this moved are free now, but the
    /// host takes them for metadata until they are freed in its eyes too.
    pub(crate) fn after_repair(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let former = self
            .former
            .take()
            .unwrap_or_else(|| std::mem::take(&mut self.regions));
        self.releases.after_repair();
        self.invalidate();
        self.refresh(txn.files())?;
        for (first, count) in former.clusters() {
            for cluster in first..first + count {
                let offset = cluster << self.header.cluster_bits;
                if self.regions.find(offset, self.cluster_size()).is_none()
                    && self.allocate_at(txn, cluster)?
                {
                    self.releases.add(cluster, 1);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn geometry(&self) -> Geometry {
        let cluster_size = 1_u32 << self.header.cluster_bits;
        let unit = cluster_size / self.coding.subclusters();
        let raw = self.header.data_file_raw();
        let zero = self.coding.can_zero() && !raw;
        // Version 2 cannot hide what the backing file has.
        let discard = !raw && (zero || !self.has_backing());
        Geometry {
            size: self.header.size,
            unit,
            cluster_size,
            zero_granularity: if zero { unit } else { 0 },
            discard_granularity: if discard { cluster_size } else { 0 },
        }
    }

    /// Something shows where this image has nothing, now or when it is opened
    /// with the backing file that it names.
    pub(crate) fn has_backing(&self) -> bool {
        self.backing_len.is_some() || self.header.backing_file.is_some()
    }

    pub(crate) const fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    pub(crate) fn unit(&self) -> u64 {
        self.header.cluster_size() / u64::from(self.coding.subclusters())
    }
}

/// Read and check the header of slot 0.
pub(crate) fn read_header(files: &dyn Files) -> Result<Header> {
    let size = files.size(IMAGE)?;
    let head = files.read(IMAGE, 0, 512)?;
    let cluster_bits = Header::peek_cluster_bits(&head)?;
    let header = Header::parse(&files.read(IMAGE, 0, 1 << cluster_bits)?)?;
    header.check_tables(size)?;
    Ok(header)
}

fn refuse_writing(header: &Header) -> Result<()> {
    if header.incompatible & incompatible::CORRUPT != 0 {
        return Err(Error::new(
            Errno::Eacces,
            "Image is corrupt; cannot be opened read/write. Open it read-only, or repair it \
             with qemu-img check -r all",
        ));
    }
    Ok(())
}

fn children(header: &Header) -> Vec<Child> {
    let mut children = vec![Child {
        id: "backing".into(),
        kind: ChildKind::Backing,
        reference: header.backing_file.clone(),
        format: header.backing_format().map(str::to_owned),
        required: header.backing_file.is_some(),
    }];
    if header.has_data_file() {
        children.push(Child {
            id: "data-file".into(),
            kind: ChildKind::Storage,
            reference: header.data_file_name().map(str::to_owned),
            format: Some("raw".into()),
            required: true,
        });
    }
    children
}

// === whole or not at all ===

impl Qcow2 {
    /// Run a call that queues writes. If it fails, nothing of it stays.
    pub(crate) fn change<T>(
        &mut self,
        txn: &mut dyn Txn,
        call: impl FnOnce(&mut Self, &mut dyn Txn) -> Result<T>,
    ) -> Result<T> {
        if !self.writable {
            return Err(Error::new(Errno::Erofs, "The image is open read-only"));
        }
        self.refresh(txn.files())?;
        let result = call(self, txn).and_then(|value| {
            self.settle_releases(txn)?;
            self.pages.emit(txn)?;
            Ok(value)
        });
        match result {
            Ok(value) => {
                self.releases.keep();
                Ok(value)
            }
            Err(e) => {
                self.releases.discard();
                self.invalidate();
                Err(e)
            }
        }
    }

    /// The copies in memory may differ from the file: make them again before
    /// they are used next.
    pub(crate) const fn invalidate(&mut self) {
        self.stale = true;
    }

    /// Make the copies again if they may be wrong.
    pub(crate) fn refresh(&mut self, files: &dyn Files) -> Result<()> {
        if !self.stale {
            return Ok(());
        }
        self.pages.clear();
        self.alloc = Allocator::default();
        self.header = read_header(files)?;
        self.coding = L2Coding::new(&self.header);
        (self.snapshots, self.snapshot_table_bytes) = snapshot::read_table(files, &self.header)?;
        self.regions = Regions::fixed(&self.header, &self.snapshots, self.snapshot_table_bytes);
        if self.writable {
            self.regions.add_tables(files, &self.header)?;
        }
        self.file_end = self.rounded_size(files)?;
        self.data_len = files.size(self.data_slot)?;
        self.stale = false;
        Ok(())
    }

    fn rounded_size(&self, files: &dyn Files) -> Result<u64> {
        let size = files.size(IMAGE)?;
        Ok(size
            .checked_next_multiple_of(self.cluster_size())
            .unwrap_or(size))
    }

    /// Damage that stops this call: reported, and an error with the same words.
    pub(crate) fn damaged(
        &self,
        files: &dyn Files,
        message: String,
        offset: u64,
        size: u64,
    ) -> Error {
        files.corrupt(&message, Some(offset), Some(size), false);
        Error::io(message)
    }
}

// === tables ===

impl Qcow2 {
    /// A table of one cluster may lie at `offset`: inside the file, and not on
    /// top of a table that the header names.
    pub(crate) fn check_table(&mut self, files: &dyn Files, offset: u64, name: &str) -> Result<()> {
        let end = offset.saturating_add(self.cluster_size());
        if end > self.file_end {
            self.file_end = self.file_end.max(self.rounded_size(files)?);
        }
        if end > self.file_end {
            let message = format!("{name} at offset {offset:#x} lies outside of the file");
            return Err(self.damaged(files, message, offset, self.cluster_size()));
        }
        if let Some(other) = self.regions.find_fixed(offset, self.cluster_size()) {
            let message = format!("{name} at offset {offset:#x} overlaps the {other}");
            return Err(self.damaged(files, message, offset, self.cluster_size()));
        }
        Ok(())
    }

    /// File offset of the L1 entry for guest offset `guest`.
    pub(crate) fn l1_entry_at(&self, guest: u64) -> Result<u64> {
        let index = guest / self.header.l2_span();
        if index >= u64::from(self.header.l1_size) {
            return Err(Error::invalid(format!(
                "Guest offset {guest:#x} has no L1 entry"
            )));
        }
        Ok(self.header.l1_offset + index * 8)
    }

    /// The L2 table that maps `guest`.
    pub(crate) fn l2_table(&mut self, files: &dyn Files, guest: u64) -> Result<Option<Host>> {
        let at = self.l1_entry_at(guest)?;
        let raw = self.pages.read_u64(files, at)?;
        match l1_decode(raw, self.header.cluster_bits) {
            Ok(None) => Ok(None),
            Ok(Some(table)) => {
                self.check_table(files, table.offset, "L2 table")?;
                Ok(Some(table))
            }
            Err(why) => {
                let message = format!("L1 entry {raw:#x} at offset {at:#x}: {why}");
                Err(self.damaged(files, message, at, 8))
            }
        }
    }

    /// File offset of the L2 entry for `guest` in the table at `table`.
    pub(crate) fn l2_entry_at(&self, table: u64, guest: u64) -> u64 {
        let index = (guest >> self.header.cluster_bits) % self.header.l2_entries();
        table + index * self.coding.entry_size()
    }

    pub(crate) fn read_entry(&mut self, files: &dyn Files, at: u64) -> Result<RawEntry> {
        let entry = self.pages.read_u64(files, at)?;
        let bitmap = match self.coding.entry_size() {
            16 => self.pages.read_u64(files, at + 8)?,
            _ => 0,
        };
        Ok([entry, bitmap])
    }

    /// Decode the L2 entry `raw` for the cluster at `guest`, and check that it
    /// does not point into metadata.
    pub(crate) fn decode(&self, raw: RawEntry, guest: u64) -> std::result::Result<Cluster, String> {
        let words = |why: &str| format!("L2 entry {:#x} of guest offset {guest:#x}: {why}", raw[0]);
        let cluster = self.coding.decode(raw).map_err(words)?;
        if let Cluster::Standard {
            host: Some(host), ..
        } = cluster
        {
            if self.header.has_data_file() {
                if host.offset != guest {
                    return Err(words(
                        "offset in the data file differs from the guest offset",
                    ));
                }
            } else if let Some(name) = self.regions.find(host.offset, self.cluster_size()) {
                return Err(words(&format!("the cluster overlaps the {name}")));
            }
        }
        Ok(cluster)
    }

    /// What the cluster at `guest` is, in the L2 table at `table`.
    pub(crate) fn cluster(&mut self, files: &dyn Files, table: u64, guest: u64) -> Result<Cluster> {
        let at = self.l2_entry_at(table, guest);
        let raw = self.read_entry(files, at)?;
        self.decode(raw, guest)
            .map_err(|message| self.damaged(files, message, at, 8))
    }

    /// Queue the entry of the cluster at `guest`.
    pub(crate) fn set_cluster(
        &mut self,
        files: &dyn Files,
        table: u64,
        guest: u64,
        cluster: Cluster,
    ) -> Result<()> {
        let at = self.l2_entry_at(table, guest);
        let [entry, bitmap] = self.coding.encode(cluster).ok_or_else(|| {
            Error::new(
                Errno::Efbig,
                format!("Guest offset {guest:#x} cannot be mapped there"),
            )
        })?;
        self.pages.write_u64(files, Stage::Mapping, at, entry)?;
        if self.coding.entry_size() == 16 {
            self.pages
                .write_u64(files, Stage::Mapping, at + 8, bitmap)?;
        }
        Ok(())
    }

    /// Guest clusters that touch `range`, each as the range of that cluster.
    pub(crate) fn clusters(&self, range: ByteRange) -> impl Iterator<Item = u64> + use<> {
        let size = self.cluster_size();
        (range.offset & !(size - 1)..range.end()).step_by(size as usize)
    }
}
