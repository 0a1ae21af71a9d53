//! What a front-end has negotiated, and what its messages do.
//!
//! One task per front-end, on the first iothread of its export; it owns no ring, the workers do.
//! Whatever needs a quiet ring is asked of its worker and waited for. Invariant: a message that is
//! refused changes nothing. It is answered with a number that is not zero if an answer was asked
//! for; otherwise the connection ends, since the front-end believes that the message took effect.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use outport_block::Errno;
use rustix::fs::MemfdFlags;
use rustix::net::SendFlags;
use tokio::sync::{mpsc, oneshot};
use vhost::vhost_user::message::{BackendReq, VhostUserProtocolFeatures as Protocol};

use super::config::{self, CONFIG, Features};
use super::connection::{Message, Reply};
use super::dirty::DirtyLog;
use super::limits::{INFLIGHT_BYTES_MAX, QUEUES_REACHABLE, REGIONS_MAX};
use super::memory::{Area, Memory, Region};
use super::ring::{Ring, Setup, bytes_per_queue};
use super::wire::{self, BadMessage, Inflight, RegionInfo, Request, RingAddress};
use super::worker::{Command, Shared, Start};

/// What of the protocol is offered.
fn protocol_features() -> Protocol {
    Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
}

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("{0}")]
    Message(#[from] BadMessage),
    #[error("features {0:#x} that were not offered")]
    Features(u64),
    #[error("queue {0} does not exist")]
    Queue(u32),
    #[error("a ring of {0} entries")]
    Size(u32),
    #[error("queue {0} runs")]
    Runs(u32),
    #[error("{0}: {1}")]
    Failed(&'static str, Errno),
    #[error("{0}")]
    Wrong(&'static str),
    #[error("the data thread has ended")]
    Gone,
}

/// One queue, as it was told.
#[derive(Debug, Default)]
struct Queue {
    setup: Setup,
    address: Option<RingAddress>,
    /// Started by this message: with a descriptor or without.
    kick: Option<Option<OwnedFd>>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// What the front-end was told when the queue stopped.
    told_base: Option<u32>,
    enabled: bool,
    running: bool,
}

/// A region to track requests in.
#[derive(Debug)]
struct Tracking {
    area: Area,
    queues: u16,
    bytes_per_queue: u64,
}

/// The session of one front-end.
pub(super) struct Session {
    shared: Arc<Shared>,
    workers: Vec<mpsc::UnboundedSender<Command>>,
    queue_size_max: u16,
    features: Features,
    /// The cache mode that the guest chose, or the export's. It stays when the device is reset:
    /// front-ends remember what they were told last and would tell the next driver that.
    writeback: bool,
    protocol: Protocol,
    queues: Vec<Queue>,
    memory: Arc<Memory>,
    tracking: Option<Tracking>,
    log: Option<Arc<DirtyLog>>,
    channel: Option<OwnedFd>,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        workers: Vec<mpsc::UnboundedSender<Command>>,
        queue_size_max: u16,
    ) -> Self {
        let reachable = shared.shape.queues.min(QUEUES_REACHABLE);
        let writeback = !shared.user.export().options().writethrough;
        Self {
            shared,
            workers,
            queue_size_max,
            features: Features::empty(),
            writeback,
            protocol: Protocol::empty(),
            queues: (0..reachable).map(|_| Queue::default()).collect(),
            memory: Arc::default(),
            tracking: None,
            log: None,
            channel: None,
        }
    }

    /// Carry a message out. `None`: there is nothing to answer.
    ///
    /// # Errors
    /// It was refused, and no answer was asked for.
    pub(super) async fn handle(&mut self, message: Message) -> Result<Option<Reply>, Refused> {
        let header = message.header;
        let parsed = wire::parse(header, &message.payload, message.fds.len());
        let had_acks = self.acks();
        let result = match parsed {
            Ok(request) => self.carry_out(header.request, request, message.fds).await,
            Err(e) => Err(e.into()),
        };
        let ack = |value| {
            let bytes = wire::reply_u64(header.request, value);
            Some(Reply { bytes, fd: None })
        };
        // Front-ends may ask for an answer to the very message that says that they can.
        let asked = header.need_reply && (had_acks || self.acks());
        match result {
            Ok(Some(reply)) => Ok(Some(reply)),
            Ok(None) if asked => Ok(ack(0)),
            Ok(None) => Ok(None),
            Err(refused) if asked => {
                let export = self.shared.user.export().id();
                tracing::info!(export, request = header.request, reason = %refused, "refused");
                Ok(ack(1))
            }
            Err(refused) => Err(refused),
        }
    }

    fn acks(&self) -> bool {
        self.protocol.contains(Protocol::REPLY_ACK)
    }

    async fn carry_out(
        &mut self,
        code: u32,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Reply>, Refused> {
        let number = |value| {
            let bytes = wire::reply_u64(code, value);
            Ok(Some(Reply { bytes, fd: None }))
        };
        let bytes = |payload: &[u8]| {
            let bytes = wire::reply(code, payload);
            Ok(Some(Reply { bytes, fd: None }))
        };
        let mut fds = fds.into_iter();
        match request {
            Request::GetFeatures => return number(self.offered().bits()),
            Request::GetProtocolFeatures => return number(protocol_features().bits()),
            Request::GetQueueNum => return number(self.shared.shape.queues.into()),
            Request::GetMaxMemSlots => return number(REGIONS_MAX as u64),
            Request::SetFeatures(bits) => self.set_features(bits).await?,
            Request::SetProtocolFeatures(bits) => {
                let features =
                    Protocol::from_bits(bits).filter(|it| protocol_features().contains(*it));
                self.protocol = features.ok_or(Refused::Features(bits))?;
            }
            // Nobody needs them.
            Request::SetOwner | Request::SetLogFd => {}
            Request::ResetOwner | Request::ResetDevice => self.reset().await?,
            Request::SetMemTable(regions) => self.set_table(&regions, fds).await?,
            Request::AddMemReg(info) => self.add_region(info, fds.next()).await?,
            Request::RemMemReg(info) => {
                let memory = self.memory.without(info);
                let memory = memory.map_err(|e| Refused::Failed("no such region", e))?;
                self.replace_memory(memory, true).await?;
            }
            Request::SetLogBase { size, offset } => {
                let fd = fds.next().ok_or(Refused::Wrong("no log"))?;
                let log = DirtyLog::map(fd, offset, size);
                self.log = Some(Arc::new(log.map_err(|e| Refused::Failed("the log", e))?));
                self.tell_log().await?;
                return number(0);
            }
            Request::SetVringNum { index, num } => self.set_size(index, num)?,
            Request::SetVringAddr(address) => self.set_address(address).await?,
            Request::SetVringBase { index, base } => {
                let queue = self.idle(index)?;
                queue.setup.base = base;
                queue.setup.resumed = queue.told_base == Some(base);
            }
            Request::GetVringBase { index } => {
                let base = self.stop(index).await?;
                return bytes(&wire::base_payload(index, base));
            }
            Request::SetVringKick(index, _) => self.set_kick(index.into(), fds.next()).await?,
            Request::SetVringCall(index, _) => {
                let fd = fds.next();
                let copy = copy(fd.as_ref())?;
                self.queue(index.into())?.call = fd;
                self.send(index.into(), Command::Call(index.into(), copy))?;
            }
            Request::SetVringErr(index, _) => {
                let fd = fds.next();
                let copy = copy(fd.as_ref())?;
                self.queue(index.into())?.err = fd;
                self.send(index.into(), Command::Err(index.into(), copy))?;
            }
            Request::SetVringEnable { index, enable } => self.set_enabled(index, enable).await?,
            Request::SetBackendReqFd => self.channel = fds.next(),
            Request::GetConfig { offset, size } => {
                let part = self.config(offset, size).unwrap_or_default();
                return bytes(&wire::config_payload(offset, size, &part));
            }
            Request::SetConfig {
                offset,
                bytes: written,
            } => {
                let writeback = config::written(offset, &written).ok_or(Refused::Wrong(
                    "a configuration field that cannot be written",
                ))?;
                self.writeback = writeback;
                self.apply_cache_mode();
            }
            Request::GetInflightFd(wanted) => return self.make_tracking(code, wanted).map(Some),
            Request::SetInflightFd(told) => {
                let fd = fds.next().ok_or(Refused::Wrong("no inflight region"))?;
                self.set_tracking(told, fd)?;
            }
        }
        Ok(None)
    }

    fn offered(&self) -> Features {
        self.shared.shape.features()
    }

    async fn set_features(&mut self, bits: u64) -> Result<(), Refused> {
        let features = Features::from_bits(bits).filter(|it| self.offered().contains(*it));
        self.features = features.ok_or(Refused::Features(bits))?;
        self.apply_cache_mode();
        self.tell_log().await
    }

    /// Without FLUSH a driver cannot ask for durability and has it always (5.2.6.2); without
    /// CONFIG_WCE it chose nothing, whatever one before it did.
    fn apply_cache_mode(&self) {
        let writeback = if self.features.contains(Features::CONFIG_WCE) {
            self.writeback
        } else {
            !self.shared.user.export().options().writethrough
        };
        let through = !writeback || !self.features.contains(Features::FLUSH);
        self.shared.write_through.store(through, Ordering::Relaxed);
    }

    /// Logging is on while the front-end wants it and there is a log.
    async fn tell_log(&self) -> Result<(), Refused> {
        let log = self.log.as_ref();
        let log = log.filter(|_| self.features.contains(Features::LOG_ALL));
        for worker in &self.workers {
            let (told, answer) = oneshot::channel();
            ask(worker, Command::Log(log.cloned(), told))?;
            answer.await.map_err(|_| Refused::Gone)?;
        }
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), Refused> {
        for index in 0..self.queues.len() as u32 {
            self.stop(index).await?;
            self.queue(index)?.enabled = false;
        }
        Ok(())
    }

    // === memory ===

    async fn set_table(
        &mut self,
        regions: &[RegionInfo],
        fds: impl Iterator<Item = OwnedFd>,
    ) -> Result<(), Refused> {
        let mut memory = Memory::default();
        for (info, fd) in regions.iter().zip(fds) {
            let region = Region::map(*info, fd).and_then(|region| memory.with(region));
            memory = region.map_err(|e| Refused::Failed("a memory region", e))?;
        }
        self.replace_memory(memory, true).await
    }

    async fn add_region(&mut self, info: RegionInfo, fd: Option<OwnedFd>) -> Result<(), Refused> {
        if self.memory.len() >= REGIONS_MAX {
            return Err(Refused::Wrong("too many memory regions"));
        }
        let fd = fd.ok_or(Refused::Wrong("no memory region"))?;
        let region = Region::map(info, fd).and_then(|region| self.memory.with(region));
        let memory = region.map_err(|e| Refused::Failed("a memory region", e))?;
        // What is in flight goes on in the old table, all of which is in the new one.
        self.replace_memory(memory, false).await
    }

    async fn replace_memory(&mut self, memory: Memory, quiet: bool) -> Result<(), Refused> {
        self.memory = Arc::new(memory);
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (told, answer) = oneshot::channel();
            ask(worker, Command::Memory(self.memory.clone(), quiet, told))?;
            answers.push(answer);
        }
        for answer in answers {
            answer.await.map_err(|_| Refused::Gone)?;
        }
        Ok(())
    }

    // === queues ===

    fn queue(&mut self, index: u32) -> Result<&mut Queue, Refused> {
        let found = usize::try_from(index).ok();
        let found = found.and_then(|index| self.queues.get_mut(index));
        found.ok_or(Refused::Queue(index))
    }

    /// A queue that does not run.
    fn idle(&mut self, index: u32) -> Result<&mut Queue, Refused> {
        match self.queue(index)? {
            queue if queue.running => Err(Refused::Runs(index)),
            queue => Ok(queue),
        }
    }

    fn worker(&self, index: u32) -> &mpsc::UnboundedSender<Command> {
        // The remainder is below a length.
        &self.workers[index as usize % self.workers.len()]
    }

    fn send(&self, index: u32, command: Command) -> Result<(), Refused> {
        ask(self.worker(index), command)
    }

    fn set_size(&mut self, index: u32, num: u32) -> Result<(), Refused> {
        let max = self.queue_size_max;
        let size = u16::try_from(num)
            .ok()
            .filter(|num| *num > 0 && *num <= max);
        self.idle(index)?.setup.size = size.ok_or(Refused::Size(num))?;
        Ok(())
    }

    async fn set_address(&mut self, address: RingAddress) -> Result<(), Refused> {
        let memory = self.memory.clone();
        let queue = self.queue(address.index)?;
        queue.address = Some(address);
        queue.setup.address = address;
        if !queue.running {
            return Ok(());
        }
        // A running ring moves, or begins or ends to be logged.
        let setup = queue.setup;
        let (told, answer) = oneshot::channel();
        // Queues that exist have sixteen bits.
        let command = Command::Move(address.index as u16, setup, memory, told);
        self.send(address.index, command)?;
        let moved = answer.await.map_err(|_| Refused::Gone)?;
        moved.map_err(|e| Refused::Failed("the ring's addresses", e))
    }

    async fn set_kick(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), Refused> {
        let queue = self.queue(index)?;
        if queue.running {
            let kept = copy(fd.as_ref())?;
            let (told, answer) = oneshot::channel();
            self.send(index, Command::Kick(index as u16, fd, told))?;
            let result = answer.await.map_err(|_| Refused::Gone)?;
            result.map_err(|e| Refused::Failed("the kick descriptor", e))?;
            // With it the queue starts again.
            self.queue(index)?.kick = Some(kept);
            return Ok(());
        }
        queue.kick = Some(fd);
        self.start(index).await
    }

    async fn set_enabled(&mut self, index: u32, enable: bool) -> Result<(), Refused> {
        let queue = self.queue(index)?;
        queue.enabled = enable;
        if enable {
            return self.start(index).await;
        }
        if queue.running {
            // It may be enabled again, and goes on where it was.
            let kick = queue.kick.take();
            let base = self.stop(index).await?;
            let queue = self.queue(index)?;
            queue.setup.base = base;
            queue.kick = kick;
        }
        Ok(())
    }

    /// Start a queue that has everything it needs.
    async fn start(&mut self, index: u32) -> Result<(), Refused> {
        let features = self.features;
        // Without features of the protocol there is no message to enable a queue.
        let enabled_by_default = !features.contains(Features::PROTOCOL_FEATURES);
        let queue = self.queue(index)?;
        if queue.running || !(queue.enabled || enabled_by_default) {
            return Ok(());
        }
        let Some(kick) = &queue.kick else {
            return Ok(());
        };
        if queue.address.is_none() || queue.setup.size == 0 {
            return Err(Refused::Wrong("a queue without size or addresses"));
        }
        queue.setup.packed = features.contains(Features::RING_PACKED);
        queue.setup.event_idx = features.contains(Features::EVENT_IDX);
        queue.setup.indirect = features.contains(Features::INDIRECT_DESC);
        let setup = queue.setup;
        let (kick, call, err) = (
            copy(kick.as_ref())?,
            copy(queue.call.as_ref())?,
            copy(queue.err.as_ref())?,
        );
        let tracking = self.tracking_of(index, setup.size)?;
        let ring = Ring::start(&setup, &self.memory, tracking);
        let start = Start {
            index: index as u16,
            setup,
            ring: ring.map_err(|e| Refused::Failed("the ring", e))?,
            kick,
            call,
            err,
        };
        let (told, answer) = oneshot::channel();
        self.send(index, Command::Start(Box::new(start), told))?;
        let started = answer.await.map_err(|_| Refused::Gone)?;
        started.map_err(|e| Refused::Failed("the kick descriptor", e))?;
        self.queue(index)?.running = true;
        Ok(())
    }

    /// Stop a queue; nothing of it is in flight any more.
    async fn stop(&mut self, index: u32) -> Result<u32, Refused> {
        let queue = self.queue(index)?;
        queue.kick = None;
        if !queue.running {
            return Ok(queue.setup.base);
        }
        let (told, answer) = oneshot::channel();
        self.send(index, Command::Stop(index as u16, told))?;
        let base = answer.await.map_err(|_| Refused::Gone)?;
        let queue = self.queue(index)?;
        queue.running = false;
        queue.told_base = Some(base);
        queue.setup.base = base;
        queue.setup.resumed = true;
        Ok(base)
    }

    // === tracking ===

    fn tracking_of(&self, index: u32, size: u16) -> Result<Option<Area>, Refused> {
        let Some(tracking) = &self.tracking else {
            return Ok(None);
        };
        let bytes = bytes_per_queue(size, self.is_packed());
        if index >= tracking.queues.into() || bytes > tracking.bytes_per_queue {
            return Err(Refused::Wrong(
                "a queue that the inflight region has no room for",
            ));
        }
        // Both were checked against the size of the area.
        let at = (u64::from(index) * tracking.bytes_per_queue) as usize;
        Ok(tracking.area.part(at, bytes as usize))
    }

    fn is_packed(&self) -> bool {
        self.features.contains(Features::RING_PACKED)
    }

    fn make_tracking(&mut self, code: u32, wanted: Inflight) -> Result<Reply, Refused> {
        let failed = |e: rustix::io::Errno| Refused::Failed("an inflight region", e.into());
        let each = bytes_per_queue(wanted.queue_size, self.is_packed());
        let size = each * u64::from(wanted.queues);
        if wanted.queues == 0 || wanted.queue_size == 0 || size > INFLIGHT_BYTES_MAX {
            return Err(Refused::Wrong("an inflight region of no sensible size"));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("vhost-inflight", flags).map_err(failed)?;
        rustix::fs::ftruncate(&fd, size).map_err(failed)?;
        let made = Inflight {
            size,
            offset: 0,
            ..wanted
        };
        let copy = fd.try_clone().map_err(|_| Refused::Gone)?;
        self.set_tracking(made, copy)?;
        Ok(Reply {
            bytes: wire::reply(code, &wire::inflight_payload(made)),
            fd: Some(fd),
        })
    }

    fn set_tracking(&mut self, told: Inflight, fd: OwnedFd) -> Result<(), Refused> {
        let bytes_per_queue = bytes_per_queue(told.queue_size, self.is_packed());
        let wanted = bytes_per_queue * u64::from(told.queues);
        if told.size < wanted || told.size > INFLIGHT_BYTES_MAX {
            return Err(Refused::Wrong("an inflight region of no sensible size"));
        }
        let area = Area::of_file(fd, told.offset, told.size);
        let area = area.map_err(|e| Refused::Failed("an inflight region", e))?;
        // Its counters are stored whole.
        if !area.is_aligned(size_of::<u64>()) {
            return Err(Refused::Wrong("an inflight region at an odd offset"));
        }
        self.tracking = Some(Tracking {
            area,
            queues: told.queues,
            bytes_per_queue,
        });
        Ok(())
    }

    // === configuration ===

    /// Part of the configuration space; past its end are zeroes. `None`: far past it.
    fn config(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        /// As far as the protocol lets anybody ask.
        const SPACE: usize = 256;
        let node = self.shared.user.export().node();
        let size_now = node.size();
        self.shared.size.store(size_now, Ordering::Relaxed);
        let writeback = !self.shared.write_through.load(Ordering::Relaxed);
        let space = self.shared.shape.space(size_now, writeback);
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        let mut whole = [0; SPACE];
        whole[..CONFIG].copy_from_slice(&space);
        whole.get(start..end).map(<[u8]>::to_vec)
    }

    /// The node may have another length now: tell the front-end, which asks for the rest.
    pub(super) fn resized(&self) {
        let size = self.shared.user.export().node().size();
        if self.shared.size.swap(size, Ordering::Relaxed) == size {
            return;
        }
        let Some(channel) = &self.channel else {
            return;
        };
        let notice = wire::notice(BackendReq::CONFIG_CHANGE_MSG.into());
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(reason) = rustix::net::send(channel, &notice, flags) {
            let export = self.shared.user.export().id();
            tracing::warn!(export, %reason, "the guest was not told of its disk's new size");
        }
    }
}

fn ask(worker: &mpsc::UnboundedSender<Command>, command: Command) -> Result<(), Refused> {
    worker.send(command).map_err(|_| Refused::Gone)
}

fn copy(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Refused> {
    let copied = fd.map(OwnedFd::try_clone).transpose();
    copied.map_err(|e| Refused::Failed("a descriptor", e.into()))
}
