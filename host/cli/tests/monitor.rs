//! `outport qmp` at a terminal, `jobs` and `events`, against a daemon.
//!
//! The terminal is the one that `script` (util-linux) makes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use outport_tests::{DEADLINE, Daemon, Server, eventually, requires};
use serde_json::{Value, json};

const OUTPORT: &str = env!("CARGO_BIN_EXE_outport");

/// A daemon with a second monitor, for the program under test.
fn daemon() -> (Daemon, PathBuf) {
    let builder = Daemon::builder(Server::Outport);
    let socket = builder.path("ops.sock");
    let chardev = format!("socket,id=ops,path={},server=on,wait=off", socket.display());
    let daemon = builder
        .option("--chardev", chardev)
        .option("--monitor", "ops")
        .start();
    (daemon, socket)
}

/// A program at a terminal.
struct Terminal {
    process: Child,
    keys: ChildStdin,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended as a rule.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Terminal {
    fn start(command: &str, state: &Path) -> Self {
        let mut process = Command::new("script")
            .args(["-qefc", command, "/dev/null"])
            .env("XDG_STATE_HOME", state)
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let keys = process.stdin.take().unwrap();
        let mut output = process.stdout.take().unwrap();
        let (sender, screen) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let seen = String::new();
        Self {
            process,
            keys,
            screen,
            seen,
        }
    }

    fn keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Ends the line; the screen has then nothing of before.
    fn enter(&mut self, keys: &str) {
        self.keys(keys);
        self.keys("\r");
        // The editor lets go of the terminal.
        self.sees("\x1b[?2004l");
    }

    /// Waits until the words stand on the screen, after what was waited for before.
    #[track_caller]
    fn sees(&mut self, words: &str) {
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return;
            }
            match self.screen.recv_timeout(DEADLINE) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("waiting for {words:?}: {error}; seen {:?}", self.seen),
            }
        }
    }

    fn ends(mut self) -> bool {
        eventually("the program ends", || self.process.try_wait().unwrap()).success()
    }
}

#[test]
fn lines_are_edited_completed_and_remembered() {
    if !requires("script") {
        return;
    }
    let (mut daemon, socket) = daemon();
    let state = daemon.path("state");
    let command = format!("{OUTPORT} qmp {}", socket.display());
    let mut terminal = Terminal::start(&command, &state);
    terminal.sees("outport> ");
    terminal.keys("query-block-exp\t");
    terminal.sees("query-block-exports");
    terminal.enter("");
    terminal.sees("[]");
    terminal.sees("outport> ");
    // A member, a value, and one that is wrong.
    terminal.keys("blockdev-add driver=null-co node-n\tn read-o\to\t\t\x15");
    terminal.sees("node-name=");
    terminal.sees("read-only=");
    terminal.enter("blockdev-add driver=null-co node-name=n");
    terminal.sees("outport> ");
    terminal.enter("block-export-del id=nosuch");
    terminal.sees("Export 'nosuch' is not found");
    terminal.sees("outport> ");
    // The line before the last one, changed at its end.
    terminal.enter("\x1b[A\x1b[A2");
    terminal.sees("outport> ");
    terminal.enter("object-add qom-type=secret id=s data=hidden");
    terminal.sees("outport> ");
    // An event from elsewhere comes above the line.
    terminal.keys("query-j");
    let file = daemon.path("new.img");
    let options = json!({"driver": "file", "filename": file, "size": 512});
    daemon.qmp.ok(
        "blockdev-create",
        json!({"job-id": "j", "options": options}),
    );
    terminal.sees("event JOB_STATUS_CHANGE");
    terminal.sees("concluded");
    terminal.enter("obs");
    terminal.sees("\"id\": \"j\"");
    terminal.sees("outport> ");
    terminal.keys("\x04");
    assert!(terminal.ends());
    let nodes = daemon
        .qmp
        .ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "{nodes}");
    let history = std::fs::read_to_string(state.join("outport/qmp-history")).unwrap();
    assert!(history.contains("block-export-del id=nosuch"), "{history}");
    assert!(!history.contains("hidden"), "{history}");

    let mut again = Terminal::start(&command, &state);
    again.sees("outport> ");
    again.keys("\x1b[A");
    again.sees("query-jobs");
    again.enter("\x15quit");
    assert!(again.ends());
    assert!(daemon.wait().success());
}

/// Lines of a program's output, as they come.
fn lines(args: &[&str]) -> (Child, mpsc::Receiver<String>) {
    let mut process = Command::new(OUTPORT)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(process.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    (process, lines)
}

#[test]
fn events_are_followed() {
    let (mut daemon, socket) = daemon();
    let (mut process, lines) = lines(&["events", socket.to_str().unwrap(), "--json", "-n", "1"]);
    let file = daemon.path("new.img");
    // It is not known when it listens: jobs are made until it has heard of one.
    let first = eventually("an event is heard", || {
        let options = json!({"driver": "file", "filename": file, "size": 512});
        daemon.qmp.ok(
            "blockdev-create",
            json!({"job-id": "j", "options": options}),
        );
        while daemon.qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded" {}
        daemon.qmp.ok("job-dismiss", json!({"id": "j"}));
        while daemon.qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "null" {}
        lines.recv_timeout(Duration::from_millis(50)).ok()
    });
    let event: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(event["event"], "JOB_STATUS_CHANGE");
    assert!(event["timestamp"]["seconds"].is_u64());
    assert!(process.wait().unwrap().success(), "it ends after one");
}

#[test]
fn jobs_are_listed_and_followed() {
    let (mut daemon, socket) = daemon();
    let socket = socket.to_str().unwrap();
    let jobs = |more: &[&str]| {
        let args = [&["jobs", socket], more].concat();
        let done = Command::new(OUTPORT)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        (text, done.status.code())
    };
    assert_eq!(
        jobs(&[]),
        ("ID  TYPE  STATUS  DONE  ERROR\n".into(), Some(0))
    );
    assert_eq!(
        jobs(&["--follow"]),
        (String::new(), Some(0)),
        "nothing to wait for"
    );
    let mut create = |id: &str, path: PathBuf| {
        let options = json!({"driver": "file", "filename": path, "size": 512});
        daemon
            .qmp
            .ok("blockdev-create", json!({"job-id": id, "options": options}));
    };
    create("good", PathBuf::from(socket).with_file_name("new.img"));
    let (text, code) = jobs(&["--follow"]);
    assert!(text.ends_with("good create concluded 100 %\n"), "{text}");
    assert_eq!(code, Some(0));
    create("bad", PathBuf::from("/nonexistent/new.img"));
    let (text, code) = jobs(&["--follow"]);
    assert!(
        text.contains("bad create concluded") && text.contains("No such file"),
        "{text}"
    );
    assert_eq!(code, Some(1), "one job failed");
    let (text, _) = jobs(&["--json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
}
