//! The objects: everything that `object-add` makes, in one namespace.
//!
//! Control plane. An object is what it was asked to be (its properties, as the client sent them)
//! and what lives of it: a thread, bytes, rules. Invariants: an object that something uses is not
//! deleted; a change either takes effect as a whole or not at all.

mod authz;
mod authz_file;
mod iothread;
mod monitor;
mod plugin;
mod properties;
mod secret;
mod throttle;
mod tls;
mod trail;

use std::rc::Rc;
use std::sync::Arc;

use outport_block::IoThread;
use outport_block::filter::ThrottleGroup;
use outport_export::tls::Credentials;
use outport_qmp::Error;
use outport_qmp::de::{self, Mode};
use outport_qmp::error::is_identifier;
use outport_qmp::types::qom::{ObjectBranch, ObjectOptions};
use serde_json::{Map, Value};

use crate::daemon::Daemon;

use authz::Authz;
pub(crate) use iothread::Thread;
pub(crate) use monitor::MonitorObject;
pub(crate) use properties::{Property, Unreadable};
use secret::Secret;

/// What lives of an object.
#[derive(Debug, Clone)]
enum Live {
    Authz(Authz),
    Iothread(Thread),
    Monitor(Rc<MonitorObject>),
    Plugin,
    Secret(Secret),
    Throttle(Arc<ThrottleGroup>),
    Tls(Arc<Credentials>),
    /// Being made: it has its id, and nothing else yet.
    Coming,
}

/// One object.
#[derive(Debug)]
struct Entry {
    id: String,
    /// As it was asked for, with all changes since.
    branch: ObjectBranch,
    live: Live,
    /// Another number after each change, and no other object's: who waited sees that it is still
    /// what it was.
    version: u64,
}

/// All objects, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    list: Vec<Entry>,
    /// The last number that was given out.
    versions: u64,
}

impl Objects {
    /// Reserves an id.
    fn reserve(&mut self, id: &str, branch: &ObjectBranch) -> Result<(), Error> {
        if !is_identifier(id) {
            return Err(Error::not_an_identifier("id"));
        }
        if self.find(id).is_some() {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let version = self.next_version();
        self.list.push(Entry {
            id: id.to_owned(),
            branch: branch.clone(),
            live: Live::Coming,
            version,
        });
        Ok(())
    }

    const fn next_version(&mut self) -> u64 {
        self.versions += 1;
        self.versions
    }

    /// Checks that an object is still the one that somebody has looked at.
    fn unchanged(&self, id: &str, version: u64) -> Result<(), Error> {
        let entry = self.find(id).ok_or_else(|| Error::device_not_found(id))?;
        match entry.version == version {
            true => Ok(()),
            false => Err(Error::generic(format!(
                "Object '{id}' was changed by another command meanwhile"
            ))),
        }
    }

    /// Gives an object other properties.
    fn change(&mut self, id: &str, branch: ObjectBranch, live: Live) {
        let version = self.next_version();
        if let Some(entry) = self.find_mut(id) {
            entry.branch = branch;
            entry.live = live;
            entry.version = version;
        }
    }

    fn find(&self, id: &str) -> Option<&Entry> {
        self.list.iter().find(|entry| entry.id == id)
    }

    fn find_mut(&mut self, id: &str) -> Option<&mut Entry> {
        self.list.iter_mut().find(|entry| entry.id == id)
    }

    fn remove(&mut self, id: &str) {
        self.list.retain(|entry| entry.id != id);
    }

    /// The iothread of this id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn iothread(&self, id: &str) -> Result<IoThread, Error> {
        match self.find(id).map(|entry| &entry.live) {
            Some(Live::Iothread(thread)) => Ok(thread.iothread.clone()),
            _ => Err(Error::generic(format!("iothread \"{id}\" not found"))),
        }
    }

    /// The id in what a command names an iothread by: the id, or its path.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn iothread_id(&self, named: &str) -> Result<String, Error> {
        let path = named.strip_prefix('/').unwrap_or(named);
        let id = path.strip_prefix("objects/").unwrap_or(named);
        let known = self.iothread(id).map(|_| id.to_owned());
        known.map_err(|_| Error::generic(format!("iothread \"{named}\" not found")))
    }

    /// The throttle group of this id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn throttle_group(&self, id: &str) -> Result<Arc<ThrottleGroup>, Error> {
        match self.find(id).map(|entry| &entry.live) {
            Some(Live::Throttle(group)) => Ok(group.clone()),
            _ => Err(Error::generic(format!(
                "Throttle group '{id}' does not exist"
            ))),
        }
    }

    /// All iothreads with their ids and properties.
    pub(crate) fn iothreads(&self) -> impl Iterator<Item = (&str, &Thread, &ObjectBranch)> {
        self.list.iter().filter_map(|entry| match &entry.live {
            Live::Iothread(thread) => Some((entry.id.as_str(), thread, &entry.branch)),
            _ => None,
        })
    }

    /// The bytes of a secret.
    ///
    /// # Errors
    /// There is no secret of this id.
    fn secret(&self, id: &str) -> Result<Rc<[u8]>, Error> {
        match self.find(id).map(|entry| &entry.live) {
            Some(Live::Secret(secret)) => Ok(secret.bytes()),
            Some(_) => Err(Error::generic(format!(
                "Object with id '{id}' is not a secret"
            ))),
            None => Err(Error::generic(format!("No secret with id '{id}'"))),
        }
    }

    /// The TLS credentials of this id.
    ///
    /// # Errors
    /// There are none.
    pub(crate) fn tls(&self, id: &str) -> Result<Arc<Credentials>, Error> {
        match self.find(id).map(|entry| &entry.live) {
            Some(Live::Tls(credentials)) => Ok(credentials.clone()),
            Some(_) => Err(Error::generic(format!(
                "Object with id '{id}' is not TLS credentials"
            ))),
            None => Err(Error::generic(format!("No TLS credentials with id '{id}'"))),
        }
    }

    /// Whether this is the id of an authorization object.
    ///
    /// # Errors
    /// There is no such object, or it is of another kind.
    pub(crate) fn is_policy(&self, id: &str) -> Result<(), Error> {
        match self.find(id).map(|entry| &entry.live) {
            Some(Live::Authz(_)) => Ok(()),
            Some(_) => Err(Error::generic(format!(
                "Object '{id}' is not a QAuthZ subclass"
            ))),
            None => Err(Error::generic(format!("Cannot find QAuthZ object ID {id}"))),
        }
    }

    /// Ids and types.
    pub(crate) fn types(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let entries = self.list.iter();
        entries.map(|entry| (entry.id.as_str(), properties::type_name(&entry.branch)))
    }

    /// Reads a property; `None`: the object has no such property.
    pub(crate) fn get(&self, id: &str, property: &str) -> Option<Result<Value, Unreadable>> {
        let entry = self.find(id)?;
        properties::get(&entry.branch, property)
    }

    /// Everything as it can be added again, in the order in which it was added.
    pub(crate) fn options(&self) -> impl Iterator<Item = ObjectOptions> {
        let made = self.list.iter();
        let made = made.filter(|entry| !matches!(entry.live, Live::Coming));
        made.map(|entry| ObjectOptions {
            id: entry.id.clone(),
            branch: entry.branch.clone(),
        })
    }
}

/// `object-add`.
///
/// # Errors
/// In QEMU's words; nothing was added then.
pub(crate) async fn add(daemon: &Rc<Daemon>, options: ObjectOptions) -> Result<(), Error> {
    let ObjectOptions { id, branch } = options;
    daemon.objects.borrow_mut().reserve(&id, &branch)?;
    let made = make(daemon, &id, &branch).await;
    let mut objects = daemon.objects.borrow_mut();
    match made {
        Ok(live) => {
            announce(daemon, &id, &live);
            if let Some(entry) = objects.find_mut(&id) {
                entry.live = live;
            }
            Ok(())
        }
        Err(error) => {
            objects.remove(&id);
            Err(error)
        }
    }
}

/// A policy can be asked from now on, by its id.
fn announce(daemon: &Daemon, id: &str, live: &Live) {
    if let Live::Authz(authz) = live {
        let policy = authz.policy.clone();
        daemon.policies.set(id, policy, authz.enforced);
    }
}

/// Brings an object to life.
async fn make(daemon: &Rc<Daemon>, id: &str, branch: &ObjectBranch) -> Result<Live, Error> {
    Ok(match branch {
        ObjectBranch::AuthzList(list) => Live::Authz(Authz::list(daemon, id, list).await?),
        ObjectBranch::AuthzListFile(file) | ObjectBranch::AuthzListfile(file) => {
            Live::Authz(Authz::file(daemon, id, file).await?)
        }
        ObjectBranch::AuthzSimple(simple) => Live::Authz(Authz::simple(daemon, id, simple).await?),
        ObjectBranch::AuthzWasm(wasm) => Live::Authz(Authz::wasm(daemon, id, wasm).await?),
        ObjectBranch::Iothread(iothread) => Live::Iothread(Thread::start(id, iothread).await?),
        ObjectBranch::MonitorQmp(monitor) => Live::Monitor(monitor::start(daemon, id, monitor)?),
        ObjectBranch::Secret(secret) => Live::Secret(Secret::load(daemon, secret).await?),
        ObjectBranch::ThrottleGroup(properties) => {
            let limits = throttle::limits(properties)?;
            Live::Throttle(ThrottleGroup::new(id, limits))
        }
        ObjectBranch::TlsCredsAnon(_) => return Err(tls::anonymous()),
        ObjectBranch::TlsCredsPsk(properties) => {
            Live::Tls(tls::share(daemon, id, tls::psk(properties).await?))
        }
        ObjectBranch::TlsCredsX509(properties) => {
            let loaded = tls::x509(daemon, properties).await?;
            Live::Tls(tls::share(daemon, id, loaded))
        }
        ObjectBranch::WasmPlugin(properties) => {
            plugin::load(daemon, id, properties).await?;
            Live::Plugin
        }
    })
}

/// `object-del`; `by` is the monitor that asks.
///
/// # Errors
/// There is no such object, or something uses it.
pub(crate) fn delete(daemon: &Daemon, id: &str, by: Option<&str>) -> Result<(), Error> {
    let live = daemon
        .objects
        .borrow()
        .find(id)
        .map(|entry| entry.live.clone());
    match live.ok_or_else(|| Error::no_such_object(id))? {
        Live::Iothread(_) if daemon.exports.uses_iothread(id) => {
            return Err(Error::object_in_use(id));
        }
        Live::Throttle(group) if daemon.graph.borrow().uses_throttle(&group) => {
            return Err(Error::object_in_use(id));
        }
        Live::Monitor(_) if by == Some(id) => {
            return Err(Error::generic("Cannot delete the current QMP monitor"));
        }
        Live::Coming => return Err(Error::object_in_use(id)),
        Live::Plugin => plugin::unload(daemon, id)?,
        Live::Monitor(monitor) => monitor.stop(),
        // Who still names it denies from now on.
        Live::Authz(_) => daemon.policies.remove(id),
        // Whoever uses credentials goes on with them, as in QEMU.
        Live::Iothread(_) | Live::Secret(_) | Live::Throttle(_) | Live::Tls(_) => {}
    }
    daemon.objects.borrow_mut().remove(id);
    Ok(())
}

/// `qom-set` on an object. The new properties are read and checked as those of a new object.
///
/// # Errors
/// In QEMU's words, or another command changed or replaced the object while files were read;
/// nothing changed then.
pub(crate) async fn set(
    daemon: &Rc<Daemon>,
    id: &str,
    property: &str,
    value: Value,
) -> Result<(), Error> {
    let (branch, live, version) = {
        let objects = daemon.objects.borrow();
        let entry = objects
            .find(id)
            .ok_or_else(|| Error::device_not_found(id))?;
        let branch = properties::changed(&entry.branch, id, property, value)?;
        (branch, entry.live.clone(), entry.version)
    };
    let unchanged = || daemon.objects.borrow().unchanged(id, version);
    let live = match (live, &branch) {
        (Live::Coming, _) => return Err(Error::object_in_use(id)),
        (Live::Iothread(thread), ObjectBranch::Iothread(iothread)) => {
            iothread::check(iothread)?;
            thread.iothread.set_limits(iothread::limits(iothread));
            Live::Iothread(thread)
        }
        (Live::Throttle(group), ObjectBranch::ThrottleGroup(properties)) => {
            group.set_limits(throttle::limits(properties)?);
            Live::Throttle(group)
        }
        (Live::Tls(credentials), ObjectBranch::TlsCredsX509(properties)) => {
            let loaded = tls::x509(daemon, properties).await?;
            unchanged()?;
            // New clients get the new ones; those that are there go on.
            credentials.replace(loaded);
            Live::Tls(credentials)
        }
        (Live::Tls(_), ObjectBranch::TlsCredsPsk(properties)) => {
            let loaded = tls::psk(properties).await?;
            unchanged()?;
            Live::Tls(tls::share(daemon, id, loaded))
        }
        (live @ (Live::Monitor(_) | Live::Plugin), _) => live,
        _ => {
            let made = make(daemon, id, &branch).await?;
            unchanged()?;
            made
        }
    };
    announce(daemon, id, &live);
    daemon.objects.borrow_mut().change(id, branch, live);
    Ok(())
}

/// The members of an object's properties as a client would send them.
fn members(id: &str, branch: &ObjectBranch) -> Map<String, Value> {
    let options = ObjectOptions {
        id: id.to_owned(),
        branch: branch.clone(),
    };
    match serde_json::to_value(&options) {
        Ok(Value::Object(members)) => members,
        _ => Map::default(),
    }
}

/// Reads properties back from their members.
fn from_members(members: &Map<String, Value>) -> Result<ObjectBranch, Error> {
    let options: ObjectOptions = de::from_arguments(members, Mode::Typed)?;
    Ok(options.branch)
}

#[cfg(test)]
mod tests {
    use outport_qmp::types::qom::{AuthZSimpleProperties, ObjectBranch};

    use super::*;

    #[test]
    fn ids_are_unique_identifiers() {
        let mut objects = Objects::default();
        let branch = ObjectBranch::AuthzSimple(AuthZSimpleProperties {
            identity: "me".into(),
        });
        let mut reserve = |id| objects.reserve(id, &branch);
        reserve("io0").unwrap();
        assert_eq!(
            reserve("io0").unwrap_err().desc,
            "attempt to add duplicate property 'io0' to object (type 'container')"
        );
        let want = "Parameter 'id' expects an identifier";
        assert_eq!(reserve("1x").unwrap_err().desc, want);
        assert_eq!(
            objects.iothread("zz").unwrap_err().desc,
            "iothread \"zz\" not found"
        );
    }
}
