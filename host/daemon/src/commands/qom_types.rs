//! The types of object, as far as clients look at them (`qom.json`).

use outport_qmp::Error;
use outport_qmp::error::ErrorClass;
use outport_qmp::types::qom::{ObjectPropertyInfo, ObjectTypeInfo, QomListTypes};

use crate::chardev::Backend;
use crate::objects::Property;

/// A type that objects have.
const fn of(name: &'static str, parent: &'static str) -> Type {
    Type {
        name,
        parent: Some(parent),
        is_abstract: false,
    }
}

/// A type that only other types are made from.
const fn base(name: &'static str, parent: Option<&'static str>) -> Type {
    Type {
        name,
        parent,
        is_abstract: true,
    }
}

struct Type {
    name: &'static str,
    parent: Option<&'static str>,
    is_abstract: bool,
}

/// All types. What can be added is in the objects' own table, too.
const TYPES: [Type; 26] = [
    base("authz", Some("object")),
    of("authz-list", "authz"),
    of("authz-list-file", "authz"),
    of("authz-simple", "authz"),
    of("authz-wasm", "authz"),
    base("chardev", Some("object")),
    base("chardev-fd", Some("chardev")),
    of("chardev-null", "chardev"),
    of("chardev-socket", "chardev"),
    of("chardev-stdio", "chardev-fd"),
    of("container", "object"),
    base("event-loop-base", Some("object")),
    base("interface", None),
    of("iothread", "event-loop-base"),
    base("monitor", Some("object")),
    of("monitor-qmp", "monitor"),
    base("object", None),
    of("secret", "secret_common"),
    base("secret_common", Some("object")),
    of("throttle-group", "object"),
    base("tls-creds", Some("object")),
    of("tls-creds-anon", "tls-creds"),
    of("tls-creds-psk", "tls-creds"),
    of("tls-creds-x509", "tls-creds"),
    base("user-creatable", Some("interface")),
    of("wasm-plugin", "object"),
];

/// The interface of what `object-add` makes.
const USER_CREATABLE: &str = "user-creatable";

impl Type {
    fn find(name: &str) -> Option<&'static Self> {
        TYPES.iter().find(|it| it.name == name)
    }

    /// Whether it is `wanted`, or made from it.
    fn implements(&self, wanted: &str) -> bool {
        let is_made = || Property::of_type(self.name).is_some();
        self.name == wanted
            || matches!(wanted, USER_CREATABLE | "interface") && is_made()
            || self
                .parent()
                .is_some_and(|parent| parent.implements(wanted))
    }

    fn parent(&self) -> Option<&'static Self> {
        Self::find(self.parent?)
    }
}

/// `qom-list-types`.
pub(super) fn list(arguments: &QomListTypes) -> Vec<ObjectTypeInfo> {
    let abstract_too = arguments.r#abstract == Some(true);
    let wanted = |it: &&Type| {
        let implements = arguments.implements.as_deref();
        (abstract_too || !it.is_abstract) && implements.is_none_or(|name| it.implements(name))
    };
    let info = |it: &Type| ObjectTypeInfo {
        name: it.name.to_owned(),
        r#abstract: it.is_abstract.then_some(true),
        parent: it.parent.map(str::to_owned),
    };
    TYPES.iter().filter(wanted).map(info).collect()
}

/// `qom-list-properties`.
pub(super) fn properties(name: &str) -> Result<Vec<ObjectPropertyInfo>, Error> {
    let found = Type::find(name).ok_or_else(|| Error {
        class: ErrorClass::DeviceNotFound,
        desc: format!("Class '{name}' not found"),
    })?;
    match found.implements("object") {
        true => Ok(properties_of(name)),
        false => Err(Error::expects("typename", "a QOM type")),
    }
}

/// The properties that every object of a type has.
pub(super) fn properties_of(name: &str) -> Vec<ObjectPropertyInfo> {
    let mut properties = vec![property("type", "string".into())];
    let own = Property::of_type(name).unwrap_or_default();
    properties.extend(own.iter().map(|it| property(it.name, it.r#type.into())));
    if name == "chardev-socket" {
        properties.push(property("connected", "bool".into()));
        properties.push(property("addr", "SocketAddress".into()));
    }
    if name == "tls-creds" {
        let common = Property::of_type("tls-creds-anon").unwrap_or_default();
        properties.extend(common.iter().map(|it| property(it.name, it.r#type.into())));
    }
    if name == "secret_common" {
        let common = Property::of_type("secret").unwrap_or_default().iter();
        let common = common.filter(|it| !matches!(it.name, "data" | "file"));
        properties.extend(common.map(|it| property(it.name, it.r#type.into())));
    }
    properties
}

/// The type of a character device.
pub(super) fn of_chardev(backend: &Backend) -> &'static str {
    match backend {
        Backend::Null => "chardev-null",
        Backend::Stdio => "chardev-stdio",
        Backend::Client(_) | Backend::Connected(_) | Backend::Server { .. } => "chardev-socket",
    }
}

pub(super) fn property(name: &str, r#type: String) -> ObjectPropertyInfo {
    ObjectPropertyInfo {
        name: name.to_owned(),
        r#type,
        description: None,
        default_value: None,
    }
}
