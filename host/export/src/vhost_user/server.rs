//! One export's socket: a front-end at a time, each with fresh state.
//!
//! Accepting is the control plane's; a session and its workers run on the iothreads of the export.
//! Invariant: the next front-end is accepted only after nothing of the last one is in flight, and
//! the socket file goes when the export is shut down, before anybody is told that it is gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use futures_util::future::join_all;
use outport_block::authz::{Decision, Facts, Peer, Transport};
use tokio::sync::mpsc;

use super::config::Shape;
use super::connection::{End, Socket};
use super::session::Session;
use super::worker::{Shared, Worker};
use crate::access::Occasion;
use crate::export::{Export, ExportUser};
use crate::lease::Lease;
use crate::nbd::Listener;

/// What `block-export-add` says of a vhost-user-blk export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes; a power of two from 512 to 2 MiB.
    pub logical_block_size: u32,
    /// Queues of the device, at least one.
    pub num_queues: u16,
    /// Entries of a queue, at most.
    pub queue_size_max: u16,
    /// What the guest reads as the disk's serial number: at most 20 bytes.
    pub serial: String,
}

/// Offer an export. Call inside a tokio runtime; it ends with the export.
pub fn start(listener: Listener, export: &Arc<Export>, options: Options) {
    let listener = Arc::new(listener);
    export.at_shut_down({
        let listener = listener.clone();
        Box::new(move || listener.withdraw())
    });
    tokio::spawn(accept_loop(listener, export.clone(), options));
}

async fn accept_loop(listener: Arc<Listener>, export: Arc<Export>, options: Options) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = export.cut() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(accepted) => {
                let mut peer = accepted.peer;
                peer.transport = Transport::VhostUserBlk;
                let Some(lease) = admit(&export, &peer).await else {
                    continue;
                };
                let Ok(user) = export.enter() else { return };
                let options = options.clone();
                let first = export.iothreads()[0].clone();
                let session = first.run(move || serve(accepted.fd, user, lease, options));
                let end = session.await.unwrap_or(End::Protocol("a bug".into()));
                let reason = end.to_string();
                match end {
                    End::Left | End::ShutDown => {
                        tracing::debug!(export = export.id(), %peer, reason, "front-end gone");
                    }
                    _ => tracing::info!(export = export.id(), %peer, reason, "front-end gone"),
                }
            }
            Err(e) => {
                // Out of descriptors or memory: give others time to leave.
                tracing::warn!(reason = %e, "a front-end could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// What a front-end may, if anything.
async fn admit(export: &Export, peer: &Peer) -> Option<Arc<Lease>> {
    let access = &export.options().access;
    let facts = Facts {
        peer: peer.clone(),
        export_name: Some(export.name().to_owned()),
        wants_write: export.is_writable(),
    };
    match access.decide(&facts, Occasion::Entry).await {
        // A ring has no brake: what must be slow does not get in.
        Decision::Allow(grant)
            if grant.iops_max.is_some() || grant.bytes_per_second_max.is_some() =>
        {
            tracing::warn!(export = export.id(), %peer, "a grant with limits of rate is refused");
            None
        }
        Decision::Allow(grant) => Some(Lease::begin(access.clone(), facts, grant)),
        Decision::Deny(_) => None,
    }
}

/// The life of a front-end, on the first iothread.
async fn serve(fd: OwnedFd, user: ExportUser, lease: Arc<Lease>, options: Options) -> End {
    let export = user.export().clone();
    let node = export.node();
    let shape = Shape {
        block_size: options.logical_block_size,
        preferred_io: node.preferred_io(),
        queues: options.num_queues,
        writable: lease.may_write(),
        discards: node.unmaps(),
    };
    let mut serial = [0; 20];
    for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
        *to = from;
    }
    let shared = Arc::new(Shared {
        user,
        shape,
        serial,
        size: AtomicU64::new(node.size()),
        write_through: AtomicBool::new(export.options().writethrough),
    });
    let mut commands = Vec::new();
    let mut workers = Vec::new();
    for iothread in export.iothreads() {
        let (sender, receiver) = mpsc::unbounded_channel();
        commands.push(sender);
        let shared = shared.clone();
        let iothread = iothread.clone();
        workers.push(async move {
            let run = move || Worker::new(shared, receiver).run();
            iothread.run(run).await
        });
    }
    let session = Session::new(shared, commands, options.queue_size_max);
    let workers = join_all(workers);
    tokio::pin!(workers);
    let end = {
        let converse = async {
            tokio::select! {
                biased;
                () = export.cut() => End::ShutDown,
                () = lease.ended() => End::Protocol("the grant has ended".into()),
                end = converse(fd, session, &export) => end,
            }
        };
        tokio::pin!(converse);
        // The workers are started by being looked at, and outlive the session.
        tokio::select! {
            biased;
            _ = &mut workers => return End::Protocol("a data thread ended".into()),
            end = &mut converse => end,
        }
    };
    workers.await;
    end
}

async fn converse(fd: OwnedFd, mut session: Session, export: &Export) -> End {
    let socket = match Socket::new(fd) {
        Ok(socket) => socket,
        Err(e) => return End::Protocol(e.to_string()),
    };
    loop {
        let message = {
            let next = socket.receive();
            tokio::pin!(next);
            loop {
                tokio::select! {
                    message = &mut next => break message,
                    () = export.resized() => session.resized(),
                }
            }
        };
        let message = match message {
            Ok(message) => message,
            Err(end) => return end,
        };
        match session.handle(message).await {
            Ok(Some(reply)) => {
                if let Err(end) = socket.send(&reply).await {
                    return end;
                }
            }
            Ok(None) => {}
            Err(refused) => return End::Protocol(refused.to_string()),
        }
    }
}
