//! Events: from wherever something happened to every negotiated monitor.
//!
//! The control thread emits directly, so that an event stands before the answer of the command
//! that caused it. Other threads (iothreads, plugins) send through a bounded channel and never
//! wait; a flood is cut, counted and logged.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outport_block::format::FaultKind;
use outport_block::image::ImageEvent;
use outport_block::node::Exceeded;
use outport_plugin::{FaultEvent, User};
use outport_qmp::Event;
use outport_qmp::envelope;
use outport_qmp::events::{BlockImageCorrupted, BlockWriteThreshold, OutportPluginFault};
use outport_qmp::types::plugin::PluginFault;
use tokio::sync::mpsc;

use crate::monitor::Output;

/// Events from other threads that wait for the control thread. A plugin that faults faster than
/// they are told loses the rest: the first ones say what is wrong.
const QUEUED_MAX: usize = 256;

/// At the end, a client that does not read holds up the daemon for so long.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// The control thread's side.
#[derive(Debug)]
pub(crate) struct Events {
    outputs: RefCell<Vec<Weak<Output>>>,
    sender: EventSender,
}

/// Any thread's side.
#[derive(Clone, Debug)]
pub(crate) struct EventSender {
    queue: mpsc::Sender<Event>,
    lost: Arc<AtomicU64>,
}

impl Events {
    /// The hub, and the queue that [`Events::forward`] empties.
    pub(crate) fn new() -> (Rc<Self>, mpsc::Receiver<Event>) {
        let (queue, waiting) = mpsc::channel(QUEUED_MAX);
        let sender = EventSender {
            queue,
            lost: Arc::default(),
        };
        (
            Rc::new(Self {
                outputs: RefCell::default(),
                sender,
            }),
            waiting,
        )
    }

    /// Tells every negotiated monitor now.
    pub(crate) fn emit(&self, event: &Event) {
        let message = envelope::event(event, now_micros());
        tracing::debug!(event = event.name(), data = ?event.data(), "event");
        self.outputs
            .borrow_mut()
            .retain(|output| output.strong_count() > 0);
        for output in self.outputs.borrow().iter().filter_map(Weak::upgrade) {
            if output.receives_events() {
                output.push(&message);
            }
        }
    }

    /// One more client to tell, once it has negotiated.
    pub(crate) fn subscribe(&self, output: &Rc<Output>) {
        self.outputs.borrow_mut().push(Rc::downgrade(output));
    }

    /// Waits, not for long, until every client has what it was sent.
    pub(crate) async fn last_words(&self) {
        let outputs: Vec<_> = self
            .outputs
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        let all = futures_util::future::join_all(outputs.iter().map(|output| output.drained()));
        if tokio::time::timeout(LAST_WORDS_MAX, all).await.is_err() {
            tracing::warn!("a monitor client did not read its last answers");
        }
    }

    /// For threads other than the control thread.
    pub(crate) fn sender(&self) -> EventSender {
        self.sender.clone()
    }

    /// Task: passes on what other threads sent.
    pub(crate) async fn forward(self: Rc<Self>, mut waiting: mpsc::Receiver<Event>) {
        while let Some(event) = waiting.recv().await {
            let lost = self.sender.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                tracing::warn!(lost, "events came faster than they could be told");
            }
            self.emit(&event);
        }
    }
}

impl EventSender {
    fn send(&self, event: Event) {
        if self.queue.try_send(event).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An image has something to say.
    pub(crate) fn image(&self, event: ImageEvent) {
        match event {
            ImageEvent::Corrupted {
                node_name,
                message,
                offset,
                size,
                fatal,
            } => {
                tracing::error!(
                    node = node_name,
                    message,
                    offset,
                    size,
                    fatal,
                    "image corrupted: qemu-img check lists the damage of a format that it knows"
                );
                let signed = |value: Option<u64>| value.and_then(|v| i64::try_from(v).ok());
                self.send(Event::BlockImageCorrupted(BlockImageCorrupted {
                    device: String::new(),
                    node_name: Some(node_name),
                    msg: message,
                    offset: signed(offset),
                    size: signed(size),
                    fatal,
                }));
            }
            ImageEvent::State { node_name, state } => {
                tracing::warn!(node = node_name, ?state, "node changed state");
            }
        }
    }

    /// A write ended past the threshold of its node.
    pub(crate) fn exceeded(&self, event: Exceeded) {
        self.send(Event::BlockWriteThreshold(BlockWriteThreshold {
            node_name: event.node_name,
            amount_exceeded: event.amount,
            write_threshold: event.threshold,
        }));
    }

    /// A plugin broke its contract.
    pub(crate) fn fault(&self, event: &FaultEvent) {
        let fault = match event.kind {
            FaultKind::Trap => PluginFault::Trap,
            FaultKind::Deadline => PluginFault::Deadline,
            FaultKind::Memory => PluginFault::Memory,
            FaultKind::BadExtent => PluginFault::BadExtent,
            FaultKind::BadAnswer => PluginFault::BadAnswer,
        };
        let (mut node_name, mut object, mut export) = (None, None, None);
        match event.user.clone() {
            User::Node(name) => node_name = Some(name),
            User::Object(id) => object = Some(id),
            User::Export(id) => export = Some(id),
        }
        self.send(Event::OutportPluginFault(OutportPluginFault {
            plugin: event.plugin.clone(),
            node_name,
            object,
            export,
            fault,
            message: event.message.clone(),
        }));
    }
}

fn now_micros() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
