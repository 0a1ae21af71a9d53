//! A daemon under test and a small QMP client.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing here takes longer unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const OUTPORTD: &str = env!("CARGO_BIN_EXE_outportd");
pub(crate) const QSD: &str = "qemu-storage-daemon";

/// Whether a tool is there; says so if it is not. In CI that is a failure.
pub(crate) fn has(tool: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {tool}")])
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        assert_ne!(
            std::env::var("CI").as_deref(),
            Ok("true"),
            "{tool} is missing in CI"
        );
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// A pipe in the file system: who opens it waits for the other side.
pub(crate) fn make_pipe(path: &str) {
    let made = Command::new("mkfifo").arg(path).status();
    assert!(made.unwrap().success());
}

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client of one monitor.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that came before answers.
    pub(crate) events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and reads the greeting.
    #[track_caller]
    pub(crate) fn connect(path: &Path) -> Self {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < DEADLINE, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let writer = stream.try_clone().unwrap();
        let mut qmp = Self {
            reader: BufReader::new(stream),
            writer,
            events: VecDeque::new(),
        };
        let greeting = qmp.read().unwrap();
        assert!(
            greeting["QMP"]["version"]["qemu"]["major"].is_number(),
            "{greeting}"
        );
        qmp
    }

    /// Connects and negotiates.
    #[track_caller]
    pub(crate) fn negotiated(path: &Path) -> Self {
        let mut qmp = Self::connect(path);
        qmp.ok("qmp_capabilities", json!({}));
        qmp
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).unwrap();
    }

    /// The socket, for what a line cannot say.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.writer
    }

    /// Whether nothing has come since the last message.
    pub(crate) fn has_nothing_to_read(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let arrived = rustix::net::recv(&self.writer, &mut [0; 1], flags);
        self.reader.buffer().is_empty() && arrived == Err(Errno::WOULDBLOCK)
    }

    pub(crate) fn half_close(&self) {
        self.writer.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// The next message; `None` at the end.
    pub(crate) fn read(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    /// The next answer; events are kept.
    pub(crate) fn answer(&mut self) -> Option<Value> {
        loop {
            let message = self.read()?;
            if message.get("event").is_none() {
                return Some(message);
            }
            self.events.push_back(message);
        }
    }

    #[track_caller]
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments});
        self.send(format!("{line}\n").as_bytes());
        self.answer().expect("an answer")
    }

    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.execute(command, arguments);
        answer
            .get("return")
            .cloned()
            .unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    /// The sentence of the error that is expected.
    #[track_caller]
    pub(crate) fn err(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.execute(command, arguments);
        let desc = answer["error"]["desc"].as_str();
        desc.unwrap_or_else(|| panic!("{command}: {answer}"))
            .to_owned()
    }

    /// The next event, which has this name; returns its data.
    #[track_caller]
    pub(crate) fn event(&mut self, name: &str) -> Value {
        let event = match self.events.pop_front() {
            Some(event) => event,
            None => self.read().expect("an event"),
        };
        assert_eq!(event["event"], name, "{event}");
        event["data"].clone()
    }
}

/// A running daemon; killed with the test.
pub(crate) struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts outportd with a monitor and these further options. `{}` in them is the folder.
    #[track_caller]
    pub(crate) fn start(options: &[&str]) -> Self {
        Self::start_with(options, tempfile::tempdir().unwrap())
    }

    /// The same for the oracle; `None`: it is not installed.
    #[track_caller]
    pub(crate) fn qsd(options: &[&str]) -> Option<Self> {
        let options = [options, &["--pidfile", "{}/pid"]].concat();
        let daemon = has(QSD).then(|| Self::run(QSD, &options, tempfile::tempdir().unwrap()))?;
        // Who connects before its monitor is up may not be greeted, or twice.
        eventually("QSD is up", || daemon.path("pid").exists());
        Some(daemon)
    }

    #[track_caller]
    pub(crate) fn start_with(options: &[&str], folder: TempDir) -> Self {
        Self::run(OUTPORTD, options, folder)
    }

    #[track_caller]
    fn run(program: &str, options: &[&str], folder: TempDir) -> Self {
        let path = folder.path().to_str().unwrap().to_owned();
        let chardev = format!("socket,id=m,path={path}/qmp,server=on,wait=off");
        let stderr = std::fs::File::create(folder.path().join("stderr")).unwrap();
        let child = Command::new(program)
            .args(["--chardev", &chardev, "--monitor", "m"])
            .args(options.iter().map(|option| option.replace("{}", &path)))
            .env("OUTPORTD_CACHE_DIR", "")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    #[track_caller]
    pub(crate) fn qmp(&self) -> Qmp {
        Qmp::negotiated(&self.path("qmp"))
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        eventually("the daemon ends", || self.has_ended());
        self.child.wait().unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the daemon said:\n{}", self.log());
        }
    }
}

/// Sends the same commands to outportd and to the oracle and compares what is answered: all of an
/// error, and all of a result. `$D` in arguments is the folder of whoever is asked.
#[track_caller]
pub(crate) fn compare(options: &[&str], commands: &[(&str, Value)]) {
    let ours = Daemon::start(options);
    let theirs = Daemon::qsd(options);
    let mut our_monitor = ours.qmp();
    let mut their_monitor = theirs.as_ref().map(Daemon::qmp);
    for (command, arguments) in commands {
        let at = |daemon: &Daemon| {
            let folder = daemon
                .path("")
                .to_str()
                .unwrap()
                .trim_end_matches('/')
                .to_owned();
            let text = arguments.to_string().replace("$D", &folder);
            (serde_json::from_str::<Value>(&text).unwrap(), folder)
        };
        let (wanted, folder) = at(&ours);
        let our_answer = our_monitor.execute(command, wanted);
        let (Some(daemon), Some(monitor)) = (&theirs, &mut their_monitor) else {
            continue;
        };
        let (wanted, their_folder) = at(daemon);
        let their_answer = monitor.execute(command, wanted);
        let same = our_answer.to_string().replace(&folder, "$D");
        let same = serde_json::from_str::<Value>(&same).unwrap();
        let their_answer = their_answer.to_string().replace(&their_folder, "$D");
        let their_answer = serde_json::from_str::<Value>(&their_answer).unwrap();
        assert_eq!(sorted(same), sorted(their_answer), "{command} {arguments}");
    }
}

/// Sends the same to both and compares errors and successes.
#[track_caller]
pub(crate) fn same(requests: &[(&str, Value)]) {
    let ask = |daemon: Daemon| -> Vec<_> {
        let mut qmp = daemon.qmp();
        let answers = requests.iter();
        answers
            .map(|(command, arguments)| qmp.execute(command, arguments.clone()))
            .collect()
    };
    // One after the other: they may want the same files.
    let Some(theirs) = Daemon::qsd(&[]).map(ask) else {
        return;
    };
    let ours = ask(Daemon::start(&[]));
    for (number, (command, arguments)) in requests.iter().enumerate() {
        let errors = [&ours, &theirs].map(|answers| answers[number].get("error"));
        assert_eq!(errors[0], errors[1], "{command} {arguments}");
    }
}

/// Lists whose order is QEMU's hash order are compared as sets.
fn sorted(mut answer: Value) -> Value {
    if let Some(list) = answer.get_mut("return").and_then(Value::as_array_mut) {
        list.sort_by_key(ToString::to_string);
    }
    answer
}

/// The members of `base` with those of `more`.
pub(crate) fn with(mut base: Value, more: &Value) -> Value {
    let members = base.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    base
}

/// A file of `len` bytes.
pub(crate) fn file(path: &Path, len: u64) {
    std::fs::File::create(path).unwrap().set_len(len).unwrap();
}

/// Runs `qemu-img`.
#[track_caller]
pub(crate) fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// The arguments of `object-add` for the bundled qcow2 plugin as an operator's, not pinned yet.
pub(crate) fn plugin_object(daemon: &Daemon, id: &str) -> Value {
    let bundled = outport_plugins::bundled()
        .iter()
        .find(|it| it.name == "qcow2")
        .unwrap();
    let path = daemon.path("plugin.wasm");
    std::fs::write(&path, bundled.wasm).unwrap();
    json!({"qom-type": "wasm-plugin", "id": id, "filename": path})
}

/// Pins the object to the hash that the refusal to load it unpinned tells.
#[track_caller]
pub(crate) fn pin(object: &mut Value, refusal: &str) {
    let (_, rest) = refusal
        .split_once("The file has ")
        .expect("the refusal tells the hash");
    object["sha256"] = json!(rest.split_once(';').unwrap().0);
}

/// An NBD client that has named its export and stays.
pub(crate) struct Nbd {
    stream: UnixStream,
}

impl Nbd {
    /// Enters `export`; `None` if the server refuses.
    #[track_caller]
    pub(crate) fn enter(path: &Path, export: &str) -> Option<Self> {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle, no zeroes; then NBD_OPT_GO (7) without information requests.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(7_u32.to_be_bytes());
        hello.extend((export.len() as u32 + 6).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0_u16.to_be_bytes());
        stream.write_all(&hello).unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data).unwrap();
            match word(12) {
                1 => return Some(Self { stream }),
                3 => {}
                _ => return None,
            }
        }
    }

    /// Reads; `None` if the server hung up or said no.
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Option<Vec<u8>> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 0]);
        request.extend(1_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        self.stream.write_all(&request).ok()?;
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).ok()?;
        let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
        if error != 0 {
            return None;
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).ok()?;
        Some(data)
    }

    /// Whether the server has hung up.
    pub(crate) fn is_cut(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}
