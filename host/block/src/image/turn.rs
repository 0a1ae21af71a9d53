//! Batching of plugin calls: everyone who waits at the same time shares one
//! crossing into the sandbox.
//!
//! Requesters queue their intents and commits. The first of them starts the
//! leader, a task of its own that runs after the requests of this loop turn
//! have queued theirs too, takes the plugin lock and calls the plugin with all
//! of it. The leader belongs to nobody: a requester that goes away takes
//! nothing along, and none serves the others at the cost of its own reply.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::engine::background;
use crate::format::{
    Extent, Fault, FaultKind, FormatError, Location, Placement, WriteIntent, WriteKind,
};
use crate::{ByteRange, Errno};

use super::ask::Tries;
use super::verify::{Claims, Pending, Verifier};
use super::{Image, ImageState, Plugin};

/// Intents per `prepare-write` call, and commits per `commit-write` call:
/// deeper queues are common nowhere.
const BATCH_MAX: usize = 128;

/// Space for one intent.
#[derive(Debug)]
pub(super) struct Prepared {
    /// With each: was the target never written, so that it reads as zeroes?
    pub(super) placements: Vec<(Placement, bool)>,
    /// The instance that knows the tokens.
    pub(super) generation: u64,
}

/// Why a commit was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Uncommitted {
    /// The reservation died with the instance that made it: start over.
    Stale,
    /// For this reason.
    Failed(Errno),
}

type PrepareReply = oneshot::Sender<Result<Prepared, Errno>>;
type CommitReply = oneshot::Sender<Result<(), Uncommitted>>;

struct Commit {
    placements: Vec<Placement>,
    generation: u64,
    reply: CommitReply,
}

#[derive(Default)]
struct Queue {
    prepares: Vec<(WriteIntent, PrepareReply)>,
    commits: Vec<Commit>,
    has_leader: bool,
}

/// The queue of one image.
#[derive(Default)]
pub(super) struct Turn(Mutex<Queue>);

impl Turn {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// If the leader panics, whoever waits gets an error instead of waiting for
/// ever, and the next one starts a new leader.
struct Leader<'a>(&'a Turn);

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        if std::thread::panicking() {
            queue.has_leader = false;
            queue.prepares.clear();
            queue.commits.clear();
        }
    }
}

impl Image {
    /// Reserve space for a front part of the intent.
    pub(super) async fn prepare(self: &Arc<Self>, intent: WriteIntent) -> Result<Prepared, Errno> {
        let (reply, answer) = oneshot::channel();
        self.enter_queue(|queue| queue.prepares.push((intent, reply)));
        answer.await.unwrap_or(Err(Errno::Io))
    }

    /// The payload of these placements is written: point at it.
    pub(super) async fn commit(
        self: &Arc<Self>,
        placements: Vec<Placement>,
        generation: u64,
    ) -> Result<(), Uncommitted> {
        let (reply, answer) = oneshot::channel();
        let commit = Commit {
            placements,
            generation,
            reply,
        };
        self.enter_queue(|queue| queue.commits.push(commit));
        answer.await.unwrap_or(Err(Uncommitted::Failed(Errno::Io)))
    }

    fn enter_queue(self: &Arc<Self>, enter: impl FnOnce(&mut Queue)) {
        let lead = {
            let mut queue = self.turn.queue();
            enter(&mut queue);
            !std::mem::replace(&mut queue.has_leader, true)
        };
        if lead {
            let image = self.clone();
            background::spawn(async move { image.lead().await });
        }
    }

    async fn lead(&self) {
        let _leader = Leader(&self.turn);
        loop {
            let mut plugin = self.plugin.lock().await;
            let (prepares, commits) = {
                let mut queue = self.turn.queue();
                if queue.prepares.is_empty() && queue.commits.is_empty() {
                    queue.has_leader = false;
                    return;
                }
                let n = queue.prepares.len().min(BATCH_MAX);
                let m = queue.commits.len().min(BATCH_MAX);
                let prepares: Vec<_> = queue.prepares.drain(..n).collect();
                let commits: Vec<_> = queue.commits.drain(..m).collect();
                (prepares, commits)
            };
            if !commits.is_empty() {
                self.commit_batch(&mut plugin, commits).await;
            }
            if !prepares.is_empty() {
                self.prepare_batch(&mut plugin, prepares).await;
            }
        }
    }

    // === prepare ===

    async fn prepare_batch(&self, plugin: &mut Plugin, batch: Vec<(WriteIntent, PrepareReply)>) {
        let intents: Vec<WriteIntent> = batch.iter().map(|(i, _)| *i).collect();
        let mut result = self.prepare_call(plugin, &intents).await;
        for (index, (intent, reply)) in batch.into_iter().enumerate() {
            let answer = match &mut result {
                Err(e) => Err(*e),
                Ok(prepared) => {
                    let placements: Vec<_> = prepared
                        .placements
                        .extract_if(.., |(p, _)| p.intent as usize == index)
                        .collect();
                    if placements.is_empty() {
                        // The plugin placed others first: ask again alone.
                        self.prepare_call(plugin, &[intent]).await
                    } else {
                        Ok(Prepared {
                            placements,
                            generation: prepared.generation,
                        })
                    }
                }
            };
            if let Err(Ok(unwanted)) = reply.send(answer) {
                let placements: Vec<_> = unwanted.placements.iter().map(|(p, _)| *p).collect();
                self.abort_inside(plugin, &placements, unwanted.generation)
                    .await;
            }
        }
    }

    /// One `prepare-write`, verified.
    async fn prepare_call(
        &self,
        plugin: &mut Plugin,
        intents: &[WriteIntent],
    ) -> Result<Prepared, Errno> {
        let prepare = self.ask(
            plugin,
            Tries::Twice,
            |f| f.prepare_write(intents.to_vec()),
            |plugin: &Plugin, placements: &Vec<Placement>, pending: &Pending| {
                // Of this instance: a fresh one may count from the start.
                let is_taken = |token| plugin.reserved.contains_key(&token);
                self.check_room(intents, placements)?;
                plugin
                    .verifier
                    .placements(intents, placements, pending, &is_taken)
            },
        );
        let placements = prepare.await.map_err(|e| e.errno())?;
        if placements.is_empty() {
            return Err(Errno::NoSpc);
        }
        let mut out = Vec::with_capacity(placements.len());
        for p in placements {
            let end = p.offset + p.covers.len();
            let before = self.files.extend_reach(p.slot, end);
            plugin.spare(p.slot, end);
            plugin.reserved.insert(p.token, p);
            out.push((p, p.offset >= before));
        }
        Ok(Prepared {
            placements: out,
            generation: plugin.generation,
        })
    }

    /// Space past where a file can get is none: a format that needs more asks for it.
    fn check_room(&self, intents: &[WriteIntent], placements: &[Placement]) -> Result<(), Fault> {
        for p in placements {
            let len = match intents.get(p.intent as usize) {
                Some(intent) if intent.kind == WriteKind::Compressed => intent.stored_len.into(),
                _ => p.covers.len(),
            };
            if !self.files.holds(p.slot, p.offset.saturating_add(len)) {
                return Err(Fault {
                    kind: FaultKind::BadExtent,
                    message: format!("placement {p:?} is past the end of its file"),
                });
            }
        }
        Ok(())
    }

    // === commit ===

    async fn commit_batch(&self, plugin: &mut Plugin, batch: Vec<Commit>) {
        // Replaced now, not in the middle: the tokens would mean nothing to it.
        let ready = self.ensure_instance(plugin).await;
        let (current, stale): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|c| ready.is_ok() && c.generation == plugin.generation);
        for commit in stale {
            self.let_go(plugin, &commit.placements);
            let _ = commit.reply.send(Err(Uncommitted::Stale));
        }
        if current.is_empty() {
            return;
        }
        let placements: Vec<Placement> = current
            .iter()
            .flat_map(|c| c.placements.iter().copied())
            .collect();
        let result = self.commit_call(plugin, &placements).await;
        for commit in current {
            let _ = commit.reply.send(result.map_err(Uncommitted::Failed));
        }
    }

    async fn commit_call(
        &self,
        plugin: &mut Plugin,
        placements: &[Placement],
    ) -> Result<(), Errno> {
        let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
        let generation = plugin.generation;
        let commit = self.ask(
            plugin,
            Tries::Once,
            |f| f.commit_write(tokens.clone()),
            |plugin: &Plugin, extents: &Vec<Extent>, pending: &Pending| {
                self.check_commit(&plugin.verifier, placements, extents, pending)
            },
        );
        let committed = commit.await;
        for p in placements {
            plugin.reserved.remove(&p.token);
        }
        match committed {
            Ok(extents) => {
                self.files.note_short(false);
                for extent in &extents {
                    self.remember(plugin, extent.range, std::slice::from_ref(extent));
                }
                Ok(())
            }
            Err(e) => {
                self.let_go(plugin, placements);
                let broke = plugin.generation != generation && !is_want_of_space(&e);
                if broke {
                    // It did not say no, it broke: what of the image it holds
                    // in memory only is not known to be in the file.
                    self.files.set_state(ImageState::WritesRefused);
                }
                Err(e.errno())
            }
        }
    }

    /// The extents must say that the placements are where they were written, all
    /// of them and nothing else.
    fn check_commit(
        &self,
        verifier: &Verifier,
        placements: &[Placement],
        extents: &[Extent],
        pending: &Pending,
    ) -> Result<Claims, Fault> {
        let bad = |message: String| Fault {
            kind: FaultKind::BadExtent,
            message,
        };
        let mut claims = Claims::default();
        let mut covered = 0;
        let mut ranges: Vec<ByteRange> = extents.iter().map(|e| e.range).collect();
        ranges.sort_unstable_by_key(|range| range.offset());
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].overlaps(pair[1])) {
            return Err(bad(format!("{:?} is mapped twice", pair[1])));
        }
        for extent in extents {
            let honest = is_where_written(placements, extent);
            if !honest {
                return Err(bad(format!(
                    "{extent:?} is not where the payload was written"
                )));
            }
            covered += extent.range.len();
            let near = self.map.near(extent.range);
            let one = std::slice::from_ref(extent);
            let reach = |slot| self.files.reach(slot);
            claims.join(verifier.extents(extent.range, one, near, pending, &reach)?);
        }
        let placed: u64 = placements.iter().map(|p| p.covers.len()).sum();
        if covered != placed {
            return Err(bad(format!(
                "{covered} bytes are mapped of {placed} that were committed"
            )));
        }
        Ok(claims)
    }

    /// Verified extents go into the map; what it evicts for them is owned no
    /// more.
    pub(super) fn remember(&self, plugin: &mut Plugin, asked: ByteRange, extents: &[Extent]) {
        let verifier = &mut plugin.verifier;
        for extent in extents {
            // A cluster that the file's end cuts may be written to its own end.
            if let Location::Raw {
                slot,
                offset,
                in_place: true,
            } = extent.at
            {
                self.files.extend_reach(slot, offset + extent.range.len());
            }
        }
        self.map.insert(extents, asked, &mut |slot, file| {
            verifier.disown(slot, file);
        });
    }

    // === abort ===

    /// Give reservations back.
    pub(super) async fn abort(&self, placements: &[Placement], generation: u64) {
        let mut plugin = self.plugin.lock().await;
        self.abort_inside(&mut plugin, placements, generation).await;
    }

    /// Errors are the plugin's own affair: the space leaks.
    async fn abort_inside(&self, plugin: &mut Plugin, placements: &[Placement], generation: u64) {
        self.let_go(plugin, placements);
        if plugin.generation != generation || plugin.instance.is_none() {
            return;
        }
        let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
        for token in &tokens {
            plugin.reserved.remove(token);
        }
        let abort = self.ask(
            plugin,
            Tries::Once,
            |f| f.abort_write(tokens.clone()),
            |_, (), _| Ok(Claims::default()),
        );
        let _ = abort.await;
    }

    /// Nobody writes to these placements any more.
    fn let_go(&self, plugin: &mut Plugin, placements: &[Placement]) {
        for p in placements {
            let file = ByteRange::between(p.offset, p.offset + p.covers.len());
            plugin.verifier.disown(p.slot, file);
        }
    }
}

/// Did the host find no room for what the commit queued? Nothing of it happened then, and all that
/// was committed before is in the overlay: a fresh instance goes on from there.
fn is_want_of_space(error: &FormatError) -> bool {
    matches!(
        error,
        FormatError::Refused {
            code: Errno::NoSpc,
            ..
        }
    )
}

/// Does every byte of the extent live where its placement put it? Neighbours may
/// be told as one extent.
fn is_where_written(placements: &[Placement], extent: &Extent) -> bool {
    let mut at = extent.range.offset();
    while at < extent.range.end() {
        let here = |p: &&Placement| (p.covers.offset()..p.covers.end()).contains(&at);
        let Some(p) = placements.iter().find(here) else {
            return false;
        };
        let told = match extent.at {
            Location::Raw { slot, offset, .. } => {
                let told = offset + (at - extent.range.offset());
                slot == p.slot && told == p.offset + (at - p.covers.offset())
            }
            Location::Coded(c) => {
                c.slot == p.slot && c.offset == p.offset && p.covers.contains(extent.range)
            }
            _ => false,
        };
        if !told {
            return false;
        }
        at = p.covers.end();
    }
    true
}
