//! What may come next in a line of the editor: told by the daemon's own schema.
//!
//! ```text
//! block-expo|                     commands
//! block-export-add ty|            members of the command's argument, `file.` where they nest
//! block-export-add type=nbd id=e bit|   also those of the variant that was chosen
//! blockdev-add driver=qc|         values of enumerations and booleans
//! ```

use std::collections::HashMap;

use serde_json::Value;

use crate::keyval::Schema;

/// Deeper members are written as JSON.
const DEPTH_MAX: usize = 8;

/// Where the word that is completed begins, and what it may become.
pub(crate) type Completions = (usize, Vec<String>);

impl Schema {
    /// What may stand at the end of `line`.
    pub(crate) fn completions(&self, line: &str) -> Completions {
        let start = line.rfind(char::is_whitespace).map_or(0, |at| at + 1);
        let (before, word) = line.split_at(start);
        let mut words = before.split_whitespace();
        let Some(command) = words.next() else {
            return (start, self.commands(word));
        };
        let given: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        let entry = self.entries.get(command);
        let Some(argument) = entry.and_then(|entry| entry["arg-type"].as_str()) else {
            return (start, Vec::new());
        };
        match word.split_once('=') {
            Some((key, value)) => {
                let kind = self.kind_of(argument, key, &given);
                let values = kind.map(|kind| self.values(&kind, DEPTH_MAX));
                let fits = values
                    .into_iter()
                    .flatten()
                    .filter(|it| it.starts_with(value));
                (start + key.len() + 1, fits.map(|it| it + " ").collect())
            }
            None => (start, self.keys(argument, word, &given)),
        }
    }

    fn commands(&self, word: &str) -> Vec<String> {
        let commands = self
            .entries
            .iter()
            .filter(|(name, entry)| entry["meta-type"] == "command" && name.starts_with(word));
        let mut names: Vec<_> = commands.map(|(name, _)| format!("{name} ")).collect();
        names.sort();
        names
    }

    /// Keys that begin with `word` and were not given.
    fn keys(&self, argument: &str, word: &str, given: &HashMap<&str, &str>) -> Vec<String> {
        let prefix = &word[..word.rfind('.').map_or(0, |at| at + 1)];
        let kind = match prefix.strip_suffix('.') {
            Some(parent) => self.kind_of(argument, parent, given),
            None => Some(argument.to_owned()),
        };
        let members = kind.map(|kind| self.members(&kind, prefix, given, DEPTH_MAX));
        let mut keys = Vec::new();
        for (name, kind) in members.into_iter().flatten() {
            let key = format!("{prefix}{name}");
            if !key.starts_with(word) || given.contains_key(key.as_str()) {
                continue;
            }
            let inner = format!("{key}.");
            let (nests, plain) = self.shape(&kind);
            // A node is named, or defined by members of its own.
            if plain {
                keys.push(format!("{key}="));
            }
            if nests && !given.keys().any(|other| other.starts_with(&inner)) || !plain {
                keys.push(inner);
            }
        }
        keys.sort();
        keys.dedup();
        keys
    }

    /// The type of the member that a dotted key names.
    fn kind_of(&self, argument: &str, key: &str, given: &HashMap<&str, &str>) -> Option<String> {
        let mut kind = argument.to_owned();
        let mut prefix = String::new();
        for name in key.split('.') {
            let members = self.members(&kind, &prefix, given, DEPTH_MAX);
            kind = members.into_iter().find(|(other, _)| other == name)?.1;
            prefix = format!("{prefix}{name}.");
        }
        Some(kind)
    }

    /// Members of an object, of the variant that its tag chose, or of an alternate's object.
    fn members(
        &self,
        kind: &str,
        prefix: &str,
        given: &HashMap<&str, &str>,
        depth: usize,
    ) -> Vec<(String, String)> {
        let (Some(entry), true) = (self.entries.get(kind), depth > 0) else {
            return Vec::new();
        };
        if entry["meta-type"] == "alternate" {
            let cases = strings(&entry["members"], "type");
            return cases
                .flat_map(|case| self.members(case, prefix, given, depth - 1))
                .collect();
        }
        let named = |entry: &Value| -> Vec<(String, String)> {
            let members = entry["members"].as_array().into_iter().flatten();
            let pair =
                |it: &Value| Some((it["name"].as_str()?.into(), it["type"].as_str()?.into()));
            members.filter_map(pair).collect()
        };
        let mut members = named(entry);
        let tag = entry["tag"].as_str().map(|tag| format!("{prefix}{tag}"));
        let chosen = tag.and_then(|tag| given.get(tag.as_str()).copied());
        let mut variants = entry["variants"].as_array().into_iter().flatten();
        let variant = variants.find(|variant| chosen.is_some_and(|it| variant["case"] == it));
        if let Some(kind) = variant.and_then(|variant| variant["type"].as_str()) {
            members.extend(self.members(kind, prefix, given, depth - 1));
        }
        members
    }

    /// Whether a type has members, and whether it is written behind a `=`.
    fn shape(&self, kind: &str) -> (bool, bool) {
        let Some(entry) = self.entries.get(kind) else {
            return (false, true);
        };
        match entry["meta-type"].as_str() {
            Some("object") => (true, false),
            Some("alternate") => {
                let shapes = strings(&entry["members"], "type").map(|case| self.shape(case));
                shapes.fold((false, false), |(a, b), (c, d)| (a || c, b || d))
            }
            Some("array") => (true, false),
            _ => (false, true),
        }
    }

    /// The values that a type has, if there is a list of them.
    fn values(&self, kind: &str, depth: usize) -> Vec<String> {
        let (Some(entry), true) = (self.entries.get(kind), depth > 0) else {
            return Vec::new();
        };
        match entry["meta-type"].as_str() {
            Some("enum") => {
                let values = entry["values"].as_array().into_iter().flatten();
                values
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect()
            }
            Some("builtin") if entry["json-type"] == "boolean" => vec!["on".into(), "off".into()],
            Some("alternate") => {
                let cases = strings(&entry["members"], "type");
                cases
                    .flat_map(|case| self.values(case, depth - 1))
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}

fn strings<'v>(list: &'v Value, member: &'v str) -> impl Iterator<Item = &'v str> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(move |one| one[member].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_end_of(line: &str) -> Vec<String> {
        let schema = serde_json::to_value(outport_qmp::commands::schema()).unwrap();
        let (start, found) = Schema::new(schema).completions(line);
        found
            .into_iter()
            .map(|end| format!("{}{end}", &line[..start]))
            .collect()
    }

    #[test]
    fn commands_come_first() {
        assert_eq!(at_end_of("block-export-d"), ["block-export-del "]);
        assert!(at_end_of("").len() > 20);
        assert!(at_end_of("nosuch ").is_empty());
    }

    #[test]
    fn members_follow_their_command() {
        let found = at_end_of("block-export-add no");
        assert_eq!(found, ["block-export-add node-name="]);
        // A member of one variant only.
        assert!(at_end_of("block-export-add allocation").is_empty());
        let found = at_end_of("block-export-add type=nbd allocation");
        assert_eq!(found, ["block-export-add type=nbd allocation-depth="]);
        // What was given is not offered again.
        assert!(at_end_of("block-export-add node-name=n node-").is_empty());
    }

    #[test]
    fn members_nest() {
        let found = at_end_of("blockdev-add driver=raw fil");
        assert_eq!(
            found,
            [
                "blockdev-add driver=raw file.",
                "blockdev-add driver=raw file="
            ]
        );
        let found = at_end_of("blockdev-add driver=raw file.driver=file file.filen");
        assert_eq!(
            found,
            ["blockdev-add driver=raw file.driver=file file.filename="]
        );
    }

    #[test]
    fn values_of_lists_are_offered() {
        assert_eq!(
            at_end_of("block-export-del mode=h"),
            ["block-export-del mode=hard "]
        );
        let found = at_end_of("block-export-add writable=");
        assert_eq!(
            found,
            [
                "block-export-add writable=on ",
                "block-export-add writable=off "
            ]
        );
        assert!(at_end_of("block-export-del id=").is_empty());
    }
}
