//! What one daemon did in one situation.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use outport_tests::{Server, eventually, try_run};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::peer::Peer;
use crate::situation::{Action, Situation, Step};

/// One thing that happened, in the words of the situation.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) line: usize,
    /// The command, or what else it was: `bytes`, `run`, `events`...
    pub(crate) what: String,
    pub(crate) value: Value,
}

/// All of it, in the order of the steps.
#[derive(Debug)]
pub(crate) struct Transcript {
    pub(crate) situation: String,
    pub(crate) entries: Vec<Entry>,
}

impl Transcript {
    /// Plays a situation to a daemon.
    pub(crate) fn of(situation: &Situation, server: Server) -> Self {
        let mut peer = Peer::start(situation, server, |folder| {
            situation
                .before
                .iter()
                .for_each(|step| make(folder, &step.action));
        });
        let mut transcript = Self {
            situation: situation.name.clone(),
            entries: Vec::new(),
        };
        let mut ended = false;
        for Step { line, action } in &situation.steps {
            ended |= matches!(action, Action::Exit);
            let (what, value) = play(&mut peer, action);
            let value = plain(&peer, value);
            transcript.entries.push(Entry {
                line: *line,
                what,
                value,
            });
        }
        if !ended {
            let value = command(&mut peer, "a", "quit", None);
            transcript.add("quit", value);
            let code = peer.exit_code();
            transcript.add("exit", json!(code));
        }
        let names: Vec<_> = peer.monitors().keys().cloned().collect();
        for name in names {
            let monitor = peer.monitors().get_mut(&name).unwrap();
            // What comes until the connection is closed.
            while monitor.answer() != "closed" {}
            let mut events = std::mem::take(&mut monitor.events);
            order_deletions(&mut events);
            let events = Value::Array(events);
            let events = plain(&peer, events);
            transcript.add(&format!("events of {name}"), events);
        }
        transcript
    }

    fn add(&mut self, what: &str, value: Value) {
        let (line, what) = (usize::MAX, what.to_owned());
        self.entries.push(Entry { line, what, value });
    }
}

/// Exports that go at the same time go in any order, also with QEMU.
fn order_deletions(events: &mut [Value]) {
    let gone = |event: &Value| event["event"] == "BLOCK_EXPORT_DELETED";
    for run in events.chunk_by_mut(|one, next| gone(one) && gone(next)) {
        run.sort_by_key(|event| event["data"]["id"].to_string());
    }
}

/// Carries a step out; what it is called and what came of it.
fn play(peer: &mut Peer, action: &Action) -> (String, Value) {
    let said = |what: &str, value: Value| (what.to_owned(), value);
    match action {
        Action::Make(_) | Action::Write(..) => {
            make(peer.folder(), action);
            said("make", Value::Null)
        }
        Action::Command {
            monitor,
            name,
            arguments,
        } => {
            let mut answer = command(peer, monitor, name, arguments.as_ref());
            settle_graph(&mut answer);
            said(name, answer)
        }
        Action::Bytes { monitor, bytes } => said("bytes", exchange(peer, monitor, bytes)),
        Action::Wait {
            monitor,
            event,
            data,
        } => {
            let seen = peer.monitor(monitor).wait(event, data.as_ref());
            said("wait", json!(seen == "closed"))
        }
        Action::Until { name, value } => {
            eventually(&format!("{name} returns {value}"), || {
                let answer = command(peer, "a", name, None);
                (answer["return"] == *value).then_some(())
            });
            said("until", Value::Null)
        }
        Action::Client(client, export) => said("client", peer.attach(client, export)),
        Action::Detach(client) => {
            peer.detach(client);
            said("detach", Value::Null)
        }
        Action::Greet(monitor) => said("greeting", peer.greet(monitor)),
        Action::HangUp(monitor) => {
            peer.hang_up(monitor);
            said("hang-up", Value::Null)
        }
        Action::HalfClose(monitor) => {
            peer.monitor(monitor).half_close();
            said("half-close", Value::Null)
        }
        Action::Eof(monitor) => {
            // Whoever was asked before the end is still answered.
            let mut last = Vec::new();
            let monitor = peer.monitor(monitor);
            loop {
                match monitor.answer() {
                    end if end == "closed" => break said("eof", Value::Array(last)),
                    answer => last.push(answer),
                }
            }
        }
        Action::Run(args) => said("run", run(peer, args)),
        Action::Exit => said("exit", json!(peer.exit_code())),
    }
}

fn command(peer: &mut Peer, monitor: &str, name: &str, arguments: Option<&Value>) -> Value {
    let mut message = json!({"execute": name});
    if let Some(arguments) = arguments {
        message["arguments"] = arguments.clone();
    }
    let monitor = peer.monitor(monitor);
    monitor.send(message.to_string().as_bytes());
    monitor.answer()
}

/// Sends bytes, then makes the daemon say that it has read them: everything up to that.
pub(crate) fn exchange(peer: &mut Peer, monitor: &str, bytes: &[u8]) -> Value {
    let monitor = peer.monitor(monitor);
    monitor.send(bytes);
    monitor.send(b"\n{\"execute\": \"query-version\", \"id\": \"all read\"}\n");
    let mut answers = Vec::new();
    loop {
        let answer = monitor.answer();
        if answer == "closed" || answer["id"] == "all read" {
            // Before negotiation it is an error, and that both say the same one.
            return Value::Array(answers);
        }
        answers.push(answer);
    }
}

/// Runs another daemon that has to end by itself.
fn run(peer: &Peer, args: &[String]) -> Value {
    let program = peer.server.program();
    let done = Command::new("timeout")
        .args(["-k", "1", "20"])
        .arg(&program)
        .args(args)
        .current_dir(peer.folder().path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let name = program.file_name().unwrap().to_str().unwrap();
    let text = String::from_utf8_lossy(&done.stderr);
    // QEMU says its path where it says its name.
    let text = text.replace(&program.display().to_string(), name);
    json!({"code": done.status.code(), "stderr": text.replace(name, "PROGRAM")})
}

fn make(folder: &TempDir, action: &Action) {
    match action {
        Action::Make(words) => {
            let place = folder.path().to_str().unwrap();
            let args = [
                &["-C", place][..],
                &words.iter().map(String::as_str).collect::<Vec<_>>(),
            ];
            let done = try_run("env", &args.concat());
            assert_eq!(done.code, Some(0), "{words:?}: {}", done.err);
        }
        Action::Write(file, text) => std::fs::write(folder.path().join(file), text).unwrap(),
        _ => {}
    }
}

/// The value without what is of this run only: the folder's name, numbers of unnamed nodes, and
/// where a text could not be parsed (its wording is no interface).
fn plain(peer: &Peer, mut value: Value) -> Value {
    let mut names = BTreeMap::new();
    let folder = peer.folder().path().to_str().unwrap().to_owned();
    change_texts(&mut value, &mut |text| {
        *text = text.replace(&folder, "FOLDER");
        while let Some(at) = text.find("#block") {
            let digits = text[at + 6..]
                .chars()
                .take_while(char::is_ascii_digit)
                .count();
            let end = at + 6 + digits;
            let count = names.len();
            let number = *names.entry(text[at..end].to_owned()).or_insert(count);
            text.replace_range(at..end, &format!("#unnamed{number}"));
        }
        let words = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':' || c == ' ');
        if words.starts_with("JSON parse error")
            || words.starts_with("JSON ") && words.ends_with("exceeded")
        {
            *text = "JSON parse error".into();
        }
    });
    value
}

/// A drawn graph without what is arbitrary in it: numbers of this answer only, and orders of sets.
fn settle_graph(value: &mut Value) {
    let Some(graph) = value
        .get_mut("return")
        .filter(|it| it.get("edges").is_some())
    else {
        return;
    };
    let label = |node: &Value| json!(format!("{} {}", node["type"], node["name"]));
    let mut labels = BTreeMap::new();
    for node in graph["nodes"].as_array_mut().unwrap() {
        let label = label(node);
        labels.insert(node["id"].take().to_string(), label.clone());
        node["id"] = label;
    }
    for edge in graph["edges"].as_array_mut().unwrap() {
        for end in ["parent", "child"] {
            edge[end] = labels[&edge[end].to_string()].clone();
        }
        for set in ["perm", "shared-perm"] {
            edge[set]
                .as_array_mut()
                .unwrap()
                .sort_by_key(Value::to_string);
        }
    }
    for list in ["nodes", "edges"] {
        graph[list]
            .as_array_mut()
            .unwrap()
            .sort_by_key(Value::to_string);
    }
}

fn change_texts(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(list) => list.iter_mut().for_each(|one| change_texts(one, change)),
        Value::Object(members) => members
            .values_mut()
            .for_each(|one| change_texts(one, change)),
        _ => {}
    }
}
