//! The client's side of a monitor: connects, negotiates, runs one command at a time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use outport_qmp::wire::{self, Reader};
use serde_json::{Map, Value, json};

/// A monitor serves one client at a time; the next one waits for its greeting. Longer than a
/// busy machine needs to answer.
const GREETING_TIME_MAX: Duration = Duration::from_secs(10);

/// A negotiated connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    messages: Messages,
}

/// What a daemon answered.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The message, `{"return": ...}` or `{"error": ...}`.
    pub(crate) message: Value,
}

impl Answer {
    /// What was returned, or the daemon's sentence.
    pub(crate) fn result(mut self) -> Result<Value> {
        if let Some(value) = self.message.get_mut("return") {
            return Ok(value.take());
        }
        match self.message["error"]["desc"].as_str() {
            Some(sentence) => Err(anyhow!("{sentence}")),
            None => Err(anyhow!("The answer is no QMP: {}", self.message)),
        }
    }
}

impl Client {
    /// Connects to the monitor on a unix socket and leaves negotiation.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let shown = path.display();
        let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow!(
                "There is no socket '{shown}': give the path that the daemon was started with, \
                 --chardev socket,id=qmp,path={shown},server=on,wait=off --monitor chardev=qmp"
            ),
            ErrorKind::ConnectionRefused => {
                anyhow!("Nobody listens on '{shown}': the daemon that made the socket has ended")
            }
            ErrorKind::PermissionDenied => anyhow!(
                "No permission for the socket '{shown}': only its owner may talk to the daemon"
            ),
            _ => anyhow!("Cannot connect to '{shown}': {error}"),
        })?;
        stream.set_read_timeout(Some(GREETING_TIME_MAX))?;
        let mut client = Self {
            messages: Messages::of(stream.try_clone()?),
            stream,
        };
        let greeting = client.messages.next().map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => anyhow!(
                "The monitor '{shown}' does not answer: it serves one client at a time, and \
                 another one is connected"
            ),
            _ => anyhow!("Cannot read from '{shown}': {error}"),
        })?;
        if greeting.is_none_or(|message| message.get("QMP").is_none()) {
            bail!("'{shown}' is no QMP monitor");
        }
        client.call("qmp_capabilities", &Map::new())?;
        client.stream.set_read_timeout(None)?;
        Ok(client)
    }

    /// Runs a command; what it returns, or the daemon's sentence.
    pub(crate) fn call(&mut self, command: &str, arguments: &Map<String, Value>) -> Result<Value> {
        self.execute(command, arguments)?.result()
    }

    /// Runs a command; events that come before the answer are dropped.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: &Map<String, Value>,
    ) -> Result<Answer> {
        self.send(&request(command, arguments))?;
        loop {
            let message = self
                .messages
                .next()
                .context("Cannot read from the monitor")?;
            let message = message.ok_or_else(|| anyhow!("The daemon closed the monitor"))?;
            if message.get("event").is_none() {
                return Ok(Answer { message });
            }
        }
    }

    /// Sends any message.
    pub(crate) fn send(&mut self, message: &Value) -> Result<()> {
        let line = wire::line(message);
        self.stream
            .write_all(&line)
            .context("Cannot write to the monitor")
    }

    /// Two halves: one to send with, one to read messages from on another thread.
    pub(crate) fn into_halves(self) -> (UnixStream, Messages) {
        (self.stream, self.messages)
    }
}

/// A request without an id: answers come in order.
pub(crate) fn request(command: &str, arguments: &Map<String, Value>) -> Value {
    match arguments.is_empty() {
        true => json!({"execute": command}),
        false => json!({"execute": command, "arguments": arguments}),
    }
}

/// The messages of a monitor, as they come.
#[derive(Debug)]
pub(crate) struct Messages {
    stream: UnixStream,
    reader: Reader,
    ready: std::collections::VecDeque<Value>,
}

impl Messages {
    fn of(stream: UnixStream) -> Self {
        Self {
            stream,
            reader: Reader::new(),
            ready: std::collections::VecDeque::new(),
        }
    }

    /// The next message; `None` when the daemon has closed the monitor.
    pub(crate) fn next(&mut self) -> io::Result<Option<Value>> {
        let mut bytes = [0; 8192];
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Ok(Some(message));
            }
            let count = match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            };
            for value in self.reader.feed(&bytes[..count]) {
                let value = value.map_err(|_| {
                    io::Error::new(ErrorKind::InvalidData, "what the daemon says is no JSON")
                })?;
                self.ready.push_back(value);
            }
        }
    }
}
