//! One client of a monitor: from its greeting to its end.
//!
//! Reads and writes go on side by side. Reading stops while a command runs (a client has one in
//! flight) and while the client does not read its answers. After the client's half-close what it
//! asked for is still answered.

use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::envelope::{self, Incoming, Session};
use outport_qmp::wire::{ParseError, Reader};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

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
    let mut session = Session::new(true);
    output.push(&session.greeting(&commands::version()));
    tracing::debug!(monitor = monitor.name, "monitor client connected");

    {
        let writing = output.write_to(&mut writer);
        let reading = read(monitor, &mut session, (&mut reader, &arrived), &output);
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

/// Handles what arrives, in order, until the end of the input.
async fn read(
    monitor: &Monitor,
    session: &mut Session,
    (source, arrived): (&mut ClientReader, &Arrived),
    output: &Rc<Output>,
) {
    let mut reader = Reader::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let messages = match source.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                if let Some(last) = reader.finish() {
                    let _ended = handle(monitor, session, (last, arrived), output).await;
                }
                return;
            }
            Ok(n) => reader.feed(&buffer[..n]),
        };
        for message in messages {
            if !handle(monitor, session, (message, arrived), output).await {
                return;
            }
        }
    }
}

/// Answers one message; `false`: nothing will be answered any more.
async fn handle(
    monitor: &Monitor,
    session: &mut Session,
    (message, arrived): (Result<Value, ParseError>, &Arrived),
    output: &Rc<Output>,
) -> bool {
    output.room().await;
    let message = match message {
        Ok(message) => message,
        Err(error) => {
            output.push(&envelope::reply(None, Err(Error::from(error))));
            return true;
        }
    };
    match session.receive(message) {
        Incoming::Negotiated(id) => {
            output.push(&envelope::reply(id, Ok(json!({}))));
            output.start_events();
            true
        }
        Incoming::Reject(rejection) => {
            output.push(&envelope::reply(rejection.id, Err(rejection.error)));
            true
        }
        Incoming::Run(request) => {
            let (done, answered) = oneshot::channel();
            let job = Job {
                request,
                arrived: arrived.clone(),
                monitor: monitor.id.clone(),
                output: output.clone(),
                done,
            };
            monitor.jobs.send(job).is_ok() && answered.await.is_ok()
        }
    }
}
