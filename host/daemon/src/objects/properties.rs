//! The properties of objects as QOM shows them: names, types, defaults, what can be read and
//! changed.
//!
//! One table for each type. Values come from what the client asked for, or else from the table, so
//! that reading, changing and telling types apart need no code of each type's own.

use outport_qmp::Error;
use outport_qmp::types::qom::ObjectBranch;
use serde_json::{Value, json};

use super::iothread::THREAD_POOL_MAX;
use super::{from_members, members, throttle};

/// One property.
#[derive(Debug)]
pub(crate) struct Property {
    pub(crate) name: &'static str,
    /// As QOM names it.
    pub(crate) r#type: &'static str,
    /// The value of an object that was not told another.
    default: fn() -> Value,
    readable: bool,
    writable: bool,
}

/// The property exists and is not told.
#[derive(Debug)]
pub(crate) struct Unreadable;

const fn property(name: &'static str, r#type: &'static str, default: fn() -> Value) -> Property {
    Property {
        name,
        r#type,
        default,
        readable: true,
        writable: true,
    }
}

const fn fixed(name: &'static str, r#type: &'static str, default: fn() -> Value) -> Property {
    Property {
        writable: false,
        ..property(name, r#type, default)
    }
}

/// A single limit of a throttle group, which is told from all of them.
const fn single(name: &'static str) -> Property {
    fixed(name, "int", empty)
}

fn empty() -> Value {
    json!("")
}

/// Tables by type name, in the order of the names.
const TABLES: [(&str, &[Property]); 12] = [
    (
        "authz-list",
        &[
            property("policy", "QAuthZListPolicy", || json!("deny")),
            property("rules", "QAuthZListRule", || json!([])),
        ],
    ),
    (
        "authz-list-file",
        &[
            property("filename", "string", empty),
            property("refresh", "bool", || json!(true)),
        ],
    ),
    ("authz-simple", &[property("identity", "string", empty)]),
    (
        "authz-wasm",
        &[
            property("config", "any", || json!({})),
            property("enforce", "bool", || json!(true)),
            property("files", "any", || json!({})),
            fixed("plugin", "string", empty),
        ],
    ),
    (
        "iothread",
        &[
            property("aio-max-batch", "int", || json!(0)),
            property("poll-grow", "int", || json!(2)),
            property("poll-max-ns", "int", || json!(32768)),
            property("poll-shrink", "int", || json!(2)),
            property("poll-weight", "int", || json!(3)),
            property("thread-pool-max", "int", || json!(THREAD_POOL_MAX)),
            property("thread-pool-min", "int", || json!(0)),
        ],
    ),
    (
        "monitor-qmp",
        &[
            fixed("chardev", "string", empty),
            fixed("close-action", "MonitorCloseAction", || json!("none")),
            fixed("pretty", "bool", || json!(false)),
        ],
    ),
    (
        "secret",
        &[
            Property {
                readable: false,
                ..property("data", "string", empty)
            },
            property("file", "string", empty),
            property("format", "QCryptoSecretFormat", || json!("raw")),
            property("iv", "string", empty),
            property("keyid", "string", empty),
        ],
    ),
    (
        "throttle-group",
        &[
            property("limits", "ThrottleLimits", empty),
            single("x-bps-read"),
            single("x-bps-read-max"),
            single("x-bps-read-max-length"),
            single("x-bps-total"),
            single("x-bps-total-max"),
            single("x-bps-total-max-length"),
            single("x-bps-write"),
            single("x-bps-write-max"),
            single("x-bps-write-max-length"),
            single("x-iops-read"),
            single("x-iops-read-max"),
            single("x-iops-read-max-length"),
            single("x-iops-size"),
            single("x-iops-total"),
            single("x-iops-total-max"),
            single("x-iops-total-max-length"),
            single("x-iops-write"),
            single("x-iops-write-max"),
            single("x-iops-write-max-length"),
        ],
    ),
    (
        "tls-creds-anon",
        &[
            fixed("dir", "string", empty),
            fixed("endpoint", "QCryptoTLSCredsEndpoint", || json!("client")),
            fixed("priority", "string", empty),
            fixed("verify-peer", "bool", || json!(true)),
        ],
    ),
    (
        "tls-creds-psk",
        &[
            fixed("dir", "string", empty),
            fixed("endpoint", "QCryptoTLSCredsEndpoint", || json!("client")),
            fixed("priority", "string", empty),
            fixed("username", "string", empty),
            fixed("verify-peer", "bool", || json!(true)),
        ],
    ),
    (
        "tls-creds-x509",
        &[
            property("dir", "string", empty),
            fixed("endpoint", "QCryptoTLSCredsEndpoint", || json!("client")),
            property("passwordid", "string", empty),
            property("priority", "string", empty),
            property("sanity-check", "bool", || json!(true)),
            property("verify-peer", "bool", || json!(true)),
        ],
    ),
    (
        "wasm-plugin",
        &[
            fixed("allow-unpinned", "bool", || json!(false)),
            fixed("call-time-max-ms", "int", || json!(0)),
            fixed("filename", "string", empty),
            fixed("memory-max", "size", || json!(0)),
            fixed("sha256", "string", empty),
        ],
    ),
];

/// The type of an object as QOM names it.
pub(crate) fn type_name(branch: &ObjectBranch) -> &'static str {
    match branch {
        ObjectBranch::AuthzList(_) => "authz-list",
        ObjectBranch::AuthzListFile(_) | ObjectBranch::AuthzListfile(_) => "authz-list-file",
        ObjectBranch::AuthzSimple(_) => "authz-simple",
        ObjectBranch::AuthzWasm(_) => "authz-wasm",
        ObjectBranch::Iothread(_) => "iothread",
        ObjectBranch::MonitorQmp(_) => "monitor-qmp",
        ObjectBranch::Secret(_) => "secret",
        ObjectBranch::ThrottleGroup(_) => "throttle-group",
        ObjectBranch::TlsCredsAnon(_) => "tls-creds-anon",
        ObjectBranch::TlsCredsPsk(_) => "tls-creds-psk",
        ObjectBranch::TlsCredsX509(_) => "tls-creds-x509",
        ObjectBranch::WasmPlugin(_) => "wasm-plugin",
    }
}

impl Property {
    /// The properties that objects of a type have; `None`: objects of no such type can be added.
    pub(crate) fn of_type(name: &str) -> Option<&'static [Self]> {
        TABLES
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, properties)| *properties)
    }

    /// The types of object that can be added.
    pub(crate) fn types() -> impl Iterator<Item = &'static str> {
        TABLES.iter().map(|(name, _)| *name)
    }
}

fn find(branch: &ObjectBranch, name: &str) -> Option<&'static Property> {
    let mut properties = Property::of_type(type_name(branch))?.iter();
    properties.find(|property| property.name == name)
}

/// Reads a property; `None`: the object has no such property.
pub(super) fn get(branch: &ObjectBranch, name: &str) -> Option<Result<Value, Unreadable>> {
    let property = find(branch, name)?;
    if !property.readable {
        return Some(Err(Unreadable));
    }
    let mut members = members("", branch);
    if matches!(branch, ObjectBranch::ThrottleGroup(_)) {
        return Some(Ok(throttle::told(members, name)));
    }
    let told = members.remove(name);
    Some(Ok(told.unwrap_or_else(property.default)))
}

/// The properties with one of them changed.
///
/// # Errors
/// There is no such property, it stays as it is, or the value is of another type.
pub(super) fn changed(
    branch: &ObjectBranch,
    id: &str,
    name: &str,
    value: Value,
) -> Result<ObjectBranch, Error> {
    let kind = type_name(branch);
    let refused = |why| Error::generic(format!("Property '{kind}.{name}' {why}"));
    match find(branch, name) {
        Some(property) if property.writable => {}
        Some(_) => return Err(refused("is not writable")),
        None if name == "type" => return Err(refused("is not writable")),
        None => return Err(refused("not found")),
    }
    let mut members = members(id, branch);
    match (members.get_mut(name), value) {
        // Limits that are not told stay as they are.
        (Some(Value::Object(old)), Value::Object(new))
            if matches!(branch, ObjectBranch::ThrottleGroup(_)) =>
        {
            old.extend(new);
        }
        (_, value) => drop(members.insert(name.to_owned(), value)),
    }
    from_members(&members)
}
