//! The object tree, as far as clients look at it (`qom.json`).

use outport_qmp::Error;
use outport_qmp::types::qom::ObjectPropertyInfo;

use crate::daemon::Daemon;

/// Properties of an iothread.
const IOTHREAD: [&str; 7] = [
    "aio-max-batch",
    "poll-grow",
    "poll-max-ns",
    "poll-shrink",
    "poll-weight",
    "thread-pool-max",
    "thread-pool-min",
];

/// Properties of a plugin, with their types.
const PLUGIN: [(&str, &str); 4] = [
    ("filename", "string"),
    ("sha256", "string"),
    ("memory-max", "size"),
    ("call-time-max-ms", "int"),
];

/// `qom-list`. A path may be absolute or the unique end of one.
pub(super) fn list(daemon: &Daemon, path: &str) -> Result<Vec<ObjectPropertyInfo>, Error> {
    let objects = daemon.objects.borrow();
    let mut properties = vec![property("type", "string".into())];
    match path
        .trim_start_matches('/')
        .split('/')
        .collect::<Vec<_>>()
        .as_slice()
    {
        [""] => {
            let containers = ["objects", "chardevs"];
            let child = |name: &&str| property(name, "child<container>".into());
            properties.extend(containers.iter().map(child));
        }
        ["objects"] => {
            let child = |(id, kind)| property(id, format!("child<{kind}>"));
            properties.extend(objects.types().map(child));
        }
        ["chardevs"] => {
            let chardevs = daemon.chardevs.borrow();
            properties.extend(
                chardevs
                    .ids()
                    .map(|id| property(id, "child<chardev>".into())),
            );
        }
        ["objects", id] | [id] => match objects.types().find(|(other, _)| other == id) {
            Some((_, "iothread")) => {
                properties.extend(IOTHREAD.iter().map(|name| property(name, "int".into())));
            }
            Some(_) => {
                let child = |(name, kind): &(&str, &str)| property(name, (*kind).into());
                properties.extend(PLUGIN.iter().map(child));
            }
            None => return Err(Error::device_not_found(path)),
        },
        _ => return Err(Error::device_not_found(path)),
    }
    Ok(properties)
}

fn property(name: &str, r#type: String) -> ObjectPropertyInfo {
    ObjectPropertyInfo {
        name: name.to_owned(),
        r#type,
        description: None,
        default_value: None,
    }
}
