//! Consistency check and repair (`qemu-img check` is the oracle).
//!
//! ```text
//! for each window of host clusters:   fixed parts > L1 and L2 tables > bitmaps
//!     count every reference           > refcount table and blocks
//!     compare with what is stored     mend counts in place, or ask for a rebuild
//! rebuild, if asked for               count again, write new blocks and table
//! flags                               COPIED flags, and entries that point nowhere
//! ```
//!
//! A check runs in slices of bounded work; between slices its state lives in
//! the image value. Nobody may change the image meanwhile. Counts are kept for
//! [`counts::WINDOW_CLUSTERS`] clusters at a time, and a larger file is gone
//! through again for each window.
//!
//! Order of a repair, by stage: counts go up and new tables are written in
//! `prepare`; entries and the header follow in `mapping`. Counts go down in
//! `prepare` too: nothing refers to a leaked cluster, not even an entry that is
//! still to be mended, because such an entry names no cluster that can be used.
//!
//! In the report, `corruptions` and `leaks` are what was found; what is left is
//! the difference to `corruptions_fixed` and `leaks_fixed`.

mod bitmaps;
mod compare;
mod counts;
mod entry;
mod flags;
mod mapping;
mod rebuild;
mod refcounts;
mod report;
#[cfg(test)]
mod tests;

use outport_sdk::{CheckReport, Errno, Error, Files, Repair, Result, Stage, Txn};

use self::bitmaps::BitmapCursor;
use self::counts::{Counts, Kind, WINDOW_CLUSTERS};
use self::rebuild::Plan;
use crate::header::{Header, field, incompatible};
use crate::image::{Qcow2, read_header};
use crate::pages::{IMAGE, Pages};
use crate::release::Releases;
use crate::snapshot;
use crate::table::L2Coding;

/// Metadata that one slice reads: well under a second of work, and a cluster
/// table of 2 MiB always fits.
const SLICE_BYTES: u64 = 16 << 20;

/// Table entries read at a time where a table may be larger than a cluster.
const CHUNK_BYTES: u64 = 64 << 10;

/// L1 entries without a table that one step passes over.
const STEP_ENTRIES: u64 = 8192;

/// Pages of L1 tables and refcount blocks kept: 4 MiB.
const PAGES: usize = 1024;

/// One slice of a check (see the contract: `check`).
pub(crate) fn check_slice(
    image: &mut Qcow2,
    txn: &mut dyn Txn,
    fix: Repair,
    cursor: u64,
) -> Result<(CheckReport, Option<u64>)> {
    let mending = fix.leaks || fix.errors;
    if mending && !image.writable {
        return Err(Error::new(
            Errno::Erofs,
            "An image that is open read-only cannot be repaired",
        ));
    }
    if cursor == 0 {
        if mending && !image.reservations.is_empty() {
            return Err(Error::new(
                Errno::Ebusy,
                "Writes are in flight: repair the image later",
            ));
        }
        image.check = Some(Box::new(Check::start(txn.files(), fix, WINDOW_CLUSTERS)?));
        if mending {
            // From here on the counts are what is referred to: what was freed
            // before and comes back later is counted already.
            image.releases = Releases::default();
            image.releases.after_repair();
        }
    }
    // A slice that fails ends the check: its state is dropped with it.
    let running = image
        .check
        .take()
        .filter(|c| cursor == 0 || (c.examined, c.fix) == (cursor, fix));
    let Some(mut check) = running else {
        return Err(Error::invalid(format!(
            "No check stands at {cursor}: start again from 0"
        )));
    };
    let result = check.slice(txn);
    if check.wrote {
        // What the image has in memory is not what the file has.
        image.invalidate();
    }
    result?;
    if matches!(check.phase, Phase::Done) {
        return Ok((check.report, None));
    }
    let (report, next) = (check.report.clone(), check.examined);
    image.check = Some(check);
    Ok((report, Some(next)))
}

/// What the windows are gone through for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// Find what is wrong.
    Report,
    /// Write the reference counts anew.
    Rebuild,
}

/// What comes next.
#[derive(Debug)]
enum Phase {
    Fixed,
    /// L1 entry `index` of table `table`.
    Mapping {
        table: usize,
        index: u64,
    },
    Bitmaps(BitmapCursor),
    /// Entry `index` of the refcount table.
    Refcounts {
        index: u64,
    },
    /// Refcount block `index`.
    Compare {
        index: u64,
    },
    /// New refcount block `index`.
    Blocks {
        index: u64,
    },
    Table,
    Flags {
        table: usize,
        index: u64,
    },
    Finish,
    Done,
}

/// An L1 table.
#[derive(Clone, Copy, Debug)]
struct L1 {
    offset: u64,
    entries: u64,
    active: bool,
}

/// A check between two slices.
#[derive(Debug)]
pub(crate) struct Check {
    header: Header,
    coding: L2Coding,
    fix: Repair,
    file_len: u64,
    /// Clusters of the file, the last one perhaps in part.
    clusters: u64,
    /// The active table, then those of the snapshots.
    tables: Vec<L1>,
    snapshot_table_len: u64,
    round: Round,
    phase: Phase,
    counts: Counts,
    /// Clusters counted at a time.
    window: u64,
    /// L2 tables in clusters that also hold something else; sorted.
    shared_tables: Vec<u64>,
    /// Clusters that hold a table and something else, still to be reported.
    mixed: Vec<u64>,
    /// What a rebuild needs to know; `plan.wanted` says that there will be one.
    plan: Plan,
    pages: Pages,
    report: CheckReport,
    /// Metadata bytes read so far: the cursor.
    examined: u64,
    wrote: bool,
}

impl Check {
    /// `window` is a multiple of what a refcount block counts.
    fn start(files: &dyn Files, fix: Repair, window: u64) -> Result<Self> {
        let header = read_header(files)?;
        let (snapshots, snapshot_table_len) = snapshot::read_table(files, &header)?;
        let file_len = files.size(IMAGE)?;
        let clusters = file_len.div_ceil(header.cluster_size());
        let active = L1 {
            offset: header.l1_offset,
            entries: u64::from(header.l1_size),
            active: true,
        };
        let inactive = snapshots.iter().map(|snapshot| L1 {
            offset: snapshot.l1_offset,
            entries: u64::from(snapshot.l1_size),
            active: false,
        });
        Ok(Self {
            coding: L2Coding::new(&header),
            fix,
            file_len,
            clusters,
            tables: std::iter::once(active).chain(inactive).collect(),
            snapshot_table_len,
            round: Round::Report,
            phase: Phase::Fixed,
            counts: Counts::new(
                0,
                window.min(clusters.saturating_add(1)),
                header.refcount_order,
            ),
            window,
            shared_tables: Vec::new(),
            mixed: Vec::new(),
            plan: Plan::default(),
            pages: Pages::new(header.cluster_size(), PAGES),
            report: CheckReport {
                total_clusters: header.size.div_ceil(header.cluster_size()),
                ..CheckReport::default()
            },
            examined: 0,
            wrote: false,
            header,
        })
    }

    fn slice(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let start = self.examined;
        self.wrote = false;
        while !matches!(self.phase, Phase::Done) && self.examined - start < SLICE_BYTES {
            // Every step counts, so that the cursor moves and a slice ends.
            self.examined += 64;
            self.step(txn)?;
        }
        Ok(())
    }

    fn step(&mut self, txn: &mut dyn Txn) -> Result<()> {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Done) {
            Phase::Fixed => {
                self.count_fixed();
                Phase::Mapping { table: 0, index: 0 }
            }
            Phase::Mapping { table, index } => self.count_l1(txn.files(), table, index)?,
            Phase::Bitmaps(cursor) => self.count_bitmaps(txn.files(), cursor)?,
            Phase::Refcounts { index } => self.count_refcounts(txn.files(), index)?,
            Phase::Compare { index } => self.compare_block(txn, index)?,
            Phase::Blocks { index } => self.write_block(txn, index)?,
            Phase::Table => self.write_table(txn)?,
            Phase::Flags { table, index } => self.check_flags(txn, table, index)?,
            Phase::Finish => {
                self.finish(txn)?;
                Phase::Done
            }
            Phase::Done => Phase::Done,
        };
        Ok(())
    }

    /// After the last reference of a window: compare it, or write it anew.
    fn counted(&self) -> Phase {
        let first_block = self.counts.first() / self.entries_per_block();
        match self.round {
            Round::Report => Phase::Refcounts { index: 0 },
            Round::Rebuild => Phase::Blocks { index: first_block },
        }
    }

    /// The next window, if there is one.
    fn next_window(&mut self) -> Option<Phase> {
        let next = self.counts.first().checked_add(self.window)?;
        (next <= self.clusters).then(|| self.start_window(next))
    }

    /// Count the clusters from `first` on. A compressed cluster may reach one
    /// cluster past the end of the file.
    fn start_window(&mut self, first: u64) -> Phase {
        let end = self
            .clusters
            .saturating_add(1)
            .min(first.saturating_add(self.window));
        self.counts = Counts::new(first, end, self.header.refcount_order);
        Phase::Fixed
    }

    /// The header and the tables that it names.
    fn count_fixed(&mut self) {
        self.count(0, self.header.cluster_size(), Kind::Other);
        self.count(
            self.header.snapshots_offset,
            self.snapshot_table_len,
            Kind::Other,
        );
    }

    /// Count the clusters of a range once more. A range past the end of the file
    /// is damage, and is not counted.
    fn count(&mut self, offset: u64, len: u64, kind: Kind) -> bool {
        if len == 0 {
            return true;
        }
        if self.exceeds(offset, len) {
            self.found(1, || entry::exceeding(offset, len));
            return false;
        }
        let last = (offset + (len - 1)) >> self.header.cluster_bits;
        for cluster in offset >> self.header.cluster_bits..=last {
            if !self.counts.add(cluster, kind) && self.round == Round::Report {
                let offset = cluster << self.header.cluster_bits;
                let bits = self.header.refcount_bits();
                self.corruption(0, || {
                    format!(
                        "ERROR: overflow cluster offset={offset:#x}: more references than a \
                         refcount of {bits} bits can hold"
                    )
                });
            }
        }
        true
    }

    /// The range ends a cluster or more past the end of the file.
    fn exceeds(&self, offset: u64, len: u64) -> bool {
        entry::exceeds(self.file_len, self.header.cluster_bits, offset, len)
    }

    fn finish(&mut self, txn: &mut dyn Txn) -> Result<()> {
        let left = self
            .report
            .corruptions
            .saturating_sub(self.report.corruptions_fixed)
            + self.report.leaks.saturating_sub(self.report.leaks_fixed)
            + self.report.check_errors;
        let bits = incompatible::DIRTY | incompatible::CORRUPT;
        let repaired = self.fix.errors && left == 0 && self.header.version >= 3;
        if repaired && self.header.incompatible & bits != 0 {
            let incompatible = self.header.incompatible & !bits;
            txn.write(
                IMAGE,
                Stage::Mapping,
                field::INCOMPATIBLE,
                &incompatible.to_be_bytes(),
            )?;
            self.wrote = true;
        }
        Ok(())
    }
}
