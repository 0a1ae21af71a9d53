//! The error of the control path: a class that clients match on and a sentence in QEMU's words.
//!
//! The sentences are interface: management software and QEMU's own tests compare them. Each
//! sentence that more than one command can say has a constructor here, so that it is spelled
//! once. QEMU prints hints to a terminal only; nothing here carries one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a failed command answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{desc}")]
pub struct Error {
    /// The class: the only part that a client may branch on.
    pub class: ErrorClass,
    /// One sentence for people, in QEMU's wording where QEMU has one.
    pub desc: String,
}

/// The classes of QMP. New code answers [`ErrorClass::GenericError`]; the others are historical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    #[default]
    GenericError,
    /// An unknown command, or one that the negotiation mode does not allow.
    CommandNotFound,
    /// A device that has to be active is not.
    DeviceNotActive,
    /// A device or an object path does not exist.
    DeviceNotFound,
    /// A KVM capability is missing; never said by a storage daemon.
    KVMMissingCap,
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Error {
    /// An error of class [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// An error of class [`ErrorClass::CommandNotFound`].
    pub fn command_not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }

    /// No command is called `name`.
    pub fn unknown_command(name: &str) -> Self {
        Self::command_not_found(format!("The command {name} has not been found"))
    }

    /// A path of the object tree leads nowhere (class `DeviceNotFound`).
    pub fn device_not_found(path: &str) -> Self {
        Self {
            class: ErrorClass::DeviceNotFound,
            desc: format!("Device '{path}' not found"),
        }
    }

    /// A mandatory member is not there; `path` is dotted from the arguments down.
    pub fn missing(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is missing"))
    }

    /// A member that the schema does not know; `path` is dotted from the arguments down.
    pub fn unexpected(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is unexpected"))
    }

    /// A value of the wrong JSON type; `expected` is `string`, `object`... or an alternate.
    pub fn invalid_type(path: &str, expected: &str) -> Self {
        Self::generic(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    }

    /// A string outside an enumeration. QEMU names the last member of the path only.
    pub fn bad_enum(name: &str, value: &str) -> Self {
        Self::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// A value that cannot be read as what the member wants, such as `uint32_t` or `'on' or 'off'`.
    pub fn expects(name: &str, expected: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expected}"))
    }

    /// A name on the command line that no option has, or that is no name at all.
    pub fn invalid_parameter(name: &str) -> Self {
        Self::generic(format!("Invalid parameter '{name}'"))
    }

    /// An `id` that does not start with a letter or has other characters than `[A-Za-z0-9._-]`.
    pub fn not_an_identifier(name: &str) -> Self {
        Self::expects(name, "an identifier")
    }

    /// Neither a block device nor a node of that name. An absent device is the empty string.
    pub fn no_such_device_or_node(device: &str, node_name: &str) -> Self {
        Self::generic(format!(
            "Cannot find device='{device}' nor node-name='{node_name}'"
        ))
    }

    /// `blockdev-del` of a node that nobody added.
    pub fn no_such_node(node_name: &str) -> Self {
        Self::generic(format!("Failed to find node with node-name='{node_name}'"))
    }

    /// A node that an export, a parent node or a job holds.
    pub fn node_in_use(node_name: &str) -> Self {
        Self::generic(format!("Node {node_name} is in use"))
    }

    /// `object-del` of an id that no object has.
    pub fn no_such_object(id: &str) -> Self {
        Self::generic(format!("object '{id}' not found"))
    }

    /// `object-del` of an object that something refers to.
    pub fn object_in_use(id: &str) -> Self {
        Self::generic(format!("object '{id}' is in use, can not be deleted"))
    }

    /// An export id that does not exist.
    pub fn no_such_export(id: &str) -> Self {
        Self::generic(format!("Export '{id}' is not found"))
    }

    /// A job id that does not exist.
    pub fn no_such_job() -> Self {
        Self::generic("Job not found")
    }
}

/// Lets serde's derived code fail with our type. [`crate::de`] says its sentences itself, so what
/// arrives here is a disagreement between a type and the deserializer, not a client's mistake.
impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::generic(message.to_string())
    }

    fn missing_field(field: &'static str) -> Self {
        Self::missing(field)
    }
}

/// Whether `text` is an identifier as QEMU's `id=` wants it: a letter, then `[A-Za-z0-9._-]`.
pub fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_precedes_desc_on_the_wire() {
        let text = serde_json::to_string(&Error::missing("addr.data.path")).unwrap();
        let want = r#"{"class":"GenericError","desc":"Parameter 'addr.data.path' is missing"}"#;
        assert_eq!(text, want);
    }

    #[test]
    fn identifiers_start_with_a_letter() {
        assert!(is_identifier("a-1._b"));
        for bad in ["", "1x", "-a", "a b", "a/b", "\u{e9}"] {
            assert!(!is_identifier(bad), "{bad}");
        }
    }
}
