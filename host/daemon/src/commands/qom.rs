//! The object tree, as far as clients look at it (`qom.json`).
//!
//! ```text
//! /            type
//! /backend     type
//! /chardevs/C  type, connected, addr
//! /objects/O   type, and what its type has
//! ```
//!
//! A path that does not start with `/` is the end of one, which must be the end of one path only.

use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::types::Empty;
use outport_qmp::types::qom::{
    IOThreadInfo, ObjectBranch, ObjectPropertiesValues, ObjectPropertyInfo, ObjectPropertyValue,
    QomGet, QomListGet, QomSet,
};
use outport_qmp::types::sockets::SocketAddress;
use serde_json::{Value, json};

use crate::chardev::Backend;
use crate::daemon::Daemon;
use crate::objects::{self, Unreadable};

use super::qom_types;

/// The containers below the root.
const CONTAINERS: [&str; 3] = ["backend", "objects", "chardevs"];

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Root,
    Container(&'static str),
    Chardev(String),
    Object(String),
}

impl Place {
    /// The place that `path` names.
    fn find(daemon: &Daemon, path: &str) -> Result<Self, Error> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let places = Self::all(daemon);
        let is_named = |place: &&Self| match path.starts_with('/') {
            true => place.parts() == parts,
            false => place.parts().ends_with(&parts),
        };
        let mut found = places.iter().filter(is_named);
        let first = found.next().ok_or_else(|| Error::device_not_found(path))?;
        match found.next() {
            Some(_) => Err(Error::generic(format!("Path '{path}' is ambiguous"))),
            None => Ok(first.clone()),
        }
    }

    fn all(daemon: &Daemon) -> Vec<Self> {
        let mut places = vec![Self::Root];
        places.extend(CONTAINERS.map(Self::Container));
        let chardevs = daemon.chardevs.borrow();
        places.extend(
            chardevs
                .iter()
                .map(|device| Self::Chardev(device.id().to_owned())),
        );
        let objects = daemon.objects.borrow();
        places.extend(objects.types().map(|(id, _)| Self::Object(id.to_owned())));
        places
    }

    fn parts(&self) -> Vec<&str> {
        match self {
            Self::Root => vec![],
            Self::Container(name) => vec![name],
            Self::Chardev(id) => vec!["chardevs", id],
            Self::Object(id) => vec!["objects", id],
        }
    }

    fn path(&self) -> String {
        format!("/{}", self.parts().join("/"))
    }

    fn type_name(&self, daemon: &Daemon) -> &'static str {
        match self {
            Self::Root | Self::Container(_) => "container",
            Self::Chardev(id) => match daemon.chardevs.borrow().find(id) {
                Ok(device) => qom_types::of_chardev(device.backend()),
                Err(_) => "chardev",
            },
            Self::Object(id) => {
                let objects = daemon.objects.borrow();
                let kind = objects.types().find(|(other, _)| other == id);
                kind.map_or("object", |(_, kind)| kind)
            }
        }
    }

    /// What is right below.
    fn children(&self, daemon: &Daemon) -> Vec<Self> {
        let below = |place: &Self| {
            let (parts, own) = (place.parts(), self.parts());
            parts.len() == own.len() + 1 && parts.starts_with(&own)
        };
        Self::all(daemon).into_iter().filter(below).collect()
    }

    /// The properties, those that are objects below included.
    fn properties(&self, daemon: &Daemon) -> Vec<ObjectPropertyInfo> {
        let kind = self.type_name(daemon);
        let mut properties = qom_types::properties_of(kind);
        for child in self.children(daemon) {
            let name = child.parts().last().copied().unwrap_or_default().to_owned();
            let r#type = format!("child<{}>", child.type_name(daemon));
            properties.push(qom_types::property(&name, r#type));
        }
        properties
    }

    /// Reads a property; `None`: there is none of that name.
    fn get(&self, daemon: &Daemon, name: &str) -> Option<Result<Value, Unreadable>> {
        if name == "type" {
            return Some(Ok(json!(self.type_name(daemon))));
        }
        let children = self.children(daemon);
        let child = children
            .iter()
            .find(|child| child.parts().last() == Some(&name));
        if let Some(child) = child {
            return Some(Ok(json!(child.path())));
        }
        match self {
            Self::Root | Self::Container(_) => None,
            Self::Object(id) => daemon.objects.borrow().get(id, name),
            Self::Chardev(id) => {
                let device = daemon.chardevs.borrow().find(id).ok()?;
                match (device.backend(), name) {
                    (Backend::Null | Backend::Stdio, _) => None,
                    (_, "connected") => Some(Ok(json!(device.is_connected()))),
                    (Backend::Server { address, .. }, "addr") => Some(Ok(address_value(address))),
                    _ => None,
                }
            }
        }
    }
}

fn address_value(address: &SocketAddress) -> Value {
    serde_json::to_value(address).unwrap_or_default()
}

/// `qom-list`.
pub(super) fn list(daemon: &Daemon, path: &str) -> Result<Vec<ObjectPropertyInfo>, Error> {
    Ok(Place::find(daemon, path)?.properties(daemon))
}

/// `qom-get`.
pub(super) fn get(daemon: &Daemon, arguments: &QomGet) -> Result<Value, Error> {
    let QomGet { path, property } = arguments;
    let place = Place::find(daemon, path)?;
    let kind = place.type_name(daemon);
    let refused = |why| Error::generic(format!("Property '{kind}.{property}' {why}"));
    match place.get(daemon, property) {
        Some(Ok(value)) => Ok(value),
        Some(Err(Unreadable)) => Err(refused("is not readable")),
        None => Err(refused("not found")),
    }
}

/// `qom-set`.
pub(super) async fn set(daemon: &Rc<Daemon>, arguments: QomSet) -> Result<Empty, Error> {
    let QomSet {
        path,
        property,
        value,
    } = arguments;
    let place = Place::find(daemon, &path)?;
    if let Place::Object(id) = &place {
        objects::set(daemon, id, &property, value).await?;
        return Ok(Empty {});
    }
    let why = match place.get(daemon, &property) {
        Some(_) => "is not writable",
        None => "not found",
    };
    let kind = place.type_name(daemon);
    Err(Error::generic(format!(
        "Property '{kind}.{property}' {why}"
    )))
}

/// `qom-list-get`.
pub(super) fn list_get(
    daemon: &Daemon,
    arguments: &QomListGet,
) -> Result<Vec<ObjectPropertiesValues>, Error> {
    let values = |path: &String| {
        let place = Place::find(daemon, path)?;
        let value = |property: ObjectPropertyInfo| ObjectPropertyValue {
            value: place.get(daemon, &property.name).and_then(Result::ok),
            name: property.name,
            r#type: property.r#type,
        };
        let properties = place.properties(daemon).into_iter().map(value).collect();
        Ok(ObjectPropertiesValues { properties })
    };
    arguments.paths.iter().map(values).collect()
}

/// `query-iothreads`.
pub(super) fn iothreads(daemon: &Daemon) -> Vec<IOThreadInfo> {
    let objects = daemon.objects.borrow();
    let info = |(id, thread, _): (&str, &objects::Thread, &ObjectBranch)| {
        let number = |name| {
            let value = objects.get(id, name).and_then(Result::ok);
            value.and_then(|value| value.as_i64()).unwrap_or_default()
        };
        IOThreadInfo {
            id: id.to_owned(),
            thread_id: thread.id,
            poll_max_ns: number("poll-max-ns"),
            poll_grow: number("poll-grow"),
            poll_shrink: number("poll-shrink"),
            aio_max_batch: number("aio-max-batch"),
        }
    };
    objects.iothreads().map(info).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Property;

    #[test]
    fn properties_of_all_types_are_known() {
        for name in Property::types() {
            assert!(qom_types::properties(name).unwrap().len() > 1, "{name}");
        }
    }
}
