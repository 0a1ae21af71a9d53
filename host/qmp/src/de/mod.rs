//! Reads typed arguments out of JSON values and says what is wrong in QEMU's words.
//!
//! A serde deserializer, so that argument types stay plain `derive`d structs. It differs from
//! `serde_json`'s in what a *client* can observe (spec 1.4):
//!
//! * Members are handed to the visitor in the order in which the type **declares** them, absent
//!   ones included. So the first offence in schema order is the one reported, and a missing
//!   member is reported before an unexpected one. `null` does not mean absent.
//! * Every object is strict: a member that the type does not declare is an error.
//! * A union reads its discriminator first, then the shared members, then the branch. The branch
//!   is declared under the name `*` and sees the object's other members.
//! * An enum whose variants are named `<string>`, `<object>`, ... is an *alternate*: the JSON type
//!   chooses the variant.
//!
//! The types of [`crate::types`] are written by one macro that follows these conventions, which
//! is why they are read with [`from_value`] and not with `serde_json`.

mod node;
mod object;
mod path;
mod scalar;
mod variant;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess};
use serde_json::{Map, Value};

use crate::error::Error;
use node::Node;
use path::Path;

/// The pseudo-member under which a union declares its branch.
pub(crate) const REST: &str = "*";

/// Arguments may nest at most this deep. The reader allows 1024 levels of brackets, but each level
/// of a *type* (a node within a node) costs kilobytes of stack here; no real graph is this deep.
const DEPTH_MAX: usize = 128;

/// What scalars look like in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// JSON: a number is a number and `"5"` is not.
    Typed,
    /// The result of [`crate::keyval::parse`]: every scalar is a string that is read as the type
    /// which its member has.
    Keyval,
}

/// Reads a `T` from `value`.
///
/// # Errors
/// The first offence in schema order, in QEMU's words (spec 1.4); nothing has happened yet.
pub fn from_value<T: DeserializeOwned>(value: &Value, mode: Mode) -> Result<T, Error> {
    T::deserialize(Node::new(value, Path::ROOT, mode))
}

/// Reads a `T` from a command's `arguments`.
///
/// # Errors
/// As [`from_value`].
pub fn from_arguments<T: DeserializeOwned>(
    arguments: &Map<String, Value>,
    mode: Mode,
) -> Result<T, Error> {
    T::deserialize(object::Object::new(arguments, Path::ROOT, mode))
}

/// Reads a `T` that stands in `object` under `name`; `None` if the member is absent.
///
/// # Errors
/// As [`from_value`], with paths that start with `name`.
pub fn from_member<T: DeserializeOwned>(
    object: &Map<String, Value>,
    name: &str,
    mode: Mode,
) -> Result<Option<T>, Error> {
    let node = |value| Node::new(value, Path::ROOT.member(name), mode);
    object
        .get(name)
        .map(|value| T::deserialize(node(value)))
        .transpose()
}

/// The next member in declared order; used by the unions' visitors.
pub(crate) fn next_member<'de, T, A>(members: &mut A) -> Result<T, A::Error>
where
    T: serde::Deserialize<'de>,
    A: MapAccess<'de>,
{
    match members.next_entry::<IgnoredAny, T>()? {
        Some((_, value)) => Ok(value),
        None => Err(A::Error::custom(
            "a union was read by a foreign deserializer",
        )),
    }
}

#[cfg(test)]
mod tests;
