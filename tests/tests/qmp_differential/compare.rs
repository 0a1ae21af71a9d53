//! Where two transcripts differ.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::transcript::{Entry, Transcript};

/// One place where the daemons did not do the same.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) situation: String,
    line: usize,
    /// The command.
    pub(crate) what: String,
    /// Where in its answer, with dots.
    pub(crate) path: String,
    /// What QSD has there; none where it has nothing.
    pub(crate) qsd: Option<Value>,
    pub(crate) ours: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| {
            let mut text = value
                .as_ref()
                .map_or("nothing".to_owned(), Value::to_string);
            if let Some((cut, _)) = text.char_indices().nth(300) {
                text.truncate(cut);
            }
            text
        };
        let line = if self.line == usize::MAX {
            0
        } else {
            self.line
        };
        write!(
            f,
            "{}:{line:03} {} at {}\n    QSD  {}\n    ours {}",
            self.situation,
            self.what,
            self.path,
            shown(&self.qsd),
            shown(&self.ours)
        )
    }
}

/// All differences; both ran the same steps.
pub(crate) fn transcripts(theirs: &Transcript, ours: &Transcript) -> Vec<Difference> {
    let mut found = Vec::new();
    let pairs = theirs.entries.iter().zip(&ours.entries);
    for (their, our) in pairs {
        assert_eq!((their.line, &their.what), (our.line, &our.what));
        let mut at = At {
            situation: &ours.situation,
            entry: our,
            found: &mut found,
        };
        at.values("", Some(&their.value), Some(&our.value));
    }
    assert_eq!(
        theirs.entries.len(),
        ours.entries.len(),
        "{}",
        ours.situation
    );
    found
}

struct At<'a> {
    situation: &'a str,
    entry: &'a Entry,
    found: &'a mut Vec<Difference>,
}

impl At<'_> {
    fn values(&mut self, path: &str, theirs: Option<&Value>, ours: Option<&Value>) {
        match (theirs, ours) {
            _ if theirs == ours || same_options(theirs, ours) => {}
            (Some(Value::Object(theirs)), Some(Value::Object(ours))) => {
                let members = |map: &serde_json::Map<String, Value>| -> BTreeMap<String, Value> {
                    map.clone().into_iter().collect()
                };
                self.members(path, &members(theirs), &members(ours));
            }
            (Some(Value::Array(theirs)), Some(Value::Array(ours))) => {
                match (by_name(theirs), by_name(ours)) {
                    (Some(named), Some(others)) => {
                        self.named(path, (theirs, &named), (ours, &others));
                    }
                    _ => {
                        for at in 0..theirs.len().max(ours.len()) {
                            self.values(&join(path, &at.to_string()), theirs.get(at), ours.get(at));
                        }
                    }
                }
            }
            _ => self.found.push(Difference {
                situation: self.situation.to_owned(),
                line: self.entry.line,
                what: self.entry.what.clone(),
                path: path.to_owned(),
                qsd: theirs.cloned(),
                ours: ours.cloned(),
            }),
        }
    }

    fn members(
        &mut self,
        path: &str,
        theirs: &BTreeMap<String, Value>,
        ours: &BTreeMap<String, Value>,
    ) {
        for (name, their) in theirs {
            self.values(&join(path, name), Some(their), ours.get(name));
        }
        for (name, our) in ours.iter().filter(|(name, _)| !theirs.contains_key(*name)) {
            self.values(&join(path, name), None, Some(our));
        }
    }

    /// Lists of named things: the things by name, then the order of those that both have.
    fn named(
        &mut self,
        path: &str,
        (list, theirs): (&[Value], &BTreeMap<String, Value>),
        (other, ours): (&[Value], &BTreeMap<String, Value>),
    ) {
        self.members(path, theirs, ours);
        let order = |list: &[Value], others: &BTreeMap<String, Value>| -> Value {
            let names = list.iter().filter_map(name);
            names.filter(|it| others.contains_key(*it)).collect()
        };
        let (theirs, ours) = (order(list, ours), order(other, theirs));
        if theirs != ours {
            self.found.push(Difference {
                situation: self.situation.to_owned(),
                line: self.entry.line,
                what: self.entry.what.clone(),
                path: join(path, "ORDER"),
                qsd: Some(theirs),
                ours: Some(ours),
            });
        }
    }
}

/// Whether two names spell the same options out: QEMU's members have no order.
fn same_options(theirs: Option<&Value>, ours: Option<&Value>) -> bool {
    let options = |name: Option<&Value>| -> Option<Value> {
        serde_json::from_str(name?.as_str()?.strip_prefix("json:")?).ok()
    };
    options(theirs).is_some_and(|theirs| Some(theirs) == options(ours))
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// What a list's elements are known by.
fn name(value: &Value) -> Option<&str> {
    let keys = ["id", "node-name", "name", "label", "qom-path", "child"];
    keys.iter().find_map(|key| value.get(key)?.as_str())
}

fn by_name(list: &[Value]) -> Option<BTreeMap<String, Value>> {
    let named: Option<BTreeMap<_, _>> = list
        .iter()
        .map(|it| Some((name(it)?.to_owned(), it.clone())))
        .collect();
    named.filter(|named| named.len() == list.len())
}
