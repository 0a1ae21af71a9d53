//! What may differ, and why: `differences.toml`.
//!
//! ```toml
//! [[difference]]
//! in = "nodes-*"               # situations; all when absent
//! command = "query-version"    # as the transcript calls it
//! at = "return.qemu.*"         # where in the answer
//! qsd = "Parameter ..."        # what QSD has there, and what we; anything when absent
//! ours = "..."
//! why = "..."
//! needs = "qom-get"            # it can only be when our schema has this name
//! ```
//! `*` stands for any run of characters. Of TOML only such tables of one-line strings are read.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::compare::Difference;

/// All entries, and which were needed.
#[derive(Debug)]
pub(crate) struct Differences {
    entries: Vec<Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    line: usize,
    situation: Option<String>,
    command: String,
    at: String,
    qsd: Option<String>,
    ours: Option<String>,
    why: String,
    needs: Option<String>,
    used: AtomicBool,
}

impl Differences {
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let mut entries: Vec<Entry> = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if line == "[[difference]]" {
                let line = at + 1;
                entries.push(Entry {
                    line,
                    ..Entry::default()
                });
                continue;
            }
            let (key, value) = line
                .split_once(" = ")
                .unwrap_or_else(|| panic!("{}: {line}", at + 1));
            let entry = entries.last_mut().expect("a table comes first");
            let value = string(value).unwrap_or_else(|| panic!("{}: {line}", at + 1));
            match key.trim() {
                "in" => entry.situation = Some(value),
                "command" => entry.command = value,
                "at" => entry.at = value,
                "qsd" => entry.qsd = Some(value),
                "ours" => entry.ours = Some(value),
                "why" => entry.why = value,
                "needs" => entry.needs = Some(value),
                other => panic!("{}: unknown key {other}", at + 1),
            }
        }
        for entry in &entries {
            let whole = !entry.command.is_empty() && !entry.at.is_empty() && entry.why.len() > 20;
            assert!(
                whole,
                "differences.toml:{}: command, at and why are needed",
                entry.line
            );
        }
        Self { entries }
    }

    /// Whether an entry lists it.
    pub(crate) fn allow(&self, difference: &Difference) -> bool {
        let fits = |entry: &&Entry| {
            let situation = entry.situation.as_deref().unwrap_or("*");
            matches(situation, &difference.situation)
                && matches(&entry.command, &difference.what)
                && matches(&entry.at, &difference.path)
                && entry
                    .qsd
                    .as_ref()
                    .is_none_or(|it| matches(it, &text(&difference.qsd)))
                && entry
                    .ours
                    .as_ref()
                    .is_none_or(|it| matches(it, &text(&difference.ours)))
        };
        let entry = self.entries.iter().find(fits);
        if let Some(entry) = entry {
            entry.used.store(true, Ordering::Relaxed);
        }
        entry.is_some()
    }

    /// Entries that allowed nothing, though our schema has what they need.
    pub(crate) fn unused(&self, schema: &str) -> Vec<String> {
        let possible = |entry: &&Entry| {
            entry
                .needs
                .as_ref()
                .is_none_or(|name| crate::knows(schema, name))
        };
        let unused = |entry: &&Entry| !entry.used.load(Ordering::Relaxed);
        let idle = self.entries.iter().filter(possible).filter(unused);
        idle.map(|it| format!("differences.toml:{}: {} at {}", it.line, it.command, it.at))
            .collect()
    }
}

/// A text as it is, anything else as JSON; nothing as `nothing`.
fn text(value: &Option<Value>) -> String {
    match value {
        None => "nothing".into(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

/// TOML's one-line strings: 'as it is', or "with escapes".
fn string(text: &str) -> Option<String> {
    match text.strip_prefix('\'') {
        Some(literal) => literal.strip_suffix('\'').map(str::to_owned),
        None => serde_json::from_str(text).ok(),
    }
}

/// Whether `text` is `pattern`, where `*` stands for any run of characters.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(rest) = text.strip_prefix(head) else {
        return false;
    };
    let starts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    starts.into_iter().any(|at| matches(tail, &rest[at..]))
}

#[test]
fn patterns_match_runs() {
    assert!(matches("a*c*", "abbc"));
    assert!(matches("*", ""));
    assert!(!matches("a*c", "ab"));
}
