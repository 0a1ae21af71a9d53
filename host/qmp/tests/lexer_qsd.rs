//! Every byte in every state of the lexer: what qemu-storage-daemon answers, and what we answer.
//!
//! A case is a state's bytes, one byte out of 256, and how the input goes on, followed by a
//! command. Whether that command is answered says where a broken message ends. Byte 255 then brings
//! both readers back to a known state, and a second command says that the case is over.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use outport_qmp::Error;
use outport_qmp::envelope::{Incoming, Session};
use outport_qmp::wire::{ParseError, Reader};
use serde_json::Value;

/// Inputs that leave the lexer, and the parser above it, in one state each.
const STATES: &[&[u8]] = &[
    // Between tokens, wherever the grammar stands.
    b"",
    b" ",
    b"{",
    b"{\"a\"",
    b"{\"a\":",
    b"{\"a\":1",
    b"{\"a\":1 ",
    b"{\"a\":1,",
    b"[",
    b"[1 ",
    b"[1,",
    b"[[",
    b"[{",
    b"{\"a\":[",
    // In strings.
    b"\"",
    b"\"x",
    b"'x",
    b"{\"",
    b"{\"a\":\"",
    b"[[{\"a\":\"",
    // After a backslash, in and after \u.
    b"\"\\",
    b"{\"a\":[\"x\\",
    b"\"\\u",
    b"\"\\u1",
    b"\"\\u123",
    b"\"\\u1234",
    b"\"\\ud83d",
    b"\"\\ud83d\\",
    b"\"\\ud83d\\u",
    b"\"\\ud83d\\ude0",
    // In characters of several bytes.
    b"\"\xc3",
    b"\"\xe2\x82",
    b"\"\xf0\x9f\x98",
    b"\"\xc0",
    // In numbers.
    b"-",
    b"0",
    b"-0",
    b"12",
    b"1.",
    b"1.5",
    b"1e",
    b"1e+",
    b"1e5",
    b"[-",
    b"{\"a\":{\"b\":1.",
    // In keywords.
    b"t",
    b"true",
    b"[nul",
    // After a byte that starts no token, and after one that asks for a clean reader.
    b"@",
    b"@\t",
    b"[[@",
    b"{\"a\":\"\n",
    b"\xff",
    b"\x01",
    // After a mistake of grammar.
    b"[1}",
    b"[[1 1",
    b"{\"a\" 1",
];

/// How the input goes on before the command.
const TAILS: &[&[u8]] = &[b"", b"\n", b"\"\n", b"]}\n"];

/// Cases sent before their answers are read: QSD reads no further ahead than its queue.
const CASES_AT_ONCE: usize = 50;

#[derive(Debug)]
struct Case {
    state: &'static [u8],
    bytes: Vec<u8>,
    /// The case with the commands that follow.
    input: Vec<u8>,
}

impl Case {
    fn new(state: &'static [u8], byte: u8, tail: &[u8]) -> Self {
        let bytes = [state, &[byte], tail].concat();
        let first = b"{\"execute\": \"no-command\", \"id\": \"next\"}\n";
        let last = b"\xff\n{\"execute\": \"no-command\", \"id\": \"end\"}\n";
        let input = [&bytes, &first[..], &last[..]].concat();
        Self {
            state,
            bytes,
            input,
        }
    }

    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for state in STATES {
            for byte in 0..=255 {
                let tails = TAILS.iter().map(|tail| Self::new(state, byte, tail));
                all.extend(tails);
            }
        }
        all
    }
}

/// What may differ: `0e5` is JSON, but for QSD two words; overlong characters are told back.
fn is_known(case: &[u8]) -> bool {
    let of_zero = matches!(
        case,
        [b'0', b'e' | b'E', ..] | [b'-', b'0', b'e' | b'E', ..]
    );
    of_zero || case.starts_with(b"\"\xc0")
}

/// The sentences are for people, and newer versions of QEMU have others.
fn kind(desc: &str) -> &str {
    let of_strings = [
        "Unicode character",
        "escape sequence in string",
        "UTF-8 sequence in string",
    ];
    let of_grammar = ["expect", "missing :", "key is not", "invalid keyword"];
    if of_grammar
        .iter()
        .any(|start| desc.starts_with(&format!("JSON parse error, {start}")))
    {
        "not the grammar"
    } else if of_strings.iter().any(|end| desc.ends_with(end)) {
        "not a string"
    } else {
        desc
    }
}

/// Line and column stand before the sentence since QEMU 11.
fn without_position(desc: &str) -> &str {
    match desc.split_once(": ") {
        Some((position, rest)) if position.bytes().all(|it| it == b':' || it.is_ascii_digit()) => {
            rest
        }
        _ => desc,
    }
}

/// An answer as it is compared: its id, else its sentence.
fn told(id: Option<&Value>, desc: &str) -> String {
    match id {
        Some(id) => format!("answer to {id}"),
        None => kind(without_position(desc)).to_owned(),
    }
}

/// What our reader and envelope make of input.
struct Ours {
    reader: Reader,
    session: Session,
}

impl Ours {
    fn new() -> Self {
        let mut ours = Self {
            reader: Reader::new(),
            session: Session::new(true),
        };
        ours.answers(b"{\"execute\": \"qmp_capabilities\"}\n");
        ours
    }

    fn answers(&mut self, input: &[u8]) -> Vec<String> {
        let outcomes = self.reader.feed(input);
        outcomes.into_iter().map(|it| self.answer(it)).collect()
    }

    fn answer(&mut self, outcome: Result<Value, ParseError>) -> String {
        let message = match outcome {
            Ok(message) => message,
            Err(error) => return told(None, &Error::from(error).desc),
        };
        match self.session.receive(message) {
            Incoming::Negotiated(_) => "negotiated".into(),
            Incoming::Reject(rejection) => told(rejection.id.as_ref(), &rejection.error.desc),
            Incoming::Run(request) => told(request.id.as_ref(), "a command without id"),
        }
    }
}

/// A QSD with its monitor on standard input and output.
struct Qsd {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Drop for Qsd {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Qsd {
    /// `None`: there is none.
    fn start() -> Option<Self> {
        let mut process = match Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=c", "--monitor", "c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        {
            Ok(process) => process,
            Err(error) => {
                eprintln!("SKIPPED: cannot run qemu-storage-daemon: {error}");
                return None;
            }
        };
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut qsd = Self {
            process,
            input,
            output,
        };
        let greeting = qsd.line();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qsd.input
            .write_all(b"{\"execute\": \"qmp_capabilities\"}\n")
            .unwrap();
        qsd.line();
        Some(qsd)
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("QSD answers {line:?}"))
    }

    /// The answers to one case, up to the command that ends it.
    fn answers(&mut self) -> Vec<String> {
        let mut answers = Vec::new();
        loop {
            let answer = self.line();
            let desc = answer["error"]["desc"].as_str().unwrap_or_default();
            let told = told(answer.get("id"), desc);
            let ended = told == "answer to \"end\"";
            answers.push(told);
            if ended {
                return answers;
            }
        }
    }
}

#[test]
fn every_byte_in_every_state_leads_where_qsd_goes() {
    let Some(mut qsd) = Qsd::start() else {
        return;
    };
    let mut ours = Ours::new();
    let cases = Case::all();
    let mut differences = Vec::new();
    let mut states = BTreeSet::new();
    for some in cases.chunks(CASES_AT_ONCE) {
        let input: Vec<_> = some.iter().flat_map(|case| case.input.clone()).collect();
        qsd.input.write_all(&input).unwrap();
        for case in some {
            let (theirs, ours) = (qsd.answers(), ours.answers(&case.input));
            // One example of each state is enough to read.
            if theirs != ours && !is_known(&case.bytes) && states.insert(case.state) {
                let bytes = case.bytes.escape_ascii();
                differences.push(format!("{bytes}\n  QSD  {theirs:?}\n  ours {ours:?}"));
            }
        }
    }
    println!("{} cases compared", cases.len());
    assert!(
        differences.is_empty(),
        "differences in {} states:\n{}",
        differences.len(),
        differences.join("\n")
    );
}
