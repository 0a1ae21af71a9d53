//! Options against a plugin's JSON Schema, with QEMU's sentences.
//!
//! Pure. The subset that options need: `type`, `properties`, `required`,
//! `additionalProperties` (true or false), `items`, `enum`, `minimum`,
//! `maximum`, `minLength`, `maxLength`. Everything else is read as an
//! annotation (`title`, `default`, `x-mutable`, ...); what the plugin wants
//! beyond that, it checks itself.

use std::fmt;

use serde_json::{Map, Value};

/// How deep a schema and the options may nest.
const DEPTH_MAX: usize = 16;

/// A parsed schema. An empty text means "takes no options".
#[derive(Clone, Debug)]
pub struct Schema {
    root: Value,
}

/// An option that does not fit, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Needed and not given.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// Given and not known.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// Of another JSON type.
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    Type {
        /// Dotted path.
        name: String,
        /// QEMU's word for the type.
        expected: String,
    },
    /// Not one of the listed values.
    #[error("Parameter '{name}' does not accept value '{value}'")]
    Value {
        /// Dotted path.
        name: String,
        /// What was given.
        value: String,
    },
    /// Out of bounds.
    #[error("Parameter '{name}' expects {expected}")]
    Bounds {
        /// Dotted path.
        name: String,
        /// "a value of at least 512".
        expected: String,
    },
}

impl Default for Schema {
    fn default() -> Self {
        Self {
            root: serde_json::json!({ "type": "object", "additionalProperties": false }),
        }
    }
}

impl Schema {
    /// Parse the text of `meta.describe`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let root: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
        match root.get("type") {
            Some(Value::String(t)) if t == "object" => Ok(Self { root }),
            _ => Err("it must be an object schema (\"type\": \"object\")".into()),
        }
    }

    /// The schema as JSON, for `query-plugins`.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.root
    }

    /// Names of the options that may change while an image is open.
    pub fn mutable(&self) -> impl Iterator<Item = &str> {
        let properties = self.root.get("properties").and_then(Value::as_object);
        let marked = |v: &Value| v.get("x-mutable").and_then(Value::as_bool) == Some(true);
        properties
            .into_iter()
            .flatten()
            .filter_map(move |(name, v)| marked(v).then_some(name.as_str()))
    }

    /// Check `options`, which should be an object.
    ///
    /// # Errors
    /// The first option that does not fit.
    pub fn check(&self, options: &Value) -> Result<(), OptionError> {
        value(&self.root, options, &Path::Root, 0)
    }
}

/// The dotted name of an option, built only when an error needs it.
enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("options"),
            Self::Key(Path::Root, key) => f.write_str(key),
            Self::Key(parent, key) => write!(f, "{parent}.{key}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

fn value(schema: &Value, given: &Value, at: &Path<'_>, depth: usize) -> Result<(), OptionError> {
    let Some(rules) = schema.as_object() else {
        return Ok(());
    };
    if depth > DEPTH_MAX {
        return Err(bounds(at, format!("at most {DEPTH_MAX} levels of nesting")));
    }
    types(rules, given, at)?;
    if let Some(Value::Array(allowed)) = rules.get("enum")
        && !allowed.contains(given)
    {
        let value = given
            .as_str()
            .map_or_else(|| given.to_string(), str::to_owned);
        return Err(OptionError::Value {
            name: at.to_string(),
            value,
        });
    }
    match given {
        Value::Object(map) => object(rules, map, at, depth),
        Value::Array(list) => {
            let Some(items) = rules.get("items") else {
                return Ok(());
            };
            let mut list = list.iter().enumerate();
            list.try_for_each(|(i, v)| value(items, v, &Path::Index(at, i), depth + 1))
        }
        Value::Number(_) => numbers(rules, given, at),
        Value::String(text) => lengths(rules, text, at),
        Value::Bool(_) | Value::Null => Ok(()),
    }
}

fn types(rules: &Map<String, Value>, given: &Value, at: &Path<'_>) -> Result<(), OptionError> {
    let fits = |name: &str| match name {
        "integer" => given.is_i64() || given.is_u64(),
        "number" => given.is_number(),
        "string" => given.is_string(),
        "boolean" => given.is_boolean(),
        "object" => given.is_object(),
        "array" => given.is_array(),
        "null" => given.is_null(),
        _ => true,
    };
    let expected = match rules.get("type") {
        Some(Value::String(name)) if !fits(name) => name.clone(),
        Some(Value::Array(names)) => {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
            if names.is_empty() || names.iter().any(|name| fits(name)) {
                return Ok(());
            }
            names.join(" or ")
        }
        _ => return Ok(()),
    };
    Err(OptionError::Type {
        name: at.to_string(),
        expected,
    })
}

fn object(
    rules: &Map<String, Value>,
    given: &Map<String, Value>,
    at: &Path<'_>,
    depth: usize,
) -> Result<(), OptionError> {
    let required = rules.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !given.contains_key(name) {
            return Err(OptionError::Missing(Path::Key(at, name).to_string()));
        }
    }
    let known = rules.get("properties").and_then(Value::as_object);
    let closed = rules.get("additionalProperties") == Some(&Value::Bool(false));
    for (name, v) in given {
        let path = Path::Key(at, name);
        match known.and_then(|k| k.get(name)) {
            Some(schema) => value(schema, v, &path, depth + 1)?,
            None if closed => return Err(OptionError::Unexpected(path.to_string())),
            None => {}
        }
    }
    Ok(())
}

fn numbers(rules: &Map<String, Value>, given: &Value, at: &Path<'_>) -> Result<(), OptionError> {
    let below = |a: &Value, b: &Value| match (integer(a), integer(b)) {
        (Some(a), Some(b)) => a < b,
        _ => a.as_f64() < b.as_f64(),
    };
    if let Some(min @ Value::Number(_)) = rules.get("minimum")
        && below(given, min)
    {
        return Err(bounds(at, format!("a value of at least {min}")));
    }
    if let Some(max @ Value::Number(_)) = rules.get("maximum")
        && below(max, given)
    {
        return Err(bounds(at, format!("a value of at most {max}")));
    }
    Ok(())
}

/// Exact, where an `f64` would round a 64-bit size.
fn integer(v: &Value) -> Option<i128> {
    v.as_i64()
        .map(i128::from)
        .or_else(|| v.as_u64().map(i128::from))
}

fn lengths(rules: &Map<String, Value>, text: &str, at: &Path<'_>) -> Result<(), OptionError> {
    let count = text.chars().count() as u64;
    let rule = |name| rules.get(name).and_then(Value::as_u64);
    if rule("minLength").is_some_and(|min| count < min) {
        return Err(bounds(at, "a longer string".into()));
    }
    if rule("maxLength").is_some_and(|max| count > max) {
        return Err(bounds(at, "a shorter string".into()));
    }
    Ok(())
}

fn bounds(at: &Path<'_>, expected: String) -> OptionError {
    OptionError::Bounds {
        name: at.to_string(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn says(schema: &Value, options: &Value) -> String {
        match Schema::parse(&schema.to_string()).unwrap().check(options) {
            Ok(()) => "ok".into(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn sentences_are_those_of_qemu() {
        let schema = json!({
            "type": "object",
            "properties": {
                "lazy-refcounts": { "type": "boolean", "x-mutable": true },
                "cache-size": { "type": "integer", "minimum": 512, "maximum": u64::MAX - 1 },
                "overlap-check": { "type": "string", "enum": ["none", "all"] },
                "encrypt": {
                    "type": "object",
                    "required": ["format"],
                    "properties": { "format": { "type": "string" } },
                    "additionalProperties": false,
                },
                "parts": { "type": "array", "items": { "type": "string", "maxLength": 3 } },
            },
            "required": ["cache-size"],
            "additionalProperties": false,
        });
        for (options, said) in [
            (json!({ "cache-size": 512 }), "ok"),
            (json!({}), "Parameter 'cache-size' is missing"),
            (
                json!({ "cache-size": 1, "x": 1 }),
                "Parameter 'cache-size' expects a value of at least 512",
            ),
            (
                json!({ "cache-size": u64::MAX }),
                "Parameter 'cache-size' expects a value of at most 18446744073709551614",
            ),
            (
                json!({ "cache-size": 512, "x": 1 }),
                "Parameter 'x' is unexpected",
            ),
            (
                json!({ "cache-size": "1" }),
                "Invalid parameter type for 'cache-size', expected: integer",
            ),
            (
                json!({ "cache-size": 512, "lazy-refcounts": 1 }),
                "Invalid parameter type for 'lazy-refcounts', expected: boolean",
            ),
            (
                json!({ "cache-size": 512, "overlap-check": "some" }),
                "Parameter 'overlap-check' does not accept value 'some'",
            ),
            (
                json!({ "cache-size": 512, "encrypt": {} }),
                "Parameter 'encrypt.format' is missing",
            ),
            (
                json!({ "cache-size": 512, "encrypt": { "format": "a", "b": 1 } }),
                "Parameter 'encrypt.b' is unexpected",
            ),
            (
                json!({ "cache-size": 512, "parts": ["a", 1] }),
                "Invalid parameter type for 'parts[1]', expected: string",
            ),
            (
                json!({ "cache-size": 512, "parts": ["abcd"] }),
                "Parameter 'parts[0]' expects a shorter string",
            ),
            (
                json!([]),
                "Invalid parameter type for 'options', expected: object",
            ),
        ] {
            assert_eq!(says(&schema, &options), said, "{options}");
        }
        let parsed = Schema::parse(&schema.to_string()).unwrap();
        assert_eq!(parsed.mutable().collect::<Vec<_>>(), ["lazy-refcounts"]);
    }

    #[test]
    fn no_schema_means_no_options() {
        let schema = Schema::parse("").unwrap();
        assert_eq!(schema.check(&json!({})), Ok(()));
        assert_eq!(
            schema.check(&json!({ "a": 1 })),
            Err(OptionError::Unexpected("a".into()))
        );
        assert!(Schema::parse("[]").is_err());
        assert!(Schema::parse("{\"type\": \"string\"}").is_err());
    }
}
