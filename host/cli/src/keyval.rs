//! `key=value` arguments of a command, typed by the daemon's own schema.
//!
//! `writable=on` is true and `id=7` is the text "7" because `query-qmp-schema` says what
//! `block-export-add` takes; so a command newer than this tool works as well. What the schema
//! does not know stays text, and the daemon says what it thinks of it.

use std::collections::HashMap;

use anyhow::{Result, anyhow, bail};
use outport_qmp::{keyval, wire};
use serde_json::{Map, Number, Value};

/// Arguments as written: an object as it is, or pairs that still need types.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Arguments {
    Typed(Map<String, Value>),
    Pairs(Map<String, Value>),
}

/// Reads the words after a command.
pub(crate) fn read(words: &[String]) -> Result<Arguments> {
    if words
        .first()
        .is_some_and(|word| word.trim_start().starts_with('{'))
    {
        let [json] = words else {
            bail!("Arguments are one JSON object or key=value pairs, not both");
        };
        return match wire::parse_one(json.as_bytes()).map_err(|error| anyhow!(error.desc))? {
            Value::Object(object) => Ok(Arguments::Typed(object)),
            _ => bail!("Arguments are a JSON object"),
        };
    }
    let mut pairs = String::new();
    for word in words {
        if !word.contains('=') {
            bail!("'{word}' is no argument: write key=value, or one JSON object");
        }
        // A comma separates pairs in QEMU's syntax; here the words do.
        pairs.push_str(&word.replace(',', ",,"));
        pairs.push(',');
    }
    let pairs = pairs.trim_end_matches(',');
    match keyval::parse(pairs, None).map_err(|error| anyhow!(error.desc))? {
        (Value::Object(object), _) => Ok(Arguments::Pairs(object)),
        _ => bail!("Arguments are key=value pairs"),
    }
}

/// What `query-qmp-schema` returned, by name.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    pub(crate) entries: HashMap<String, Value>,
}

/// The schema is a graph; values are bounded by the command line, but let a loop end.
const DEPTH_MAX: usize = 64;

impl Schema {
    pub(crate) fn new(answer: Value) -> Self {
        let list = match answer {
            Value::Array(list) => list,
            _ => Vec::new(),
        };
        let named = |entry: Value| Some((entry["name"].as_str()?.to_owned(), entry));
        Self {
            entries: list.into_iter().filter_map(named).collect(),
        }
    }

    /// Gives the pairs the types that `command` takes.
    pub(crate) fn typed(&self, command: &str, pairs: Map<String, Value>) -> Map<String, Value> {
        let entry = self
            .entries
            .get(command)
            .filter(|entry| entry["meta-type"] == "command");
        let Some(argument) = entry.and_then(|entry| entry["arg-type"].as_str()) else {
            return pairs;
        };
        match self.value(argument, Value::Object(pairs), DEPTH_MAX) {
            Value::Object(typed) => typed,
            _ => Map::new(),
        }
    }

    fn value(&self, kind: &str, value: Value, depth: usize) -> Value {
        let (Some(entry), true) = (self.entries.get(kind), depth > 0) else {
            return value;
        };
        match (entry["meta-type"].as_str().unwrap_or_default(), value) {
            ("builtin", Value::String(text)) => {
                scalar(entry["json-type"].as_str().unwrap_or_default(), text)
            }
            ("array", Value::Array(list)) => {
                let element = entry["element-type"].as_str().unwrap_or_default();
                list.into_iter()
                    .map(|one| self.value(element, one, depth - 1))
                    .collect()
            }
            ("object", Value::Object(object)) => self.object(entry, object, depth),
            ("alternate", value) => match self.alternative(entry, &value) {
                Some(kind) => self.value(kind, value, depth - 1),
                None => value,
            },
            (_, value) => value,
        }
    }

    fn object(&self, entry: &Value, object: Map<String, Value>, depth: usize) -> Value {
        let tag = entry["tag"]
            .as_str()
            .and_then(|tag| object.get(tag)?.as_str());
        let variants = entry["variants"].as_array().into_iter().flatten();
        let branch = variants
            .filter(|variant| tag.is_some_and(|tag| variant["case"] == tag))
            .find_map(|variant| self.entries.get(variant["type"].as_str()?));
        let kind_of = |name: &str| {
            let all = [Some(entry), branch].into_iter().flatten();
            let mut members = all.flat_map(|entry| entry["members"].as_array()).flatten();
            members.find(|member| member["name"] == name)?["type"].as_str()
        };
        let typed = object
            .into_iter()
            .map(|(name, value)| match kind_of(&name) {
                Some(kind) => (name.clone(), self.value(kind, value, depth - 1)),
                None => (name, value),
            });
        Value::Object(typed.collect())
    }

    /// The case of an alternate that the value looks like.
    fn alternative<'s>(&'s self, entry: &'s Value, value: &Value) -> Option<&'s str> {
        let members = entry["members"].as_array().into_iter().flatten();
        let kinds: Vec<&str> = members
            .filter_map(|member| member["type"].as_str())
            .collect();
        let fits = |kind: &&&str| {
            let case = self.entries.get(**kind);
            let word = |key: &str| case.and_then(|case| case[key].as_str()).unwrap_or_default();
            match (word("meta-type"), value) {
                ("object", Value::Object(_)) | ("array", Value::Array(_)) => true,
                ("enum", Value::String(text)) => {
                    let values = case.and_then(|case| case["values"].as_array());
                    values
                        .into_iter()
                        .flatten()
                        .any(|value| value == text.as_str())
                }
                ("builtin", Value::String(text)) => match word("json-type") {
                    "string" => true,
                    json_type => !scalar(json_type, text.clone()).is_string(),
                },
                _ => false,
            }
        };
        // A number or a boolean before the text that it also is.
        let text = |kind: &&str| {
            self.entries
                .get(*kind)
                .is_some_and(|it| it["json-type"] == "string")
        };
        let (texts, others): (Vec<&str>, Vec<&str>) = kinds.into_iter().partition(text);
        let ordered: Vec<&str> = others.into_iter().chain(texts).collect();
        ordered.iter().find(fits).copied()
    }
}

/// A text as the JSON type; as text if it does not look like one.
fn scalar(json_type: &str, text: String) -> Value {
    let parsed = match json_type {
        "boolean" => match text.as_str() {
            "on" | "yes" | "true" | "y" => Some(Value::Bool(true)),
            "off" | "no" | "false" | "n" => Some(Value::Bool(false)),
            _ => None,
        },
        "int" | "number" => number(&text).map(Value::Number),
        "null" if text.is_empty() || text == "null" => Some(Value::Null),
        "value" => wire::parse_one(text.as_bytes()).ok(),
        _ => None,
    };
    parsed.unwrap_or(Value::String(text))
}

/// A number, with QEMU's suffixes for sizes: `64k`, `10G`.
fn number(text: &str) -> Option<Number> {
    if let Ok(whole) = text.parse::<i64>() {
        return Some(whole.into());
    }
    if let Ok(whole) = text.parse::<u64>() {
        return Some(whole.into());
    }
    let shift = match text.chars().last()?.to_ascii_lowercase() {
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        _ => return Number::from_f64(text.parse().ok()?),
    };
    let count: u64 = text[..text.len() - 1].parse().ok()?;
    Some(count.checked_mul(1 << shift)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn typed(command: &str, line: &str) -> Value {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let Arguments::Pairs(pairs) = read(&words).unwrap() else {
            panic!("{line} are pairs");
        };
        let schema = serde_json::to_value(outport_qmp::commands::schema()).unwrap();
        Value::Object(Schema::new(schema).typed(command, pairs))
    }

    #[test]
    fn the_schema_gives_types() {
        assert_eq!(
            typed(
                "block-export-add",
                "type=nbd id=7 node-name=n name=1,2 writable=on"
            ),
            json!({"type": "nbd", "id": "7", "node-name": "n", "name": "1,2", "writable": true})
        );
        assert_eq!(
            typed("block_resize", "node-name=n size=10G"),
            json!({"node-name": "n", "size": 10_u64 << 30})
        );
    }

    #[test]
    fn dots_nest_and_alternates_are_seen() {
        assert_eq!(
            typed(
                "blockdev-add",
                "driver=qcow2 node-name=q file.driver=file file.filename=a file.read-only=on"
            ),
            json!({"driver": "qcow2", "node-name": "q",
                "file": {"driver": "file", "filename": "a", "read-only": true}})
        );
        assert_eq!(
            typed("blockdev-add", "driver=qcow2 node-name=q file=f")["file"],
            json!("f")
        );
    }

    #[test]
    fn unknown_commands_and_members_stay_text() {
        assert_eq!(typed("no-such", "a=1 b=on"), json!({"a": "1", "b": "on"}));
        assert_eq!(typed("block_resize", "nosuch=1"), json!({"nosuch": "1"}));
    }

    #[test]
    fn json_is_taken_as_it_is() {
        let object = read(&[r#"{"a": 1}"#.to_owned()]).unwrap();
        assert_eq!(
            object,
            Arguments::Typed(Map::from_iter([("a".to_owned(), json!(1))]))
        );
        assert!(read(&[r#"{"a": 1}"#.to_owned(), "b=2".to_owned()]).is_err());
        assert!(read(&["word".to_owned()]).is_err());
    }
}
