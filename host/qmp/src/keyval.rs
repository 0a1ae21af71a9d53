//! Options of a command line: `driver=qcow2,file.driver=file,file.filename=a,,b.qcow2`.
//!
//! The result is a JSON value whose scalars are all strings, to be read with
//! [`Mode::Keyval`]: only the type of a member tells what its string
//! means. Text that starts with `{` is JSON instead, and typed (spec 2).

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::de::{self, Mode};
use crate::error::Error;
use crate::wire;

/// The longest part of a dotted key, as in QEMU. It also bounds what an error message repeats.
const FRAGMENT_BYTES_MAX: usize = 127;

/// Keys nest at most this deep: beyond any option that exists, and no strain on the stack.
const DEPTH_MAX: usize = 64;

/// Lists have at most this many elements, so that one key cannot ask for gigabytes.
const LIST_ELEMENTS_MAX: usize = 4096;

/// Parses `text`; a first part without `=` is the value of `implied_key`.
///
/// The mode tells how [`de`] has to read the value: options as strings, JSON as it is.
///
/// # Errors
/// QEMU's sentences about malformed or contradictory keys, or about malformed JSON.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<(Value, Mode), Error> {
    if text.starts_with('{') {
        return Ok((wire::parse_one(text.as_bytes())?, Mode::Typed));
    }
    let mut root = Tree::default();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let (key, value, after) = split_option(rest, implied_key.take())?;
        root.insert(key, value)?;
        rest = after;
    }
    Ok((root.into_value("")?, Mode::Keyval))
}

/// Parses `text` and reads a `T` from it.
///
/// # Errors
/// As [`parse`] and [`de::from_value`].
pub fn read<T: DeserializeOwned>(text: &str, implied_key: Option<&str>) -> Result<T, Error> {
    let (value, mode) = parse(text, implied_key)?;
    de::from_value(&value, mode)
}

/// Takes the first `key=value,` off `text`.
fn split_option<'t>(
    text: &'t str,
    implied_key: Option<&'t str>,
) -> Result<(&'t str, String, &'t str), Error> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let key = &text[..end];
    if text[end..].starts_with('=') {
        let (value, after) = unescape(&text[end + 1..]);
        return Ok((key, value, after));
    }
    match implied_key {
        Some(implied_key) if !key.is_empty() => {
            let (value, after) = unescape(text);
            Ok((implied_key, value, after))
        }
        _ if key.is_empty() => Err(Error::invalid_parameter("")),
        _ => Err(Error::generic(format!(
            "Expected '=' after parameter '{key}'"
        ))),
    }
}

/// Reads a value up to a single comma; two commas are one literal comma.
pub(crate) fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        match rest[comma + 1..].strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, &rest[comma + 1..]),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// What the keys so far say of one parameter.
enum Entry {
    Scalar(String),
    Group(Tree),
}

/// Members by name; whether it is an object or a list shows only at the end.
#[derive(Default)]
struct Tree {
    members: BTreeMap<String, Entry>,
}

impl Tree {
    /// Enters one option; a later one replaces an earlier one of the same name.
    fn insert(&mut self, key: &str, value: String) -> Result<(), Error> {
        let mut fragments = fragments(key)?;
        let Some(last) = fragments.pop() else {
            return Err(Error::invalid_parameter(key));
        };
        let mut tree = self;
        let mut prefix = String::new();
        for fragment in fragments {
            prefix.push_str(&fragment);
            let group = || Entry::Group(Tree::default());
            match tree.members.entry(fragment).or_insert_with(group) {
                Entry::Group(group) => tree = group,
                Entry::Scalar(_) => return Err(inconsistent(&prefix)),
            }
            prefix.push('.');
        }
        if let Some(Entry::Group(_)) = tree.members.get(&last) {
            return Err(inconsistent(&format!("{prefix}{last}")));
        }
        tree.members.insert(last, Entry::Scalar(value));
        Ok(())
    }

    /// An object, or a list if the members are numbers. `prefix` is the key so far with its dot.
    fn into_value(self, prefix: &str) -> Result<Value, Error> {
        let numbers = self
            .members
            .keys()
            .filter(|name| index_of(name).is_some())
            .count();
        if numbers > 0 && numbers < self.members.len() {
            return Err(inconsistent(prefix.trim_end_matches('.')));
        }
        if numbers > 0 {
            self.into_list(prefix)
        } else {
            self.into_object(prefix)
        }
    }

    fn into_object(self, prefix: &str) -> Result<Value, Error> {
        let mut object = Map::new();
        for (name, entry) in self.members {
            let value = entry.into_value(&format!("{prefix}{name}"))?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }

    fn into_list(self, prefix: &str) -> Result<Value, Error> {
        let mut elements = BTreeMap::new();
        for (name, entry) in self.members {
            elements.insert(index_of(&name).unwrap_or(usize::MAX), entry);
        }
        if elements.len() > LIST_ELEMENTS_MAX {
            let name = prefix.trim_end_matches('.');
            return Err(Error::generic(format!(
                "Parameter '{name}' has too many elements"
            )));
        }
        let mut list = Vec::with_capacity(elements.len());
        for (expected, (index, entry)) in elements.into_iter().enumerate() {
            if index != expected {
                return Err(Error::generic(format!(
                    "Parameter '{prefix}{expected}' missing"
                )));
            }
            list.push(entry.into_value(&format!("{prefix}{index}"))?);
        }
        Ok(Value::Array(list))
    }
}

impl Entry {
    fn into_value(self, key: &str) -> Result<Value, Error> {
        match self {
            Self::Scalar(text) => Ok(Value::String(text)),
            Self::Group(tree) => tree.into_value(&format!("{key}.")),
        }
    }
}

fn inconsistent(key: &str) -> Error {
    Error::generic(format!("Parameters '{key}.*' used inconsistently"))
}

/// The parts of a dotted key: names, or numbers of list elements. The first is a name.
fn fragments(key: &str) -> Result<Vec<String>, Error> {
    let mut fragments = Vec::new();
    for fragment in key.split('.') {
        let number = index_of(fragment).is_some();
        if fragment.is_empty() || !(is_name(fragment) || number && !fragments.is_empty()) {
            return Err(Error::invalid_parameter(key));
        }
        if fragment.len() > FRAGMENT_BYTES_MAX {
            return Err(Error::generic(format!(
                "Parameter '{fragment}' is too long"
            )));
        }
        if fragments.len() == DEPTH_MAX {
            return Err(Error::generic(format!(
                "Parameter '{fragment}' is nested too deeply"
            )));
        }
        fragments.push(fragment.to_owned());
    }
    Ok(fragments)
}

/// Whether `text` is a name as QEMU's schema allows them: of QEMU, or `__DOMAIN_NAME` of others.
fn is_name(text: &str) -> bool {
    let ours = text.starts_with(|first: char| first.is_ascii_alphabetic());
    (ours || text.starts_with("__"))
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// The list index that `text` spells. One too large for any list still is an index: the gap
/// before it is the error.
fn index_of(text: &str) -> Option<usize> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn value(text: &str) -> Value {
        parse(text, Some("driver")).unwrap().0
    }

    fn error(text: &str) -> String {
        parse(text, Some("driver")).unwrap_err().desc
    }

    #[test]
    fn keys_nest_and_commas_escape() {
        let want = json!({
            "driver": "qcow2", "node-name": "a",
            "file": {"driver": "file", "filename": "/tmp/a,b"},
        });
        let text = "qcow2,file.driver=file,file.filename=/tmp/a,,b,node-name=x,node-name=a";
        assert_eq!(value(text), want);
        assert_eq!(value(""), json!({}));
        assert_eq!(value("a,,b"), json!({"driver": "a,b"}));
        assert_eq!(value("a=,b==,c=1,"), json!({"a": "", "b": "=", "c": "1"}));
    }

    #[test]
    fn lists_are_indexed_without_gaps() {
        assert_eq!(value("a.1.x=c,a.0=b"), json!({"a": ["b", {"x": "c"}]}));
        assert_eq!(error("a.0=b,a.2=c"), "Parameter 'a.1' missing");
        assert_eq!(
            error("a.b.99999999999999999999999=c"),
            "Parameter 'a.b.0' missing"
        );
        assert_eq!(error("a.0=b,a.c=d"), "Parameters 'a.*' used inconsistently");
    }

    #[test]
    fn malformed_keys_have_qemus_words() {
        assert_eq!(
            error("null-co,read-zeroes"),
            "Expected '=' after parameter 'read-zeroes'"
        );
        assert_eq!(
            error("size.a=5,size=4"),
            "Parameters 'size.*' used inconsistently"
        );
        assert_eq!(
            error("size=5,size.a=4"),
            "Parameters 'size.*' used inconsistently"
        );
        for key in ["", "a..b", ".a", "a.", "a%b", "5"] {
            assert_eq!(
                error(&format!("x,{key}=1")),
                format!("Invalid parameter '{key}'")
            );
        }
        let long = "a".repeat(128);
        assert_eq!(
            error(&format!("x,{long}=1")),
            format!("Parameter '{long}' is too long")
        );
    }

    #[test]
    fn braces_start_json() {
        let (value, mode) = parse(r#"{"driver": "null-co", "size": 5}"#, Some("driver")).unwrap();
        assert_eq!((&value["size"], mode), (&json!(5), Mode::Typed));
        let error = |text| parse(text, None).unwrap_err().desc;
        assert_eq!(error("{} x"), "Expecting at most one JSON value");
        assert_eq!(error("{} {}"), "Expecting at most one JSON value");
        assert!(error("{").ends_with("JSON parse error, premature end of input"));
    }
}
