//! One client of a monitor: from its greeting to its end.
//!
//! Reads and writes go on side by side. Reading stops while a command runs (a client has one in
//! flight; with the capability `oob` some messages more are read, and `exec-oob` is answered at
//! once) and while the client does not read its answers. After the client's half-close what it
//! asked for is still answered.

use std::cell::RefCell;
use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::envelope::{self, Incoming, Session};
use outport_qmp::wire::Reader;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};

use super::ahead::{self, Ahead, Message};
use super::{Job, Monitor, Output};
use crate::chardev::{Client, ClientReader};
use crate::commands;
use crate::descriptors::Arrived;

/// Bytes read at a time: bounds the commands that wait to be looked at.
const READ_BYTES: usize = 4096;

/// Serves a client until it leaves or is dropped.
pub(super) async fn serve(monitor: &Monitor, client: Client) {
    let Client {
        mut reader,
        mut writer,
        arrived,
    } = client;
    let output = Rc::new(Output::new(&monitor.name, monitor.pretty));
    monitor.events.subscribe(&output);
    let session = Session::new(true);
    output.push(&session.greeting(&commands::version()));
    tracing::debug!(monitor = monitor.name, "monitor client connected");

    {
        let writing = output.write_to(&mut writer);
        let conversation = Conversation {
            monitor,
            session: RefCell::new(session),
            arrived: &arrived,
            output: &output,
        };
        let reading = conversation.run(&mut reader);
        tokio::pin!(writing);
        tokio::select! {
            () = &mut writing => {}
            () = output.shut() => {}
            () = reading => {
                // Half-closed, or the daemon quits: what was answered still goes out.
                tokio::select! {
                    () = &mut writing => {}
                    () = output.drained() => {}
                    () = output.shut() => {}
                }
            }
        }
    }
    output.close();
    tracing::debug!(monitor = monitor.name, "monitor client disconnected");
}

/// What is said with one client.
struct Conversation<'c> {
    monitor: &'c Monitor,
    session: RefCell<Session>,
    arrived: &'c Arrived,
    output: &'c Rc<Output>,
}

impl Conversation<'_> {
    /// Handles what arrives until the end of the input, or until nothing is answered any more.
    async fn run(&self, source: &mut ClientReader) {
        let (ahead, queued) = ahead::queue();
        let in_order = self.handle_all(queued);
        tokio::pin!(in_order);
        tokio::select! {
            () = &mut in_order => {}
            () = self.read(source, ahead) => in_order.await,
        }
    }

    async fn read(&self, source: &mut ClientReader, mut ahead: Ahead) {
        let mut reader = Reader::new();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let messages = match source.read(&mut buffer).await {
                Ok(0) | Err(_) => {
                    if let Some(last) = reader.finish() {
                        let _ended = self.take(last, &ahead).await;
                    }
                    return;
                }
                Ok(n) => {
                    ahead.read(n).await;
                    reader.feed(&buffer[..n])
                }
            };
            for message in messages {
                if !self.take(message, &ahead).await {
                    return;
                }
            }
        }
    }

    /// A message in its turn, or at once; `false`: nothing will be answered any more.
    async fn take(&self, message: Message, ahead: &Ahead) -> bool {
        let oob = self.session.borrow().oob();
        if oob && !message.as_ref().is_ok_and(envelope::overtakes) {
            ahead.push(message).await
        } else {
            self.handle(message).await
        }
    }

    async fn handle_all(&self, mut queued: mpsc::Receiver<Message>) {
        while let Some(message) = queued.recv().await {
            if !self.handle(message).await {
                return;
            }
        }
    }

    /// Answers one message; `false`: nothing will be answered any more.
    async fn handle(&self, message: Message) -> bool {
        self.output.room().await;
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                let answer = envelope::reply(None, Err(Error::from(error)));
                self.output.push(&answer);
                return true;
            }
        };
        let incoming = self.session.borrow_mut().receive(message);
        match incoming {
            Incoming::Negotiated(id) => {
                self.output.push(&envelope::reply(id, Ok(json!({}))));
                self.output.start_events();
                true
            }
            Incoming::Reject(rejection) => {
                let answer = envelope::reply(rejection.id, Err(rejection.error));
                self.output.push(&answer);
                true
            }
            Incoming::Run(request) => {
                let (done, answered) = oneshot::channel();
                let job = Job {
                    request,
                    arrived: self.arrived.clone(),
                    monitor: self.monitor.id.clone(),
                    output: self.output.clone(),
                    done,
                };
                self.monitor.jobs.send(job).is_ok() && answered.await.is_ok()
            }
        }
    }
}
