//! A small QMP client: one command at a time, events kept for later.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::wait::DEADLINE;

/// A QMP error reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`...
    pub class: String,
    /// The sentence.
    pub desc: String,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

/// A negotiated monitor connection.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// What the server said first.
    pub greeting: Value,
}

impl Qmp {
    /// Connects, reads the greeting and negotiates without capabilities.
    ///
    /// QEMU greets twice, and forgets the negotiation, when a client comes while the monitor is
    /// being set up: an error here means "try again".
    pub fn connect(path: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let stream = BufReader::new(stream);
        let mut qmp = Self {
            stream,
            events: VecDeque::new(),
            greeting: Value::Null,
        };
        qmp.greeting = qmp.message()?.ok_or(ErrorKind::UnexpectedEof)?;
        for command in ["qmp_capabilities", "query-version"] {
            let line = json!({"execute": command}).to_string();
            qmp.stream.get_mut().write_all(line.as_bytes())?;
            let mut answer = qmp.message()?.ok_or(ErrorKind::UnexpectedEof)?;
            while answer.get("QMP").is_some() {
                answer = qmp.message()?.ok_or(ErrorKind::UnexpectedEof)?;
            }
            if answer.get("return").is_none() {
                return Err(std::io::Error::other(format!("{command}: {answer}")));
            }
        }
        Ok(qmp)
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let shown = arguments.to_string();
        match self.execute(command, arguments) {
            Ok(value) => value,
            Err(error) => panic!("{command} {shown}: {error}"),
        }
    }

    /// Runs a command that must fail.
    #[track_caller]
    pub fn err(&mut self, command: &str, arguments: Value) -> (String, String) {
        let shown = arguments.to_string();
        match self.execute(command, arguments) {
            Ok(value) => panic!("{command} {shown} succeeded: {value}"),
            Err(error) => (error.class, error.desc),
        }
    }

    /// Runs a command.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, arguments);
        self.response(command)
    }

    /// Sends a command without waiting for its answer.
    #[track_caller]
    pub fn send(&mut self, command: &str, arguments: Value) {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.raw(&(line + "\n"));
    }

    /// Sends text as it is.
    #[track_caller]
    pub fn raw(&mut self, text: &str) {
        if let Err(error) = self.stream.get_mut().write_all(text.as_bytes()) {
            panic!("QMP send of {text}: {error}");
        }
    }

    /// Waits for the answer to the command sent last; events that come first are kept.
    #[track_caller]
    pub fn response(&mut self, command: &str) -> Result<Value, QmpError> {
        loop {
            let mut message = match self.message() {
                Ok(Some(message)) => message,
                Ok(None) => panic!("{command}: the server closed the monitor"),
                Err(error) => panic!("{command}: no answer: {error}"),
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                let word = |key: &str| message["error"][key].as_str().unwrap_or("?").to_owned();
                return Err(QmpError {
                    class: word("class"),
                    desc: word("desc"),
                });
            }
        }
    }

    /// The next event of that name, with `timestamp`, `event` and `data`; others stay.
    #[track_caller]
    pub fn wait_event(&mut self, name: &str) -> Value {
        loop {
            let found = self.events.iter().position(|event| event["event"] == name);
            if let Some(event) = found.and_then(|at| self.events.remove(at)) {
                return event;
            }
            match self.message() {
                Ok(Some(message)) => self.events.push_back(message),
                Ok(None) => panic!("waiting for {name}: the server closed the monitor"),
                Err(error) => panic!("waiting for {name}: {error}; had {:?}", self.events),
            }
        }
    }

    /// All events so far of that name, without waiting.
    pub fn events(&mut self, name: &str) -> Vec<Value> {
        // A synchronous command flushes what was sent before its answer.
        self.ok("query-version", json!({}));
        self.events
            .iter()
            .filter(|event| event["event"] == name)
            .cloned()
            .collect()
    }

    /// The events that came so far, oldest first; they are forgotten here.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// True when the server has closed this monitor.
    pub fn closed(&mut self) -> bool {
        matches!(self.message(), Ok(None))
    }

    /// Bounds every wait on this monitor.
    pub fn set_timeout(&mut self, limit: Duration) {
        self.stream
            .get_ref()
            .set_read_timeout(Some(limit))
            .expect("a nonzero timeout");
    }

    fn message(&mut self) -> std::io::Result<Option<Value>> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).map_err(|error| {
            std::io::Error::new(ErrorKind::InvalidData, format!("{error} in {line}"))
        })
    }
}
