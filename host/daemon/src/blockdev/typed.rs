//! Options of a command line as QMP would have them.
//!
//! On a command line every value is a string, and only the plugin's schema knows what an option
//! of a third-party format is. The configuration is told in QMP's types, so that it can be loaded.

use outport_qmp::Error;
use outport_qmp::de::Mode;
use outport_qmp::types::block_core::{
    BlockdevDriverOptions, BlockdevOptions, BlockdevRef, BlockdevRefOrNull, ChildMut,
    PluginDriverOptions,
};
use serde_json::{Map, Value, json};

use crate::daemon::Daemon;

/// Gives the options of plugins, at and below a node, the types that their schemas have.
///
/// # Errors
/// A child that is no node, or no plugin of that name.
pub(super) fn options(daemon: &Daemon, options: &mut BlockdevOptions) -> Result<(), Error> {
    if let BlockdevDriverOptions::Plugin(plugin) = &mut options.branch {
        return plugin_options(daemon, plugin);
    }
    for child in options.children_mut() {
        if let ChildMut::Definition(definition) = child {
            self::options(daemon, definition)?;
        }
    }
    Ok(())
}

fn child(daemon: &Daemon, child: &mut BlockdevRef) -> Result<(), Error> {
    match child {
        BlockdevRef::Definition(definition) => options(daemon, definition),
        BlockdevRef::Reference(_) => Ok(()),
    }
}

fn plugin_options(daemon: &Daemon, plugin: &mut PluginDriverOptions) -> Result<(), Error> {
    let mut children = Map::new();
    for role in ["file", "data-file"] {
        if let Some(mut node) = plugin.take_child(role, Mode::Keyval)? {
            child(daemon, &mut node)?;
            children.insert(role.to_owned(), json!(node));
        }
    }
    if let Some(mut backing) = plugin.take_backing(Mode::Keyval)? {
        if let BlockdevRefOrNull::Definition(definition) = &mut backing {
            options(daemon, definition)?;
        }
        children.insert("backing".to_owned(), json!(backing));
    }
    let registry = daemon.plugins.registry()?;
    let factory = registry.format(&plugin.driver);
    let factory = factory.map_err(|error| Error::generic(error.to_string()))?;
    by_schema(&mut plugin.options, factory.options_schema().json());
    plugin.options.extend(children);
    Ok(())
}

/// Options of a command line are strings: turns each into the type that the schema has for it. What
/// does not fit stays a string, for the check to complain about.
pub(super) fn by_schema(options: &mut Map<String, Value>, schema: &Value) {
    for (name, value) in options {
        let rules = &schema["properties"][name.as_str()];
        match value {
            Value::Object(members) => by_schema(members, rules),
            Value::String(text) => {
                let typed = match rules["type"].as_str() {
                    Some("integer" | "number") => text.parse::<i64>().ok().map(Value::from),
                    Some("boolean") => match text.as_str() {
                        "on" | "yes" | "true" | "y" => Some(Value::Bool(true)),
                        "off" | "no" | "false" | "n" => Some(Value::Bool(false)),
                        _ => None,
                    },
                    _ => None,
                };
                if let Some(typed) = typed {
                    *value = typed;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_become_what_the_schema_says() {
        let schema = json!({"properties": {
            "n": {"type": "integer"},
            "b": {"type": "boolean"},
            "o": {"type": "object",
                "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}},
        }});
        let mut options = json!({"n": "5", "b": "on", "x": "5", "o": {"s": "5", "n": "x"}});
        by_schema(options.as_object_mut().unwrap(), &schema);
        assert_eq!(
            options,
            json!({"n": 5, "b": true, "x": "5", "o": {"s": "5", "n": "x"}})
        );
    }
}
