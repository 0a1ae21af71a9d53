//! How a node is called where QEMU tells a file name.
//!
//! A name that opens the node by itself, where there is one: of a file, an export of a server, an
//! image in one of these. What such a name would leave out (a window, a limit, another backing
//! node) is spelled out as options: `json:{"driver": "throttle", ...}`. Only what decides about the
//! bytes that are read is told, as in QEMU.

use std::path::Path;

use outport_block::node::Kind;
use outport_qmp::wire;
use serde_json::{Map, Value};

use crate::graph::{Entry, Graph};

/// The name of a node.
pub(super) fn filename(graph: &Graph, entry: &Entry) -> String {
    let name = Naming::of(graph, entry);
    name.plain.unwrap_or_else(|| {
        let options = wire::line(&name.options);
        format!("json:{}", String::from_utf8_lossy(&options).trim_end())
    })
}

/// Both ways to name a node.
struct Naming {
    /// A name that says all, if there is one.
    plain: Option<String>,
    options: Map<String, Value>,
}

impl Naming {
    fn of(graph: &Graph, entry: &Entry) -> Self {
        let node = &entry.node;
        let driver = node.driver();
        let mut options = Map::from_iter([("driver".to_owned(), Value::from(driver))]);
        let plain = match node.kind() {
            Kind::File(file) => {
                let path = file.path().display().to_string();
                options.insert("filename".into(), path.clone().into());
                Some(path)
            }
            Kind::Remote(_) => {
                // An address with more to it fits no URI.
                let in_uri = [
                    "export",
                    "server.type",
                    "server.host",
                    "server.port",
                    "server.path",
                ];
                options.extend(asked(entry, &[]));
                let fits = asked(entry, &[]).all(|(name, _)| in_uri.contains(&&*name));
                node.remote_name().filter(|_| fits)
            }
            Kind::Null { .. } => {
                options.extend(asked(entry, &[]));
                (options.len() == 1).then(|| format!("{driver}://"))
            }
            Kind::Raw(_) => {
                options.extend(asked(entry, &["file"]));
                let bare = options.len() == 1;
                let below = below(graph, entry, "file", &mut options);
                below.filter(|_| bare && is_protocol(graph, entry))
            }
            Kind::Filter(filter) => {
                let (role, _) = filter.child();
                options.extend(asked(entry, &[role]));
                let bare = options.len() == 1;
                let below = below(graph, entry, role, &mut options);
                let named = below.filter(|_| bare && driver == "blkdebug");
                named.map(|below| format!("blkdebug::{below}"))
            }
            Kind::Image(_) => {
                let below = below(graph, entry, "file", &mut options);
                let backing = other_backing(graph, entry);
                let as_named = backing.is_none() && is_protocol(graph, entry);
                options.extend(backing.map(|backing| ("backing".to_owned(), backing)));
                below.filter(|_| as_named)
            }
        };
        Self { plain, options }
    }
}

/// Adds the options of a child; returns its plain name.
fn below(
    graph: &Graph,
    entry: &Entry,
    role: &str,
    options: &mut Map<String, Value>,
) -> Option<String> {
    let child = child(graph, entry, role)?;
    let child = Naming::of(graph, child);
    options.insert(role.to_owned(), Value::Object(child.options));
    child.plain
}

fn child<'g>(graph: &'g Graph, entry: &Entry, role: &str) -> Option<&'g Entry> {
    let mut children = graph.children(entry.node.name());
    let (_, name) = children.find(|(other, _)| *other == role)?;
    graph.find(name)
}

/// Members that were given, but for those of children and those that change no byte.
fn asked<'e>(
    entry: &'e Entry,
    children: &'e [&str],
) -> impl Iterator<Item = (String, Value)> + use<'e> {
    const QUIET: [&str; 2] = ["open-timeout", "reconnect-delay"];
    let members = entry.options.iter().filter(move |(name, _)| {
        let first = name.split('.').next().unwrap_or(name);
        !children.contains(&first) && !QUIET.contains(&first)
    });
    members.cloned()
}

/// Whether what holds a node's bytes is a driver without a format.
fn is_protocol(graph: &Graph, entry: &Entry) -> bool {
    let file = child(graph, entry, "file");
    file.is_some_and(|file| match file.node.kind() {
        Kind::File(_) | Kind::Remote(_) | Kind::Null { .. } => true,
        Kind::Filter(_) => file.node.driver() == "blkdebug",
        Kind::Raw(_) | Kind::Image(_) => false,
    })
}

/// The options of a backing node that is not the one that the image names; `null` for none.
fn other_backing(graph: &Graph, entry: &Entry) -> Option<Value> {
    let fact = entry.facts.get("backing-filename").and_then(Value::as_str);
    let now = child(graph, entry, "backing").map(|backing| Naming::of(graph, backing));
    match (fact, now) {
        (None, None) => None,
        (Some(_), None) => Some(Value::Null),
        (Some(fact), Some(now)) if now.plain.as_deref() == Some(&*resolved(graph, entry, fact)) => {
            None
        }
        (_, Some(now)) => Some(Value::Object(now.options)),
    }
}

/// A name in an image is relative to the image.
pub(super) fn resolved(graph: &Graph, entry: &Entry, name: &str) -> String {
    let image = child(graph, entry, "file").and_then(|file| file.node.host_file());
    let folder = image.and_then(|image| image.path().parent());
    folder
        .unwrap_or(Path::new(""))
        .join(name)
        .display()
        .to_string()
}
