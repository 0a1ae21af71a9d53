//! A scripted situation, one file each.
//!
//! ```text
//! # what it shows
//! - make qemu-img create -f qcow2 a.qcow2 1M     runs in the folder of each daemon
//! - write FILE TEXT                              a small file
//! - args --object iothread,id=io0                more of the daemon's command line
//! - needs blockdev-reopen throttle               waits until the schema has these names
//! query-version                                  a command on monitor a, and its answer
//! blockdev-del {"node-name": "n"}                with arguments, which may go on
//!     on lines that are indented
//! @b query-version                               on monitor b
//! < {"execute": 1} \xff                          bytes; then what came back until all is quiet
//! - wait BLOCK_EXPORT_DELETED {"id": "e"}        the next such event, on monitor a
//! - client c1 EXPORT                             an NBD client attaches; `nbd.sock`
//! - detach c1                                    and says goodbye
//! - greet b                                      connects without negotiating
//! - hang-up b                                    closes the connection; `half-close b`
//! - until query-jobs [...]                       repeats a command until it returns that
//! - eof b                                        the daemon closes the connection
//! - run --blockdev nosuch                        another daemon with only this command line
//! - exit                                         the daemon's own end, without `quit`
//! ```
//! Words are separated by spaces; single quotes keep them together. At its end a situation quits.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// One situation.
#[derive(Debug, Default)]
pub(crate) struct Situation {
    pub(crate) name: String,
    /// More of the daemon's command line.
    pub(crate) args: Vec<String>,
    /// Names of the schema without which it cannot be played yet.
    pub(crate) needs: Vec<String>,
    /// What is done before the daemon starts.
    pub(crate) before: Vec<Step>,
    pub(crate) steps: Vec<Step>,
}

/// One step and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) line: usize,
    pub(crate) action: Action,
}

#[derive(Clone, Debug)]
pub(crate) enum Action {
    Make(Vec<String>),
    Write(String, String),
    Command {
        monitor: String,
        name: String,
        arguments: Option<Value>,
    },
    Bytes {
        monitor: String,
        bytes: Vec<u8>,
    },
    Wait {
        monitor: String,
        event: String,
        data: Option<Value>,
    },
    Until {
        name: String,
        value: Value,
    },
    Client(String, String),
    Detach(String),
    Greet(String),
    HangUp(String),
    HalfClose(String),
    Eof(String),
    Run(Vec<String>),
    Exit,
}

impl Situation {
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let mut situation = Self {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            args: Vec::new(),
            needs: Vec::new(),
            before: Vec::new(),
            steps: Vec::new(),
        };
        for (line, text) in joined(&text) {
            if let Some(args) = text.strip_prefix("- args ") {
                situation.args.extend(words(args));
                continue;
            }
            if let Some(names) = text.strip_prefix("- needs ") {
                situation.needs.extend(words(names));
                continue;
            }
            let action = action(&text).unwrap_or_else(|| panic!("{path:?}:{line}: {text}"));
            let step = Step { line, action };
            let early = matches!(step.action, Action::Make(_) | Action::Write(..));
            if early && situation.steps.is_empty() {
                situation.before.push(step);
            } else {
                situation.steps.push(step);
            }
        }
        situation
    }

    /// How many commands it runs; a command line counts for one, bytes for one.
    pub(crate) fn commands(&self) -> usize {
        let counted = |step: &&Step| {
            matches!(
                step.action,
                Action::Command { .. } | Action::Bytes { .. } | Action::Run(_)
            )
        };
        self.steps.iter().filter(counted).count()
    }
}

/// Lines that say something, each with what continues it, numbered from 1.
fn joined(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let words = line.trim();
        if words.is_empty() || words.starts_with('#') {
            continue;
        }
        match lines.last_mut() {
            Some((_, before)) if line.starts_with(' ') => {
                before.push(' ');
                before.push_str(words);
            }
            _ => lines.push((at + 1, line.to_owned())),
        }
    }
    lines
}

fn action(text: &str) -> Option<Action> {
    if let Some(rest) = text.strip_prefix("- ") {
        return directive(rest);
    }
    let (monitor, rest) = match text.strip_prefix('@') {
        Some(rest) => rest.split_once(' ')?,
        None => ("a", text),
    };
    let monitor = monitor.to_owned();
    if let Some(bytes) = rest.strip_prefix('<') {
        let bytes = unescaped(bytes.strip_prefix(' ').unwrap_or(bytes))?;
        return Some(Action::Bytes { monitor, bytes });
    }
    let (name, arguments) = value_after(rest)?;
    Some(Action::Command {
        monitor,
        name,
        arguments,
    })
}

fn directive(text: &str) -> Option<Action> {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let name = rest.to_owned();
    Some(match word {
        "make" => Action::Make(words(rest)),
        "write" => {
            let (file, content) = rest.split_once(' ')?;
            Action::Write(file.to_owned(), content.to_owned())
        }
        "wait" => {
            let (monitor, rest) = match rest.strip_prefix('@') {
                Some(rest) => rest.split_once(' ')?,
                None => ("a", rest),
            };
            let (event, data) = value_after(rest)?;
            let monitor = monitor.to_owned();
            Action::Wait {
                monitor,
                event,
                data,
            }
        }
        "until" => {
            let (name, value) = value_after(rest)?;
            let value = value?;
            Action::Until { name, value }
        }
        "client" => {
            let (client, export) = rest.split_once(' ')?;
            Action::Client(client.to_owned(), export.to_owned())
        }
        "detach" => Action::Detach(name),
        "greet" => Action::Greet(name),
        "hang-up" => Action::HangUp(name),
        "half-close" => Action::HalfClose(name),
        "eof" => Action::Eof(name),
        "run" => Action::Run(words(rest)),
        "exit" => Action::Exit,
        _ => return None,
    })
}

/// A word and the JSON after it.
fn value_after(text: &str) -> Option<(String, Option<Value>)> {
    let (word, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    let value = match rest.trim() {
        "" => None,
        json => Some(serde_json::from_str(json).ok()?),
    };
    Some((word.to_owned(), value))
}

/// Words between spaces; single quotes keep a word together.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut begun) = (Vec::new(), String::new(), false, false);
    for c in text.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                begun = true;
            }
            ' ' if !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// Text as bytes: `\xNN`, `\n`, `\r`, `\t`, `\\`; other backslashes stay, they are JSON's.
/// `\*N{...}` stands for N times what is in the braces.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(repeat) = rest.strip_prefix(r"\*") {
            let (count, after) = repeat.split_once('{')?;
            let (piece, after) = after.split_once("}\\")?;
            bytes.extend(unescaped(piece)?.repeat(count.parse().ok()?));
            rest = after;
        } else if let Some(hex) = rest.strip_prefix(r"\x") {
            bytes.push(u8::from_str_radix(hex.get(..2)?, 16).ok()?);
            rest = &hex[2..];
        } else if let Some(after) = rest.strip_prefix(r"\N") {
            bytes.push(b'\n');
            rest = after;
        } else {
            bytes.extend(first.to_string().as_bytes());
            rest = &rest[first.len_utf8()..];
        }
    }
    Some(bytes)
}
