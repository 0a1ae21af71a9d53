//! Which drivers `--blockdev` takes, and the options of each, for people: told from the schema that
//! reads them. Pure but for the list of plugins.
//!
//! qemu-storage-daemon has no help for this option.

use std::fmt::Write;

use outport_qmp::types::introspect::{SchemaInfo, SchemaInfoBranch, SchemaInfoObjectMember};

use crate::daemon::Daemon;

/// How a sentence about an unknown driver begins.
pub(super) const UNKNOWN: &str = "Parameter 'driver' does not accept value";

/// The driver of `DRIVER,help` or `driver=DRIVER,help`, the options in any order; empty for `help`
/// alone. `None`: nobody asked.
pub(super) fn asked(text: &str) -> Option<&str> {
    // A doubled comma is part of a value.
    let whole = text.replace(",,", "");
    let mut words = text.split(',');
    if text.starts_with('{') || !whole.split(',').any(|word| word == "help" || word == "?") {
        return None;
    }
    let named = words.clone().find_map(|word| word.strip_prefix("driver="));
    let first = words
        .next()
        .filter(|it| !it.contains('=') && !matches!(*it, "help" | "?"));
    Some(named.or(first).unwrap_or_default())
}

/// One line with the names of all drivers.
pub(super) fn list(daemon: &Daemon) -> String {
    let schema = outport_qmp::commands::schema();
    let types = Types(&schema);
    let mut names: Vec<String> = types.cases().map(|(name, _)| name.to_owned()).collect();
    if let Ok(registry) = daemon.plugins.registry() {
        names.extend(registry.format_names());
    }
    names.sort_unstable();
    names.dedup();
    format!("Drivers: {}", names.join(", "))
}

/// The options of a driver, one on a line; those of every node come first. `None`: the schema does
/// not have the driver.
pub(super) fn options(driver: &str) -> Option<String> {
    let schema = outport_qmp::commands::schema();
    let types = Types(&schema);
    let (_, own) = types.cases().find(|(name, _)| *name == driver)?;
    let mut text = format!("{driver} options:\n");
    let members = types.arguments().iter().chain(types.members(own));
    for member in members.filter(|it| it.name != "driver") {
        let name = &member.name;
        // Writing to a String does not fail.
        let _ = match types.value(&member.r#type) {
            Some(value) => writeln!(text, "  {name}={value}"),
            None => writeln!(text, "  {name}.<option>=..."),
        };
    }
    Some(text)
}

/// The schema, looked up by name.
struct Types<'a>(&'a [SchemaInfo]);

impl<'a> Types<'a> {
    fn find(&self, name: &str) -> Option<&'a SchemaInfoBranch> {
        let found = self.0.iter().find(|entry| entry.name == name);
        found.map(|entry| &entry.branch)
    }

    /// The type of the arguments of `blockdev-add`.
    fn node(&self) -> Option<&'a SchemaInfoBranch> {
        match self.find("blockdev-add")? {
            SchemaInfoBranch::Command(command) => self.find(&command.arg_type),
            _ => None,
        }
    }

    /// Members that every node has.
    fn arguments(&self) -> &'a [SchemaInfoObjectMember] {
        match self.node() {
            Some(SchemaInfoBranch::Object(object)) => &object.members,
            _ => &[],
        }
    }

    /// Drivers, with the types of their further members.
    fn cases(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let variants = match self.node() {
            Some(SchemaInfoBranch::Object(object)) => object.variants.as_deref(),
            _ => None,
        };
        let variants = variants.unwrap_or_default().iter();
        variants.map(|it| (it.case.as_str(), it.r#type.as_str()))
    }

    fn members(&self, object: &str) -> &'a [SchemaInfoObjectMember] {
        match self.find(object) {
            Some(SchemaInfoBranch::Object(object)) => &object.members,
            _ => &[],
        }
    }

    /// What a member takes; `None`: only members of its own.
    fn value(&self, name: &str) -> Option<String> {
        match self.find(name)? {
            SchemaInfoBranch::Enum(values) => {
                let names: Vec<_> = values.members.iter().map(|it| it.name.as_str()).collect();
                Some(names.join("|"))
            }
            SchemaInfoBranch::Builtin(_) if name == "bool" => Some("on|off".to_owned()),
            SchemaInfoBranch::Builtin(_) => Some(format!("<{name}>")),
            // A node or its definition, or a word or its details: the first is the short form.
            SchemaInfoBranch::Alternate(choice) => {
                let mut members = choice.members.iter();
                members.find_map(|it| self.value(&it.r#type))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_asked_for_in_any_place() {
        assert_eq!(asked("help"), Some(""));
        assert_eq!(asked("qcow2,help"), Some("qcow2"));
        assert_eq!(asked("driver=qcow2,help"), Some("qcow2"));
        assert_eq!(asked("help,driver=qcow2"), Some("qcow2"));
        assert_eq!(asked("file,filename=help"), None);
        assert_eq!(asked("file,filename=a,,help"), None);
        assert_eq!(asked("{\"driver\": \"help\"}"), None);
    }

    #[test]
    fn options_come_from_the_schema() {
        let text = options("qcow2").unwrap();
        assert!(text.contains("  read-only=on|off\n"), "{text}");
        assert!(text.contains("  lazy-refcounts=on|off\n"), "{text}");
        assert!(text.contains("  discard=ignore|unmap\n"), "{text}");
        assert!(text.contains("  cache.<option>=...\n"), "{text}");
        assert!(text.contains("  file=<str>\n"), "{text}");
        assert_eq!(options("nosuch"), None);
    }
}
