//! One daemon in one situation: its folder, its process, its monitors, its NBD clients.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use outport_tests::nbd::{Address, Client, Haggle};
use outport_tests::{DEADLINE, Server, eventually};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::situation::Situation;

/// Monitors that every daemon has; a situation uses them by these names.
const MONITORS: [&str; 3] = ["a", "b", "c"];

/// A daemon, killed with the situation.
pub(crate) struct Peer {
    pub(crate) server: Server,
    situation: String,
    folder: TempDir,
    process: Child,
    monitors: BTreeMap<String, Monitor>,
    clients: BTreeMap<String, Client>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (name, server) = (&self.situation, self.server);
            eprintln!("in {name}, {server:?}, which said: {}", self.stderr());
        }
        // It has ended as a rule, and then this fails.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Peer {
    /// Makes the folder and, `prepare` having filled it, starts the daemon.
    pub(crate) fn start(
        situation: &Situation,
        server: Server,
        prepare: impl FnOnce(&TempDir),
    ) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("outport-")
            .tempdir()
            .unwrap();
        prepare(&folder);
        let stderr = File::create(folder.path().join("stderr")).unwrap();
        let mut command = Command::new(server.program());
        for id in MONITORS {
            command.arg("--chardev");
            command.arg(format!("socket,id={id},path={id}.sock,server=on,wait=off"));
            command.args(["--monitor", id]);
        }
        let process = command
            .args(&situation.args)
            // Written when all options have succeeded: then the monitors are ready.
            .args(["--pidfile", "pid"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut peer = Self {
            server,
            situation: situation.name.clone(),
            folder,
            process,
            monitors: BTreeMap::new(),
            clients: BTreeMap::new(),
        };
        let pidfile = peer.path("pid");
        eventually("the daemon is ready", || {
            if let Ok(Some(status)) = peer.process.try_wait() {
                panic!(
                    "{}: {server:?} ended, {status}: {}",
                    situation.name,
                    peer.stderr()
                );
            }
            std::fs::read(&pidfile)
                .is_ok_and(|pid| !pid.is_empty())
                .then_some(())
        });
        peer
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn folder(&self) -> &TempDir {
        &self.folder
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// A negotiated monitor, connected when it is first used.
    pub(crate) fn monitor(&mut self, name: &str) -> &mut Monitor {
        if !self.monitors.contains_key(name) {
            self.greet(name);
            let monitor = self.monitors.get_mut(name).unwrap();
            monitor.send(br#"{"execute": "qmp_capabilities"}"#);
            let answer = monitor.answer();
            assert_eq!(
                answer,
                json!({"return": {}}),
                "negotiation on monitor {name}"
            );
        }
        self.monitors.get_mut(name).unwrap()
    }

    /// Connects without negotiating; the greeting.
    pub(crate) fn greet(&mut self, name: &str) -> Value {
        let path = self.path(&format!("{name}.sock"));
        let mut monitor = Monitor::connect(&path);
        let greeting = monitor.next().unwrap_or(Value::Null);
        self.monitors.insert(name.to_owned(), monitor);
        greeting
    }

    pub(crate) fn hang_up(&mut self, name: &str) {
        self.monitors.remove(name);
    }

    /// All that its monitors were told, by name.
    pub(crate) fn monitors(&mut self) -> &mut BTreeMap<String, Monitor> {
        &mut self.monitors
    }

    /// Attaches an NBD client; what the server says to that.
    pub(crate) fn attach(&mut self, client: &str, export: &str) -> Value {
        let address = Address::Unix(self.path("nbd.sock"));
        match Haggle::connect(&address).and_then(|haggle| haggle.go(export)) {
            Ok(attached) => {
                let info = attached.export.clone();
                self.clients.insert(client.to_owned(), attached);
                json!({"size": info.size, "flags": info.flags})
            }
            Err(_) => json!("refused"),
        }
    }

    pub(crate) fn detach(&mut self, client: &str) {
        let client = self.clients.remove(client).expect("it was attached");
        // The daemon may have cut it off before.
        let _ = client.disconnect();
    }

    /// Waits for the process's end; its exit code.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let status = eventually("the daemon ends", || self.process.try_wait().unwrap());
        status.code()
    }
}

/// A connection to a monitor.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
    /// Every event so far, and how many of them a `wait` has passed.
    pub(crate) events: Vec<Value>,
    waited: usize,
}

impl Monitor {
    fn connect(path: &PathBuf) -> Self {
        let stream = UnixStream::connect(path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
            waited: 0,
        }
    }

    /// Sends bytes; a daemon that has gone is noticed by who reads.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    pub(crate) fn half_close(&mut self) {
        let _ = self.stream.get_ref().shutdown(Shutdown::Write);
    }

    /// The next message that is no event, or `"closed"`.
    pub(crate) fn answer(&mut self) -> Value {
        loop {
            match self.next() {
                None => return json!("closed"),
                Some(message) if message.get("event").is_some() => self.events.push(message),
                Some(message) => return message,
            }
        }
    }

    /// Waits for the next event of that name whose data holds `data`; others are passed.
    pub(crate) fn wait(&mut self, name: &str, data: Option<&Value>) -> Value {
        loop {
            while let Some(event) = self.events.get(self.waited) {
                self.waited += 1;
                let holds = |data: &Value| {
                    let mut members = data.as_object().unwrap().iter();
                    members.all(|(key, value)| event["data"][key] == *value)
                };
                if event["event"] == name && data.is_none_or(holds) {
                    return event["data"].clone();
                }
            }
            match self.next() {
                None => return json!("closed"),
                Some(message) if message.get("event").is_some() => self.events.push(message),
                Some(message) => panic!("no one asked for {message}"),
            }
        }
    }

    /// The next message; `None` when the daemon has closed the connection.
    ///
    /// A message may have several lines (`pretty`).
    fn next(&mut self) -> Option<Value> {
        let mut text = String::new();
        loop {
            match self.stream.read_line(&mut text) {
                Ok(0) => return None,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("waiting for a message: {error}; so far {text:?}"),
                Ok(_) => {}
            }
            match serde_json::from_str::<Value>(&text) {
                Ok(mut message) => {
                    if let Some(members) = message.as_object_mut() {
                        members.remove("timestamp");
                    }
                    return Some(message);
                }
                // Deeper than this parser goes: compared by length.
                Err(error) if error.to_string().contains("recursion limit") => {
                    return Some(json!({ "bytes": text.len() }));
                }
                Err(_) => {}
            }
        }
    }
}
