//! `outport qmp` at a terminal: a line editor with history and completion.
//!
//! Two threads: this one edits a line, sends its command and waits for the answer; another one
//! reads the monitor, hands answers over and prints events above the line that is edited.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};
use outport_qmp::wire;
use rustyline::completion::{Completer, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::{FileHistory, History};
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Editor, ExternalPrinter, Helper};
use serde_json::Value;

use crate::client::{Client, Messages};
use crate::keyval::Schema;
use crate::monitor::Session;
use crate::output::print;

const PROMPT: &str = "outport> ";

const WELCOME: &str = "\
Tab completes commands and their arguments: block-export-del id=export0 mode=hard
Ctrl-R searches earlier lines; Ctrl-D ends.
";

/// Lines that are kept for the next time.
const HISTORY_LINES_MAX: usize = 1000;

/// Whether someone sits at both ends.
pub(crate) fn is_wanted() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Edits and runs lines until the end of the input or of the daemon.
pub(crate) fn run(client: Client, schema: Schema, json: bool) -> Result<ExitCode> {
    let config = Config::builder()
        .completion_type(CompletionType::List)
        .max_history_size(HISTORY_LINES_MAX)?
        .history_ignore_space(true)
        .build();
    let mut editor = Editor::<Words, FileHistory>::with_config(config)?;
    let session = Session::new(schema.clone(), json);
    editor.set_helper(Some(Words { schema }));
    let history = history_file();
    if let Some(file) = &history {
        // There is none the first time.
        let _ = editor.load_history(file);
    }
    let (stream, messages) = client.into_halves();
    let (answers, answered) = mpsc::channel();
    match editor.create_external_printer() {
        Ok(mut printer) => {
            let show = move |text: String| drop(printer.print(text));
            thread::spawn(move || read(messages, &answers, json, show));
        }
        // A terminal that can only print: events come between the lines.
        Err(_) => {
            let show = |text: String| drop(print(&text));
            thread::spawn(move || read(messages, &answers, json, show));
        }
    }
    print(WELCOME)?;
    let outcome = edit(&mut editor, session, &stream, &answered);
    if let Some(file) = &history {
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder).ok();
        }
        editor.save_history(file).ok();
    }
    // The reading thread ends with the process.
    outcome
}

/// One line after the other.
fn edit(
    editor: &mut Editor<Words, FileHistory>,
    mut session: Session,
    mut stream: &std::os::unix::net::UnixStream,
    answered: &mpsc::Receiver<Value>,
) -> Result<ExitCode> {
    loop {
        let line = match editor.readline(PROMPT) {
            Ok(line) => line,
            // Ctrl-C drops the line.
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("Cannot read from the terminal"),
        };
        if keeps(&line) {
            editor.history_mut().add(&line).ok();
        }
        match session.request(&line) {
            Ok(None) => {}
            Err(error) => session.complain(&error),
            Ok(Some(request)) => {
                let sent = stream.write_all(&wire::line(&request));
                let Some(answer) = sent.ok().and_then(|()| answered.recv().ok()) else {
                    break;
                };
                session.show(answer)?;
                if request["execute"] == "quit" {
                    // Nothing is left to type to; last events are still shown.
                    while answered.recv().is_ok() {}
                    break;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Thread: answers to whoever asked, events to the screen.
fn read(
    mut messages: Messages,
    answers: &mpsc::Sender<Value>,
    json: bool,
    mut show: impl FnMut(String),
) {
    while let Ok(Some(message)) = messages.next() {
        if message.get("event").is_some() {
            show(Session::event(&message, json));
        } else if answers.send(message).is_err() {
            return;
        }
    }
    show("The daemon closed the monitor.\n".to_owned());
}

/// Secrets stay out of the file: whoever types one does not expect to find it there.
fn keeps(line: &str) -> bool {
    !line.contains("secret") && !line.contains("password")
}

/// `$XDG_STATE_HOME/outport/qmp-history`.
fn history_file() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state"));
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let state = state.filter(|path| path.is_absolute()).or_else(home)?;
    Some(state.join("outport/qmp-history"))
}

/// What the editor knows of the language.
struct Words {
    schema: Schema,
}

impl Completer for Words {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let (start, found) = self.schema.completions(&line[..position]);
        let pair = |text: String| Pair {
            display: text.trim_end().to_owned(),
            replacement: text,
        };
        Ok((start, found.into_iter().map(pair).collect()))
    }
}

impl Helper for Words {}
impl Highlighter for Words {}
impl Hinter for Words {
    type Hint = String;
}
impl Validator for Words {}

#[cfg(test)]
mod tests {
    #[test]
    fn secrets_are_not_kept() {
        assert!(super::keeps("query-jobs"));
        assert!(!super::keeps("object-add qom-type=secret id=s data=x"));
    }
}
