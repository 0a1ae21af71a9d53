//! Batching of plugin calls: everyone who waits at the same time shares one
//! crossing into the sandbox.
//!
//! Requesters queue their intents and commits; the first of them becomes the
//! leader, lets the others queue too, takes the plugin lock and calls the
//! plugin with all of it.

use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::format::{Extent, FormatError, Location, Placement, WriteIntent, WriteKind};
use crate::{ByteRange, Errno};

use super::{Image, ImageState, Plugin};

/// Intents per `prepare-write` call: deeper queues are common nowhere.
const BATCH_MAX: usize = 128;

/// Placements and the instance generation that knows them.
pub(super) struct Prepared {
    pub(super) placements: Vec<(Placement, bool)>,
    pub(super) generation: u64,
}

type PrepareReply = oneshot::Sender<Result<Prepared, Errno>>;
type CommitReply = oneshot::Sender<Result<(), Errno>>;

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

/// Steps down when the leader is done or dropped; whoever waited then gets an
/// error instead of waiting for ever.
struct Leader<'a>(&'a Turn);

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.has_leader = false;
        queue.prepares.clear();
        queue.commits.clear();
    }
}

impl Image {
    /// Reserve space for a front part of the intent.
    pub(super) async fn prepare(&self, intent: WriteIntent) -> Result<Prepared, Errno> {
        let (reply, answer) = oneshot::channel();
        let lead = {
            let mut queue = self.turn.queue();
            queue.prepares.push((intent, reply));
            !std::mem::replace(&mut queue.has_leader, true)
        };
        if lead {
            self.lead().await;
        }
        answer.await.unwrap_or(Err(Errno::Canceled))
    }

    /// The payload of these placements is written: point at it.
    pub(super) async fn commit(
        &self,
        placements: Vec<Placement>,
        generation: u64,
    ) -> Result<(), Errno> {
        let (reply, answer) = oneshot::channel();
        let lead = {
            let mut queue = self.turn.queue();
            queue.commits.push(Commit {
                placements,
                generation,
                reply,
            });
            !std::mem::replace(&mut queue.has_leader, true)
        };
        if lead {
            self.lead().await;
        }
        answer.await.unwrap_or(Err(Errno::Canceled))
    }

    async fn lead(&self) {
        let leader = Leader(&self.turn);
        // The other requests of this loop turn queue theirs first.
        tokio::task::yield_now().await;
        loop {
            let mut plugin = self.plugin.lock().await;
            let (prepares, commits) = {
                let mut queue = self.turn.queue();
                if queue.prepares.is_empty() && queue.commits.is_empty() {
                    queue.has_leader = false;
                    std::mem::forget(leader);
                    return;
                }
                let n = queue.prepares.len().min(BATCH_MAX);
                let prepares: Vec<_> = queue.prepares.drain(..n).collect();
                (prepares, std::mem::take(&mut queue.commits))
            };
            if !commits.is_empty() {
                self.commit_batch(&mut plugin, commits).await;
            }
            if !prepares.is_empty() {
                self.prepare_batch(&mut plugin, prepares).await;
            }
        }
    }

    async fn prepare_batch(&self, plugin: &mut Plugin, batch: Vec<(WriteIntent, PrepareReply)>) {
        let intents: Vec<WriteIntent> = batch.iter().map(|(i, _)| *i).collect();
        let result = self.prepare_call(plugin, &intents).await;
        let generation = plugin.generation;
        match result {
            Err(e) => {
                for (_, reply) in batch {
                    let _ = reply.send(Err(e));
                }
            }
            Ok(mut placed) => {
                for (index, (intent, reply)) in batch.into_iter().enumerate() {
                    let mine: Vec<_> = placed
                        .extract_if(.., |(p, _)| p.intent as usize == index)
                        .collect();
                    let answer = if mine.is_empty() {
                        // The plugin placed others first: ask again alone.
                        match self.prepare_call(plugin, &[intent]).await {
                            Ok(placements) => Ok(Prepared {
                                placements,
                                generation,
                            }),
                            Err(e) => Err(e),
                        }
                    } else {
                        Ok(Prepared {
                            placements: mine,
                            generation,
                        })
                    };
                    let _ = reply.send(answer);
                }
            }
        }
    }

    /// One `prepare-write`, verified; the flag says that the target was never
    /// written and reads as zeroes.
    async fn prepare_call(
        &self,
        plugin: &mut Plugin,
        intents: &[WriteIntent],
    ) -> Result<Vec<(Placement, bool)>, Errno> {
        let list = intents.to_vec();
        let call = self.call(plugin, |f| f.prepare_write(list.clone())).await;
        let placed = match call {
            Ok(call) => self.apply(plugin, call).await,
            Err(e) => Err(e),
        };
        let placements = placed.map_err(|e| e.errno())?;
        if placements.is_empty() {
            return Err(Errno::NoSpc);
        }
        let mut out = Vec::with_capacity(placements.len());
        for p in placements {
            if let Err(fault) = self.check_placement(plugin, intents, &p) {
                self.faulted(plugin, &fault);
                return Err(Errno::Io);
            }
            let before = self.files.extend_reach(p.slot, p.offset + p.covers.len());
            plugin.reserved.insert(p.token, p);
            out.push((p, p.offset >= before));
        }
        Ok(out)
    }

    fn check_placement(
        &self,
        plugin: &mut Plugin,
        intents: &[WriteIntent],
        p: &Placement,
    ) -> Result<(), crate::format::Fault> {
        use crate::format::{Fault, FaultKind};
        let bad = |message: String| Fault {
            kind: FaultKind::BadExtent,
            message,
        };
        let Some(intent) = intents.get(p.intent as usize) else {
            return Err(bad(format!(
                "placement for intent {} of {}",
                p.intent,
                intents.len()
            )));
        };
        let locked = intent
            .range
            .align_out(u64::from(self.geometry.cluster_size));
        if !locked.contains(p.covers) || !p.covers.overlaps(intent.range) {
            return Err(bad(format!(
                "placement covers {:?}, the intent was {:?}",
                p.covers, intent.range
            )));
        }
        if plugin.reserved.contains_key(&p.token) {
            return Err(bad(format!("token {} was given out twice", p.token)));
        }
        match intent.kind {
            WriteKind::Compressed => Ok(()),
            WriteKind::Data => match &mut plugin.verifier {
                Some(verifier) => verifier.placement(p),
                None => Ok(()),
            },
        }
    }

    async fn commit_batch(&self, plugin: &mut Plugin, batch: Vec<Commit>) {
        let (current, stale): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|c| c.generation == plugin.generation);
        for commit in stale {
            // Its reservation died with the instance that made it.
            let _ = commit.reply.send(Err(Errno::Io));
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
            let _ = commit.reply.send(result);
        }
    }

    async fn commit_call(
        &self,
        plugin: &mut Plugin,
        placements: &[Placement],
    ) -> Result<(), Errno> {
        let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
        let call = self.call_once(plugin, |f| f.commit_write(tokens.clone()));
        let committed = match call.await {
            Ok(call) => self.apply(plugin, call).await,
            Err(e) => Err(e),
        };
        let extents = match committed {
            Ok(extents) => extents,
            Err(e) => {
                if matches!(e, FormatError::Fault(_)) {
                    self.set_state(ImageState::WritesRefused);
                }
                return Err(e.errno());
            }
        };
        for p in placements {
            plugin.reserved.remove(&p.token);
        }
        if let Err(fault) = self.take_extents(plugin, placements, &extents) {
            self.faulted(plugin, &fault);
            self.set_state(ImageState::WritesRefused);
            return Err(Errno::Io);
        }
        Ok(())
    }

    /// The extents of a commit replace what the map had for their ranges.
    fn take_extents(
        &self,
        plugin: &mut Plugin,
        placements: &[Placement],
        extents: &[Extent],
    ) -> Result<(), crate::format::Fault> {
        use crate::format::{Fault, FaultKind};
        for extent in extents {
            let home = placements.iter().find(|p| p.covers.contains(extent.range));
            let honest = home.is_some_and(|p| match extent.at {
                Location::Raw { slot, offset, .. } => {
                    slot == p.slot
                        && offset == p.offset + (extent.range.offset() - p.covers.offset())
                }
                Location::Coded(c) => c.slot == p.slot && c.offset == p.offset,
                _ => false,
            });
            if !honest {
                let message = format!("{extent:?} is not where the payload was written");
                return Err(Fault {
                    kind: FaultKind::BadExtent,
                    message,
                });
            }
            self.insert(plugin, extent.range, std::slice::from_ref(extent))?;
        }
        Ok(())
    }

    /// Verify extents and put them into the map.
    pub(super) fn insert(
        &self,
        plugin: &mut Plugin,
        asked: ByteRange,
        extents: &[Extent],
    ) -> Result<(), crate::format::Fault> {
        let Some(verifier) = plugin.verifier.as_mut() else {
            return Ok(());
        };
        verifier.extents(asked, extents, &|slot| self.files.reach(slot))?;
        self.map.insert(extents, asked, |gone| verifier.evict(gone));
        Ok(())
    }

    /// Give reservations back; errors are the plugin's own affair.
    pub(super) async fn abort(&self, placements: &[Placement], generation: u64) {
        let mut plugin = self.plugin.lock().await;
        if plugin.generation != generation {
            return;
        }
        let tokens: Vec<u64> = placements.iter().map(|p| p.token).collect();
        for p in placements {
            plugin.reserved.remove(&p.token);
            if let Some(verifier) = &mut plugin.verifier {
                let file = ByteRange::between(p.offset, p.offset + p.covers.len());
                verifier.disown(p.slot, file);
            }
        }
        let call = self.call_once(&mut plugin, |f| f.abort_write(tokens.clone()));
        if let Ok(call) = call.await {
            let _ = self.apply(&mut plugin, call).await;
        }
    }
}
