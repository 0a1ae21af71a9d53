//! The crash checker: every point at which the power can fail.
//!
//! A workload runs once and its file effects are recorded in the host's order.
//! Then, for each effect, the image is rebuilt as a power cut there leaves it,
//!
//! ```text
//! ... flush | write  write  write | flush ...
//!   durable   any part of these     not yet
//! ```
//!
//! with the writes since the last flush in order (prefixes) and as arbitrary
//! subsets of their sectors; reopened with a fresh instance; read; checked; and
//! written to, which shows space that is counted wrong.
//!
//! What must hold: a byte that was flushed reads as flushed, or as something
//! written since; `check` finds no corruption (leaks are fine).

use super::disk::Disk;
use super::host::{MemoryHost, broken};
use super::model::{Op, apply};
use super::node::TestNode;
use super::random::Random;
use super::trace::{Event, Trace};
use crate::{ByteRange, Errno, Error, Repair, Result, WritableFormat};
use std::fmt;

/// An outside judge of a crashed image, e.g. `qemu-img check` on slot 0.
pub type Oracle<'a> = &'a mut dyn FnMut(&MemoryHost) -> std::result::Result<(), String>;

/// How thoroughly to check.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Names the samples.
    pub seed: u64,
    /// What a disk writes as one.
    pub sector_len: u64,
    /// Random subsets per run of writes between two flushes, beyond the
    /// prefixes. Runs of up to `exhaustive_max` sectors are tried wholly.
    pub samples: usize,
    /// See `samples`.
    pub exhaustive_max: u32,
    /// Ask the oracle about one image in this many.
    pub oracle_every: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 1,
            sector_len: 512,
            samples: 16,
            exhaustive_max: 5,
            oracle_every: 1,
        }
    }
}

/// What was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Writes, length changes and punches that the workload made.
    pub effects: usize,
    /// Flushes among them.
    pub flushes: usize,
    /// Images with a prefix of the effects.
    pub prefixes: usize,
    /// Images with a subset of the sectors since the last flush.
    pub subsets: usize,
    /// Images that the oracle judged.
    pub judged: usize,
    /// The most leaks that `check` found in one image.
    pub leaks_max: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            effects,
            flushes,
            prefixes,
            subsets,
            judged,
            leaks_max,
        } = self;
        write!(
            f,
            "{effects} effects, {flushes} flushes: {prefixes} prefixes, {subsets} subsets, \
             {judged} judged by the oracle, at most {leaks_max} leaks"
        )
    }
}

/// Run `ops` on an image of `host`, then cut the power everywhere.
pub fn check<T: WritableFormat>(
    host: MemoryHost,
    options: &str,
    ops: &[Op],
    config: &Config,
    oracle: Option<Oracle<'_>>,
) -> Result<Report> {
    let start: Vec<Disk> = disks(&host);
    let recording = record::<T>(host.clone(), options, ops)?;
    let mut checker = Checker::<T> {
        template: host,
        options,
        config,
        oracle,
        versions: &recording.versions,
        ops,
        report: Report::default(),
        random: Random::new(config.seed),
        image: std::marker::PhantomData,
    };
    checker.run(&start, &recording.trace)?;
    println!("crash checker: {}", checker.report);
    Ok(checker.report)
}

struct Recording {
    trace: Trace,
    /// Guest content before the first operation and after each.
    versions: Vec<Disk>,
}

fn record<T: WritableFormat>(mut host: MemoryHost, options: &str, ops: &[Op]) -> Result<Recording> {
    host.trace = Some(Trace::new());
    let mut node = TestNode::<T>::open(host, options)?;
    let mut model = node.read_all()?;
    let mut versions = vec![model.clone()];
    for (index, op) in ops.iter().enumerate() {
        node.host.record(Event::Begin(index));
        apply(&mut node, &mut model, op)
            .map_err(|e| Error::new(e.code, format!("Op {index} ({op}): {e}")))?;
        node.host.record(Event::End(index));
        versions.push(model.clone());
    }
    Ok(Recording {
        trace: node.host.trace.take().unwrap_or_default(),
        versions,
    })
}

/// The files of `host` in slot order: the image, then storage as it will be
/// granted.
fn disks(host: &MemoryHost) -> Vec<Disk> {
    let granted = host.files.iter().map(|file| file.disk.clone());
    granted
        .chain(host.offered.iter().map(|(_, disk)| disk.clone()))
        .collect()
}

struct Checker<'a, 'o, T> {
    template: MemoryHost,
    options: &'a str,
    config: &'a Config,
    oracle: Option<Oracle<'o>>,
    versions: &'a [Disk],
    ops: &'a [Op],
    report: Report,
    random: Random,
    image: std::marker::PhantomData<T>,
}

/// Which versions a crashed image may show.
#[derive(Clone, Copy)]
struct Window {
    /// Durable: the version after the last operation that flushed.
    from: usize,
    /// The newest that was begun.
    to: usize,
}

impl<T: WritableFormat> Checker<'_, '_, T> {
    fn run(&mut self, start: &[Disk], trace: &[Event]) -> Result<()> {
        let mut durable = start.to_vec();
        let mut pending: Vec<&Event> = Vec::new();
        let mut now = durable.clone();
        let mut window = Window { from: 0, to: 0 };
        let mut begun_since_flush = 0;
        self.prefix(&now, window)?;
        for event in trace {
            match event {
                Event::Begin(op) => window.to = op + 1,
                Event::End(op) => {
                    if matches!(self.ops[*op], Op::Flush | Op::Reopen) {
                        window.from = op + 1;
                    }
                }
                Event::Flush => {
                    self.report.flushes += 1;
                    self.subsets(&durable, &pending, window)?;
                    durable = now.clone();
                    pending.clear();
                    begun_since_flush = 0;
                }
                effect => {
                    self.report.effects += 1;
                    effect.apply(&mut now);
                    pending.push(effect);
                    begun_since_flush += 1;
                    self.prefix(&now, window)?;
                }
            }
        }
        if begun_since_flush > 0 {
            self.subsets(&durable, &pending, window)?;
        }
        Ok(())
    }

    fn prefix(&mut self, now: &[Disk], window: Window) -> Result<()> {
        self.report.prefixes += 1;
        let where_to = format!("after {} effects", self.report.effects);
        self.judge(now, window, &where_to)
    }

    /// Subsets of the sectors of `pending` over `durable`, in order.
    fn subsets(&mut self, durable: &[Disk], pending: &[&Event], window: Window) -> Result<()> {
        let sectors: Vec<Event> = pending
            .iter()
            .flat_map(|event| event.torn(self.config.sector_len))
            .collect();
        let all = sectors.len() as u32 <= self.config.exhaustive_max;
        let rounds = if all {
            1 << sectors.len()
        } else {
            self.config.samples
        };
        for round in 0..rounds {
            let mut disks = durable.to_vec();
            // Sometimes most sectors survive, sometimes few, sometimes half.
            let bias = 1 + self.random.below(7);
            for (index, sector) in sectors.iter().enumerate() {
                let kept = if all {
                    round >> index & 1 == 1
                } else {
                    self.random.below(8) < bias
                };
                if kept {
                    sector.apply(&mut disks);
                }
            }
            self.report.subsets += 1;
            let where_to = format!(
                "after {} effects, subset {round} of {} sectors (seed {})",
                self.report.effects,
                sectors.len(),
                self.config.seed
            );
            self.judge(&disks, window, &where_to)?;
        }
        Ok(())
    }

    fn judge(&mut self, disks: &[Disk], window: Window, where_to: &str) -> Result<()> {
        let named = |e: Error| Error::new(e.code, format!("Power cut {where_to}: {e}"));
        let host = self.host(disks);
        let images = self.report.prefixes + self.report.subsets;
        if let Some(oracle) = &mut self.oracle
            && images.is_multiple_of(self.config.oracle_every)
        {
            self.report.judged += 1;
            oracle(&host).map_err(|said| named(Error::io(said)))?;
        }
        let mut node = TestNode::<T>::open(host, self.options).map_err(named)?;
        let found = node.read_all().map_err(named)?;
        self.compare(&found, window).map_err(named)?;
        self.check(&mut node).map_err(named)?;
        self.write_on(node, found).map_err(named)
    }

    fn host(&self, disks: &[Disk]) -> MemoryHost {
        let mut host = self.template.clone();
        let mut disks = disks.iter();
        host.files.truncate(1);
        let granted = host.files.iter_mut().map(|file| &mut file.disk);
        let all = granted.chain(host.offered.iter_mut().map(|(_, disk)| disk));
        all.zip(&mut disks)
            .for_each(|(to, from)| *to = from.clone());
        host
    }

    /// Each byte is as flushed, or as in any version since.
    fn compare(&self, found: &Disk, window: Window) -> Result<()> {
        let versions = &self.versions[window.from..=window.to.max(window.from)];
        let fits = |v: &&Disk| v.len() == found.len();
        let Some(shortest) = versions.iter().map(Disk::len).min() else {
            return Ok(());
        };
        if versions.iter().find(fits).is_none() {
            return Err(broken(format!(
                "an image of {} bytes was never made",
                found.len()
            )));
        }
        let shared = shortest.min(found.len());
        let step = 4096;
        for at in (0..shared).step_by(step) {
            let range = ByteRange::new(at, (shared - at).min(step as u64));
            if versions
                .iter()
                .any(|version| !found.differs(version, range))
            {
                continue;
            }
            let len = range.len as usize;
            let all: Vec<Vec<u8>> = versions.iter().map(|v| v.read(at, len)).collect();
            for (index, byte) in found.read(at, len).into_iter().enumerate() {
                if !all.iter().any(|version| version[index] == byte) {
                    return Err(broken(format!(
                        "guest byte {} reads {byte:#04x}; flushed was {:#04x}",
                        at + index as u64,
                        all[0][index]
                    )));
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, node: &mut TestNode<T>) -> Result<()> {
        match node.check(Repair::default()) {
            Ok(report) if report.corruptions + report.check_errors > 0 => Err(broken(format!(
                "check finds {} corruptions: {:?}",
                report.corruptions, report.messages
            ))),
            Ok(report) => {
                self.report.leaks_max = self.report.leaks_max.max(report.leaks);
                Ok(())
            }
            Err(e) if e.code == Errno::Enotsup => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// New writes take free space: what is wrongly free gets damaged by them.
    fn write_on(&mut self, mut node: TestNode<T>, mut model: Disk) -> Result<()> {
        let cluster = u64::from(node.geometry().cluster_size);
        for _ in 0..3 {
            let at = self.random.below(model.len().max(1)) / cluster * cluster;
            let data = vec![0xee; cluster.min(model.len() - at) as usize];
            node.write(at, &data)?;
            model.write(at, &data);
        }
        node.reopen()?;
        let found = node.read_all()?;
        if found.differs(&model, ByteRange::new(0, model.len())) {
            return Err(broken("writing after the crash damaged other guest bytes"));
        }
        self.check(&mut node)
    }
}
