//! The NBD server: accepts, haggles, and hands connections to iothreads.
//!
//! Control plane: one task per listener and one per client in its handshake;
//! nothing here runs once a client is in the transmission phase. Invariants: at
//! most `max-connections` clients exist, those in handshake included; a client
//! that does not finish its handshake in time is cut off.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use outport_block::authz::{Decision, Facts, Grant, Peer};
use outport_block::node::Kind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::connection::{self, Handover};
use super::exports::{BlockSizes, ContextInfo, ExportFlags, ExportInfo, Exports, Lookup, Purpose};
use super::haggle::{Config, Haggle, Step, TlsMode};
use super::listener::{Accepted, Listener};
use super::stream::Stream;
use crate::access::{Access, Occasion, Policies};
use crate::export::{Export, ExportUser, NoEntry};
use crate::lease::Lease;
use crate::tls::{self, Credentials};

/// Unlimited, as far as a semaphore can count.
const UNLIMITED: usize = Semaphore::MAX_PERMITS;

/// What `nbd-server-start` says.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Clients at one time; 0: no limit. QEMU's default is 100.
    pub max_connections: u32,
    /// Seconds from accept to the transmission phase; 0: no limit. QEMU's
    /// default is 10.
    pub handshake_max_seconds: u32,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_connections: 100,
            handshake_max_seconds: 10,
        }
    }
}

/// TLS of a server: then nothing is said in the clear.
#[derive(Debug)]
pub struct ServerTls {
    /// What it proves itself with and whom it believes; may be replaced while it runs.
    pub credentials: Arc<Credentials>,
    /// QEMU's question, after the handshake; `None`: whoever proves a believed identity gets on.
    pub admission: Option<Admission>,
}

/// Who is asked about an identity that TLS proved (`tls-authz`).
#[derive(Debug)]
pub struct Admission {
    /// All policies.
    pub policies: Policies,
    /// Id of the one that is asked; looked for whenever it is.
    pub policy: String,
}

#[derive(Debug, Default)]
struct Registry(RwLock<BTreeMap<String, Arc<Export>>>);

impl Registry {
    fn get(&self, name: &str) -> Option<Arc<Export>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }
}

impl Registry {
    fn all(&self) -> Vec<Arc<Export>> {
        let exports = self.0.read().unwrap_or_else(PoisonError::into_inner);
        exports.values().cloned().collect()
    }
}

/// The exports that one client may know of.
struct Visible(Vec<ExportInfo>);

impl Exports for Visible {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.0.iter().find(|export| export.name == name).cloned()
    }

    fn list(&self, visit: &mut dyn FnMut(&ExportInfo)) {
        self.0.iter().for_each(visit);
    }
}

/// One client in its handshake, and what it may.
struct Visitor<'a> {
    registry: &'a Registry,
    /// Who is asked about clients of this server.
    access: &'a Access,
    peer: Peer,
    /// A policy admitted the identity that TLS proved.
    is_admitted: bool,
    /// Its place in the export that it wants to enter.
    place: Option<ExportUser>,
    /// What it was granted there; `None`: nobody was asked.
    grant: Option<(Access, Facts, Grant)>,
}

impl Visitor<'_> {
    async fn decide(&self, export: &Export, occasion: Occasion) -> (Access, Facts, Decision) {
        let mut access = self.access.and(&export.options().access);
        if self.is_admitted {
            access = access.answered();
        }
        let facts = Facts {
            peer: self.peer.clone(),
            export_name: Some(export.name().to_owned()),
            wants_write: export.is_writable(),
        };
        let decision = access.decide(&facts, occasion).await;
        (access, facts, decision)
    }

    /// What it may know of: all that it could enter.
    async fn list(&self) -> Visible {
        let mut visible = Vec::new();
        for export in self.registry.all() {
            if let (.., Decision::Allow(grant)) = self.decide(&export, Occasion::Look).await {
                visible.push(info(&export, grant));
            }
        }
        Visible(visible)
    }

    /// Finds the export that it names; one that wants to enter gets its place at once, so that it
    /// is not told yes and then cut off.
    async fn look_up(&mut self, name: &str, purpose: Purpose) -> Lookup {
        self.place = None;
        self.grant = None;
        let Some(export) = self.registry.get(name) else {
            return Lookup::Unknown;
        };
        let enters = matches!(purpose, Purpose::Go | Purpose::ExportName);
        let occasion = if enters {
            Occasion::Entry
        } else {
            Occasion::Look
        };
        let (access, facts, decision) = self.decide(&export, occasion).await;
        let grant = match decision {
            Decision::Allow(grant) => grant,
            // Who may not use it is not told that it exists.
            Decision::Deny(_) => return Lookup::Unknown,
        };
        if enters {
            match export.enter() {
                Ok(user) => self.place = Some(user),
                Err(NoEntry::ShutDown) => return Lookup::Unknown,
                Err(NoEntry::Full) => {
                    let text = format!("Export '{name}' has as many clients as it takes");
                    return Lookup::Denied(text);
                }
            }
            self.grant = (!access.is_open()).then_some((access, facts, grant));
        }
        Lookup::Found(Box::new(info(&export, grant)))
    }
}

/// What a client is told of an export that it may use in this way.
fn info(export: &Export, grant: Grant) -> ExportInfo {
    let node = export.node();
    let mut flags = ExportFlags::CACHE;
    if export.is_writable() && !grant.read_only {
        flags |= ExportFlags::WRITABLE
            | ExportFlags::TRIM
            | ExportFlags::WRITE_ZEROES
            | ExportFlags::FAST_ZERO;
    }
    flags.set(ExportFlags::MULTI_CONN, export.options().multi_conn);
    let preferred = match node.kind() {
        Kind::Null { .. } => 4096,
        _ => node.preferred_io(),
    };
    ExportInfo {
        name: export.name().to_owned(),
        description: export.options().description.clone().unwrap_or_default(),
        size: node.size(),
        flags,
        block_sizes: BlockSizes {
            preferred,
            ..BlockSizes::default()
        },
        block_size_required: false,
        tls_only: false,
        contexts: contexts(export),
    }
}

fn contexts(export: &Export) -> Vec<ContextInfo> {
    let base = ContextInfo {
        name: "base:allocation".to_owned(),
        id: 0,
        wide: false,
    };
    let offered = export.options().contexts.iter();
    let offered = offered.filter(|context| context.provider.is_offered());
    let offered = offered.map(|context| ContextInfo {
        name: context.provider.name().to_owned(),
        id: context.id,
        wide: context.provider.is_wide(),
    });
    std::iter::once(base).chain(offered).collect()
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    registry: Arc<Registry>,
    listener: Arc<Listener>,
    stop: watch::Sender<bool>,
    options: ServerOptions,
    slots: Arc<Semaphore>,
    /// A place is reserved for whoever connects next.
    awaits: Arc<AtomicBool>,
    tls: Option<Rc<ServerTls>>,
}

impl Server {
    /// Start accepting; `access` is asked about every client, before its export is. Call inside a
    /// tokio `LocalSet`.
    #[must_use]
    pub fn start(
        listener: Listener,
        options: ServerOptions,
        tls: Option<ServerTls>,
        access: Access,
    ) -> Self {
        let tls = tls.map(Rc::new);
        let registry = Arc::new(Registry::default());
        let listener = Arc::new(listener);
        let (stop, stopped) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(limit(options)));
        let awaits = Arc::new(AtomicBool::new(false));
        let reception = Rc::new(Reception {
            registry: registry.clone(),
            access,
            tls: tls.clone(),
            options,
            stopped,
        });
        tokio::task::spawn_local(accept_loop(
            listener.clone(),
            reception,
            slots.clone(),
            awaits.clone(),
        ));
        Self {
            registry,
            listener,
            stop,
            options,
            slots,
            awaits,
            tls,
        }
    }

    /// What it encrypts with, if it does.
    #[must_use]
    pub fn credentials(&self) -> Option<&Arc<Credentials>> {
        self.tls.as_ref().map(|tls| &tls.credentials)
    }

    /// Clients now, those in their handshake included.
    #[must_use]
    pub fn connections(&self) -> usize {
        let taken = limit(self.options) - self.slots.available_permits();
        // The next client has its place before it comes.
        taken.saturating_sub(usize::from(self.awaits.load(Ordering::Relaxed)))
    }

    /// The listener, for its URI and port.
    #[must_use]
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// What it was started with.
    #[must_use]
    pub const fn options(&self) -> ServerOptions {
        self.options
    }

    /// Offer an export.
    ///
    /// # Errors
    /// The name is taken.
    pub fn add(&self, export: Arc<Export>) -> Result<(), String> {
        let mut exports = self
            .registry
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let name = export.name().to_owned();
        if exports.contains_key(&name) {
            return Err(format!("NBD server already has export named '{name}'"));
        }
        exports.insert(name, export);
        Ok(())
    }

    /// Offer it no longer; clients inside are not affected.
    pub fn remove(&self, name: &str) {
        self.registry
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }

    /// Stop accepting, cut off clients in their handshake, and wait until they
    /// are gone. Exports are shut down by whoever owns them.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        self.stop.closed().await;
    }
}

fn limit(options: ServerOptions) -> usize {
    match options.max_connections {
        0 => UNLIMITED,
        n => n as usize,
    }
}

/// What every handshake of a server goes by.
struct Reception {
    registry: Arc<Registry>,
    access: Access,
    tls: Option<Rc<ServerTls>>,
    options: ServerOptions,
    /// Held by handshakes and the accepting task, so that `stop` sees when the last has ended.
    stopped: watch::Receiver<bool>,
}

async fn accept_loop(
    listener: Arc<Listener>,
    reception: Rc<Reception>,
    slots: Arc<Semaphore>,
    awaits: Arc<AtomicBool>,
) {
    let mut stopped = reception.stopped.clone();
    loop {
        // Clients beyond the limit wait in the backlog, as with QEMU.
        let next = async {
            let slot = slots.clone().acquire_owned().await.ok()?;
            awaits.store(true, Ordering::Relaxed);
            let accepted = listener.accept().await;
            awaits.store(false, Ordering::Relaxed);
            Some((slot, accepted))
        };
        let (slot, accepted) = tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            next = next => match next {
                Some(next) => next,
                None => return,
            },
        };
        match accepted {
            Ok(accepted) => {
                tokio::task::spawn_local(handshake(accepted, slot, reception.clone()));
            }
            Err(e) => {
                // Out of descriptors or memory: give others time to leave.
                tracing::warn!(reason = %e, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn handshake(accepted: Accepted, slot: OwnedSemaphorePermit, reception: Rc<Reception>) {
    let peer = accepted.peer;
    let visitor = Visitor {
        registry: &reception.registry,
        access: &reception.access,
        peer: peer.clone(),
        is_admitted: false,
        place: None,
        grant: None,
    };
    let work = negotiate(accepted.fd, visitor, reception.tls.as_deref());
    let limit = match reception.options.handshake_max_seconds {
        0 => Duration::from_secs(u64::from(u32::MAX)),
        n => Duration::from_secs(u64::from(n)),
    };
    let mut stopped = reception.stopped.clone();
    let outcome = tokio::select! {
        _ = stopped.wait_for(|stop| *stop) => return,
        outcome = tokio::time::timeout(limit, work) => outcome,
    };
    // The transmission phase is the export's affair, not the server's.
    drop((stopped, reception));
    match outcome {
        Err(_) => tracing::info!(%peer, "connection closed: the handshake took too long"),
        Ok(Err(reason)) => tracing::debug!(%peer, reason, "connection closed in its handshake"),
        Ok(Ok(negotiated)) => {
            let Negotiated {
                fd,
                tls,
                peer,
                session,
                rest,
                user,
                lease,
            } = negotiated;
            let export = user.export().clone();
            let handover = Handover {
                fd,
                tls,
                session,
                rest,
                user,
                peer,
                lease,
                slot,
            };
            export
                .next_iothread()
                .spawn(move || connection::run(handover));
        }
    }
}

struct Negotiated {
    fd: OwnedFd,
    tls: Option<Box<tls::Session>>,
    /// With what TLS proved.
    peer: Peer,
    session: Box<super::session::Session>,
    /// Bytes that belong to the transmission phase already.
    rest: Vec<u8>,
    /// Its place in the export.
    user: ExportUser,
    /// What it was granted; `None`: nobody was asked.
    lease: Option<Arc<Lease>>,
}

async fn negotiate(
    fd: OwnedFd,
    mut visitor: Visitor<'_>,
    tls: Option<&ServerTls>,
) -> Result<Negotiated, String> {
    let fd = connection::register(fd).map_err(|e| e.to_string())?;
    let mut stream = Stream::new(fd);
    let mut haggle = Haggle::new(Config {
        extended_headers: true,
        tls: tls.map_or(TlsMode::None, |_| TlsMode::Forced),
    });
    let mut input: Vec<u8> = Vec::new();
    loop {
        let (used, step) = haggle.input(&input);
        input.drain(..used);
        match step {
            Step::LookUp { name, purpose } => {
                haggle.found(visitor.look_up(&name, purpose).await);
            }
            Step::List => haggle.list(&visitor.list().await),
            Step::NeedInput => {
                // Still haggling: it was refused after all.
                visitor.place = None;
                receive(&mut stream, &mut input).await?;
            }
            Step::Send => {
                let output = haggle.take_output();
                let cut = async {
                    match &visitor.place {
                        Some(user) => ExportUser::export(user).cut().await,
                        None => std::future::pending().await,
                    }
                };
                // Who does not read must not keep an export that is to go.
                tokio::select! {
                    sent = stream.send(&output) => sent.map_err(|e| e.to_string())?,
                    () = cut => return Err("the export was shut down".to_owned()),
                }
            }
            Step::StartTls => {
                let tls = tls.ok_or("TLS without credentials")?;
                let peer = &mut visitor.peer;
                visitor.is_admitted = start_tls(&mut stream, tls, peer).await?;
                haggle.tls_established();
            }
            Step::Enter(session) => {
                let user = visitor.place.ok_or("an entrance without a place")?;
                let begin = |(access, facts, grant)| Lease::begin(access, facts, grant);
                let (fd, tls) = stream.into_parts();
                return Ok(Negotiated {
                    fd,
                    tls,
                    peer: visitor.peer,
                    session,
                    rest: input,
                    user,
                    lease: visitor.grant.map(begin),
                });
            }
            Step::Disconnect(reason) => {
                let last = haggle.take_output();
                if !last.is_empty() {
                    // The client may be gone already, and may be right to be.
                    let _ = stream.send(&last).await;
                }
                stream.say_goodbye();
                return Err(reason.to_string());
            }
        }
    }
}

/// Receives what there is behind what is there already.
async fn receive(stream: &mut Stream, input: &mut Vec<u8>) -> Result<(), String> {
    let mut chunk = [0; 4096];
    let n = stream.receive(&mut chunk).await;
    let n = n.map_err(|e| e.to_string())?;
    if n == 0 {
        return Err("end of stream".to_owned());
    }
    input.extend_from_slice(&chunk[..n]);
    Ok(())
}

/// The TLS handshake, and then the question who the client is: whether a policy was asked. A TLS
/// 1.3 client sees a handshake that succeeded and then the end of the stream if it is refused, as
/// with QEMU (spec qmp.md 5.5).
async fn start_tls(stream: &mut Stream, tls: &ServerTls, peer: &mut Peer) -> Result<bool, String> {
    let session = tls.credentials.accept()?;
    let started = stream.start_tls(session).await;
    let proven = match started.map_err(|e| e.to_string()) {
        Ok(()) => stream.session().ok_or("no session")?.proven(),
        Err(reason) => Err(reason),
    };
    let admitted = match proven {
        Ok(proven) => {
            peer.identity = proven.dn.unwrap_or_default();
            peer.tls = Some(proven.tls);
            admit(tls, peer, proven.has_certificate).await
        }
        Err(reason) => Err(reason),
    };
    // Who is kept out is an administrator's business.
    admitted.inspect_err(|reason| tracing::warn!(%peer, reason, "TLS client refused"))
}

/// Whether a policy was asked: who did not have to prove a name is not held against it (spec
/// qmp.md 5.5).
async fn admit(tls: &ServerTls, peer: &Peer, has_certificate: bool) -> Result<bool, String> {
    let Some(admission) = tls.admission.as_ref().filter(|_| has_certificate) else {
        return Ok(false);
    };
    let facts = Facts {
        peer: peer.clone(),
        ..Facts::default()
    };
    let policies = &admission.policies;
    let decision = policies.ask(&admission.policy, &facts, Occasion::Entry);
    match decision.await {
        Decision::Allow(_) => Ok(true),
        Decision::Deny(reason) => {
            let dn = &peer.identity;
            Err(format!("TLS x509 authz check for {dn} is denied: {reason}"))
        }
    }
}
