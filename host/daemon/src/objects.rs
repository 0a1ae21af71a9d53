//! The objects: iothreads and plugins, in one namespace.
//!
//! Control plane. Invariant: an object that something uses is not deleted.

mod throttle;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outport_block::IoThread;
use outport_block::filter::ThrottleGroup;
use outport_plugin::{Limits, PluginSpec};
use outport_qmp::Error;
use outport_qmp::error::is_identifier;
use outport_qmp::types::plugin::WasmPluginProperties;
use outport_qmp::types::qom::{IothreadProperties, ObjectBranch, ObjectOptions};

use crate::daemon::Daemon;

/// Most threads that an iothread keeps for blocking work, if nobody says otherwise.
const THREAD_POOL_MAX: i64 = 64;

/// Weights of polling are shifts of a 64-bit number.
const POLL_WEIGHT_MAX: i64 = 63;

/// One object.
#[derive(Debug, Clone)]
enum Object {
    Iothread(IoThread),
    Throttle(Arc<ThrottleGroup>),
    WasmPlugin,
    /// A plugin that is being compiled: it has its id, and nothing else yet.
    Coming,
}

/// All objects, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    list: Vec<(String, Object)>,
}

impl Objects {
    /// Reserves an id.
    fn reserve(&mut self, id: &str) -> Result<(), Error> {
        if !is_identifier(id) {
            return Err(Error::not_an_identifier("id"));
        }
        if self.list.iter().any(|(other, _)| other == id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.list.push((id.to_owned(), Object::Coming));
        Ok(())
    }

    fn set(&mut self, id: &str, object: Object) {
        if let Some((_, slot)) = self.list.iter_mut().find(|(other, _)| other == id) {
            *slot = object;
        }
    }

    fn remove(&mut self, id: &str) {
        self.list.retain(|(other, _)| other != id);
    }

    fn find(&self, id: &str) -> Option<&Object> {
        self.list
            .iter()
            .find(|(other, _)| other == id)
            .map(|(_, object)| object)
    }

    /// The iothread of this id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn iothread(&self, id: &str) -> Result<IoThread, Error> {
        match self.find(id) {
            Some(Object::Iothread(iothread)) => Ok(iothread.clone()),
            _ => Err(Error::generic(format!("iothread \"{id}\" not found"))),
        }
    }

    /// The throttle group of this id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn throttle_group(&self, id: &str) -> Result<Arc<ThrottleGroup>, Error> {
        match self.find(id) {
            Some(Object::Throttle(group)) => Ok(group.clone()),
            _ => Err(Error::generic(format!(
                "Throttle group '{id}' does not exist"
            ))),
        }
    }

    /// Ids and types.
    pub(crate) fn types(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.list.iter().map(|(id, object)| {
            let kind = match object {
                Object::Iothread(_) => "iothread",
                Object::Throttle(_) => "throttle-group",
                Object::WasmPlugin | Object::Coming => "wasm-plugin",
            };
            (id.as_str(), kind)
        })
    }
}

/// `object-add`.
///
/// # Errors
/// In QEMU's words; nothing was added then.
pub(crate) async fn add(daemon: &Rc<Daemon>, options: ObjectOptions) -> Result<(), Error> {
    let ObjectOptions { id, branch } = options;
    daemon.objects.borrow_mut().reserve(&id)?;
    let made = match branch {
        ObjectBranch::Iothread(properties) => iothread(&id, &properties),
        ObjectBranch::ThrottleGroup(properties) => throttle::limits(&properties)
            .map(|limits| Object::Throttle(ThrottleGroup::new(&id, limits))),
        ObjectBranch::WasmPlugin(properties) => plugin(daemon, &id, properties).await,
    };
    let mut objects = daemon.objects.borrow_mut();
    match made {
        Ok(object) => {
            objects.set(&id, object);
            Ok(())
        }
        Err(error) => {
            objects.remove(&id);
            Err(error)
        }
    }
}

/// `object-del`.
///
/// # Errors
/// There is no such object, or something uses it.
pub(crate) fn delete(daemon: &Daemon, id: &str) -> Result<(), Error> {
    let object = daemon.objects.borrow().find(id).cloned();
    match object.ok_or_else(|| Error::no_such_object(id))? {
        Object::Iothread(_) if daemon.exports.uses_iothread(id) => {
            return Err(Error::object_in_use(id));
        }
        Object::Throttle(group) if daemon.graph.borrow().uses_throttle(&group) => {
            return Err(Error::object_in_use(id));
        }
        Object::Iothread(_) | Object::Throttle(_) => {}
        Object::Coming => return Err(Error::object_in_use(id)),
        Object::WasmPlugin => {
            // Only nodes can hold a plugin.
            let removed = daemon.plugins.registry()?.remove(id);
            removed.map_err(|_in_use| Error::object_in_use(id))?;
        }
    }
    daemon.objects.borrow_mut().remove(id);
    Ok(())
}

fn iothread(id: &str, properties: &IothreadProperties) -> Result<Object, Error> {
    let weight = properties.poll_weight.unwrap_or(0);
    for (name, value, max) in [
        ("aio-max-batch", properties.aio_max_batch, i64::MAX),
        ("thread-pool-min", properties.thread_pool_min, i64::MAX),
        ("thread-pool-max", properties.thread_pool_max, i64::MAX),
        ("poll-max-ns", properties.poll_max_ns, i64::MAX),
        ("poll-grow", properties.poll_grow, i64::MAX),
        ("poll-shrink", properties.poll_shrink, i64::MAX),
        ("poll-weight", Some(weight), POLL_WEIGHT_MAX),
    ] {
        if value.is_some_and(|value| !(0..=max).contains(&value)) {
            let message = format!("{name} value must be in range [0, {max}]");
            return Err(Error::generic(message));
        }
    }
    let pool_max = properties.thread_pool_max.unwrap_or(THREAD_POOL_MAX);
    if properties.thread_pool_min.unwrap_or(0) > pool_max {
        return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
    }
    let started = IoThread::start(id);
    started
        .map(Object::Iothread)
        .map_err(|error| Error::generic(format!("Could not start iothread '{id}': {error}")))
}

async fn plugin(
    daemon: &Daemon,
    id: &str,
    properties: WasmPluginProperties,
) -> Result<Object, Error> {
    let mut limits = Limits::default();
    if let Some(bytes) = properties.memory_max {
        limits.memory_max = bytes.0;
    }
    match properties.call_time_max_ms {
        None => {}
        Some(0) => return Err(Error::expects("call-time-max-ms", "a value of at least 1")),
        Some(ms) => limits.call_time_max = Some(Duration::from_millis(ms)),
    }
    let spec = PluginSpec {
        id: id.to_owned(),
        filename: properties.filename.into(),
        sha256: properties.sha256,
        allow_unpinned: properties.allow_unpinned.unwrap_or(false),
        limits,
    };
    let registry = daemon.plugins.registry()?.clone();
    let added = registry.add_in_background(spec).await;
    added
        .map(|_| Object::WasmPlugin)
        .map_err(|error| Error::generic(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_checked_in_qemus_words() {
        let error = |properties: IothreadProperties| iothread("io", &properties).unwrap_err().desc;
        assert_eq!(
            error(IothreadProperties {
                poll_max_ns: Some(-1),
                ..IothreadProperties::default()
            }),
            "poll-max-ns value must be in range [0, 9223372036854775807]"
        );
        assert_eq!(
            error(IothreadProperties {
                poll_weight: Some(64),
                ..IothreadProperties::default()
            }),
            "poll-weight value must be in range [0, 63]"
        );
        assert_eq!(
            error(IothreadProperties {
                thread_pool_min: Some(65),
                ..IothreadProperties::default()
            }),
            "bad thread-pool-min/thread-pool-max values"
        );
    }

    #[test]
    fn ids_are_unique_identifiers() {
        let mut objects = Objects::default();
        objects.reserve("io0").unwrap();
        assert_eq!(
            objects.reserve("io0").unwrap_err().desc,
            "attempt to add duplicate property 'io0' to object (type 'container')"
        );
        let want = "Parameter 'id' expects an identifier";
        assert_eq!(objects.reserve("1x").unwrap_err().desc, want);
        assert_eq!(
            objects.iothread("zz").unwrap_err().desc,
            "iothread \"zz\" not found"
        );
    }
}
