//! `outport qmp`: one command, or a line of them after another.

use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::net::Shutdown;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, bail};
use outport_qmp::wire;
use serde_json::{Map, Value, json};

use crate::args::Qmp;
use crate::client::{Answer, Client, request};
use crate::editor;
use crate::keyval::{self, Arguments, Schema};
use crate::output::{json_line, json_pretty, print};
use crate::words;

pub(crate) fn run(qmp: &Qmp) -> Result<ExitCode> {
    let mut client = Client::connect(&qmp.socket)?;
    let Some(command) = &qmp.command else {
        return lines(client, qmp.json);
    };
    let arguments = match keyval::read(&qmp.arguments)? {
        Arguments::Typed(object) => object,
        Arguments::Pairs(pairs) if pairs.is_empty() => pairs,
        Arguments::Pairs(pairs) => {
            // A daemon without a schema gets text, and says what it thinks of it.
            let schema = client
                .call("query-qmp-schema", &Map::new())
                .unwrap_or_default();
            Schema::new(schema).typed(command, pairs)
        }
    };
    let answer = client.execute(command, &arguments)?;
    if qmp.json {
        json_line(&answer.message)?;
        let refused = answer.message.get("error").is_some();
        return Ok(if refused {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        });
    }
    returned(&answer.result()?)?;
    Ok(ExitCode::SUCCESS)
}

/// What a command returned, for people: nothing to say about `{}`.
fn returned(value: &Value) -> Result<()> {
    match value {
        Value::Object(empty) if empty.is_empty() => Ok(()),
        value => json_pretty(value),
    }
}

/// What happens in line mode, from either side.
enum Input {
    Line(String),
    NoMoreLines,
    Message(Value),
    Closed,
}

/// Reads commands from standard input until it ends and everything is answered.
fn lines(mut client: Client, json: bool) -> Result<ExitCode> {
    let schema = client
        .call("query-qmp-schema", &Map::new())
        .unwrap_or_default();
    let schema = Schema::new(schema);
    if editor::is_wanted() {
        return editor::run(client, schema, json);
    }
    let (stream, mut messages) = client.into_halves();
    let (inputs, events) = mpsc::sync_channel(16);
    let from_daemon = inputs.clone();
    thread::spawn(move || {
        while let Ok(Some(message)) = messages.next() {
            if from_daemon.send(Input::Message(message)).is_err() {
                return;
            }
        }
        // Nobody listens any more only when everything has ended.
        let _ = from_daemon.send(Input::Closed);
    });
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if inputs.send(Input::Line(line)).is_err() {
                return;
            }
        }
        let _ = inputs.send(Input::NoMoreLines);
    });

    let mut session = Session::new(schema, json);
    let mut waiting = VecDeque::new();
    let (mut unanswered, mut ended) = (0_usize, false);
    while !(ended && unanswered == 0 && waiting.is_empty()) {
        match events.recv()? {
            Input::Line(line) => waiting.push_back(line),
            Input::NoMoreLines => ended = true,
            Input::Message(message) => {
                if message.get("event").is_none() {
                    unanswered = unanswered.saturating_sub(1);
                }
                session.show(message)?;
            }
            // After `quit` that is what was asked for.
            Input::Closed if unanswered == 0 && waiting.is_empty() => break,
            Input::Closed => bail!("The daemon closed the monitor"),
        }
        // One at a time, so that an answer follows its command on the screen.
        while unanswered == 0 {
            let Some(line) = waiting.pop_front() else {
                break;
            };
            match session.request(&line) {
                Ok(Some(request)) => {
                    io::Write::write_all(&mut &stream, &wire::line(&request))?;
                    unanswered += 1;
                }
                Ok(None) => {}
                Err(error) => session.complain(&error),
            }
        }
    }
    // The reading thread wakes up; the process would not wait for it anyway.
    let _ = stream.shutdown(Shutdown::Both);
    Ok(if session.failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What lines mean and how answers look.
pub(crate) struct Session {
    schema: Schema,
    json: bool,
    failed: bool,
}

impl Session {
    pub(crate) fn new(schema: Schema, json: bool) -> Self {
        let failed = false;
        Self {
            schema,
            json,
            failed,
        }
    }

    /// An event as it is printed.
    pub(crate) fn event(message: &Value, json: bool) -> String {
        if json {
            return format!("{message}\n");
        }
        let name = message["event"].as_str().unwrap_or_default();
        let data = message.get("data").cloned().unwrap_or(json!({}));
        format!("event {name} {data}\n")
    }

    /// The request that a line asks for; none for an empty line or a comment.
    pub(crate) fn request(&self, line: &str) -> Result<Option<Value>> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(None);
        }
        if line.starts_with('{') {
            let message = wire::parse_one(line.as_bytes()).map_err(|error| anyhow!(error.desc))?;
            return Ok(Some(message));
        }
        let words = words::split(line)?;
        let Some((command, arguments)) = words.split_first() else {
            return Ok(None);
        };
        let arguments = match keyval::read(arguments)? {
            Arguments::Typed(object) => object,
            Arguments::Pairs(pairs) => self.schema.typed(command, pairs),
        };
        Ok(Some(request(command, &arguments)))
    }

    pub(crate) fn show(&mut self, message: Value) -> Result<()> {
        if message.get("error").is_some() {
            self.failed = true;
        }
        if self.json {
            return json_line(&message);
        }
        if message.get("event").is_some() {
            return print(&Self::event(&message, false));
        }
        match (Answer { message }).result() {
            Ok(value) => returned(&value),
            Err(error) => {
                self.complain(&error);
                Ok(())
            }
        }
    }

    pub(crate) fn complain(&mut self, error: &anyhow::Error) {
        self.failed = true;
        eprintln!("outport: {error:#}");
    }
}
