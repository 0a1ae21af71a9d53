//! `--check-config`: whether the command line is right, without any effect.
//!
//! Each option is read as it would be carried out, and the names that it makes and needs are
//! followed. Files of images are not opened, so what only they tell is not checked.

use std::collections::BTreeSet;

use outport_qmp::de::{self, Mode};
use outport_qmp::error::is_identifier;
use outport_qmp::qemu_opts::QemuOpts;
use outport_qmp::types::block_core::{
    BlockdevDriverOptions, BlockdevOptions, ChildMut, PluginDriverOptions,
};
use outport_qmp::types::block_export::{BlockExportOptions, BlockExportType, NbdServerOptions};
use outport_qmp::types::qom::{ObjectBranch, ObjectOptions};
use outport_qmp::{Command, Error, keyval};
use serde_json::Value;

use super::config_file;
use crate::args::{Action, Setting};
use crate::chardev;

/// Checks all options in order.
///
/// # Errors
/// The first mistake, with its option.
pub(super) fn check(settings: &[Setting]) -> Result<(), String> {
    let mut names = Names::default();
    settings.iter().try_for_each(|setting| {
        let checked = names.option(setting);
        checked.map_err(|message| setting.complaint(&message))
    })
}

/// What there would be.
#[derive(Default)]
struct Names {
    nodes: BTreeSet<String>,
    objects: BTreeSet<String>,
    iothreads: BTreeSet<String>,
    chardevs: BTreeSet<String>,
    exports: BTreeSet<String>,
    /// NBD servers; the default one has no id.
    servers: BTreeSet<Option<String>>,
}

impl Names {
    fn option(&mut self, setting: &Setting) -> Result<(), String> {
        let text = setting.value.as_str();
        let asks = text == "help" || text.ends_with(",help");
        let checked = match setting.action {
            Action::Object | Action::Chardev if asks => return Ok(()),
            Action::Blockdev => keyval::read::<BlockdevOptions>(text, Some("driver"))
                .and_then(|options| self.command(&Command::BlockdevAdd(options))),
            Action::Export => keyval::read::<BlockExportOptions>(text, Some("type"))
                .and_then(|options| self.command(&Command::BlockExportAdd(options))),
            Action::NbdServer => keyval::read::<NbdServerOptions>(text, None)
                .and_then(|options| self.command(&Command::NbdServerStart(options.into()))),
            Action::Object => keyval::read::<ObjectOptions>(text, Some("qom-type"))
                .and_then(|options| self.command(&Command::ObjectAdd(options))),
            Action::Chardev => chardev::parse(text).and_then(|parsed| self.chardev(&parsed.id)),
            Action::Monitor => self.monitor(text),
            Action::Config => return self.config(text),
            Action::AllowPaths if !std::path::Path::new(text).is_dir() => {
                return Err(format!("'{text}' is not a directory"));
            }
            Action::AllowPaths | Action::Trace => Ok(()),
            Action::Positional => return Err("Unexpected argument".into()),
        };
        checked.map_err(|error| error.desc)
    }

    fn config(&mut self, path: &str) -> Result<(), String> {
        let commands = config_file::read(path)?;
        commands.iter().enumerate().try_for_each(|(at, command)| {
            let checked = self.command(command);
            checked.map_err(|error| config_file::complaint(at, command.name(), &error))
        })
    }

    fn monitor(&mut self, text: &str) -> Result<(), Error> {
        let mut opts = QemuOpts::parse(text, Some("chardev"))?;
        let chardev = opts
            .take("chardev")
            .ok_or_else(|| Error::missing("chardev"))?;
        match self.chardevs.contains(&chardev) {
            true => Ok(()),
            false => Err(no_such_chardev(&chardev)),
        }
    }

    fn chardev(&mut self, id: &str) -> Result<(), Error> {
        match self.chardevs.insert(id.to_owned()) {
            true => Ok(()),
            false => Err(Error::generic(format!("Duplicate ID '{id}' for chardev"))),
        }
    }

    /// What a command makes and needs. Commands that do neither are right.
    fn command(&mut self, command: &Command) -> Result<(), Error> {
        match command {
            Command::BlockdevAdd(options) => {
                if options.node_name.is_none() {
                    let message = "'node-name' must be specified for the root node";
                    return Err(Error::generic(message));
                }
                self.node(&mut options.clone())
            }
            Command::BlockdevDel(node) => match self.nodes.remove(&node.node_name) {
                true => Ok(()),
                false => Err(Error::no_such_node(&node.node_name)),
            },
            Command::ChardevAdd(device) => self.chardev(&device.id),
            Command::ObjectAdd(options) => self.object(options),
            Command::ObjectDel(object) => {
                self.iothreads.remove(&object.id);
                match self.objects.remove(&object.id) {
                    true => Ok(()),
                    false => Err(Error::no_such_object(&object.id)),
                }
            }
            Command::NbdServerStart(server) => match self.servers.insert(server.id.clone()) {
                true => Ok(()),
                false => Err(Error::generic("NBD server already running")),
            },
            Command::BlockExportAdd(options) => self.export(options, &command.arguments()),
            _ => Ok(()),
        }
    }

    fn node(&mut self, options: &mut BlockdevOptions) -> Result<(), Error> {
        for child in options.children_mut() {
            match child {
                ChildMut::Reference(name) => self.node_exists(name)?,
                ChildMut::Definition(definition) => self.node(definition)?,
            }
        }
        if let BlockdevDriverOptions::Plugin(plugin) = &mut options.branch {
            for role in PluginDriverOptions::CHILDREN {
                self.plugin_child(plugin.options.get(role))?;
            }
        }
        match &options.node_name {
            Some(name) => self.add_node(name),
            None => Ok(()),
        }
    }

    /// A child of a plugin's driver: the name of a node, a definition, or something that the
    /// command will refuse.
    fn plugin_child(&mut self, child: Option<&Value>) -> Result<(), Error> {
        match child {
            Some(Value::String(name)) if !name.is_empty() => self.node_exists(name),
            Some(definition @ Value::Object(_)) => {
                // Of a configuration file, or of a command line.
                let read = |mode| de::from_value::<BlockdevOptions>(definition, mode);
                let mut options = read(Mode::Typed).or_else(|_| read(Mode::Keyval))?;
                self.node(&mut options)
            }
            _ => Ok(()),
        }
    }

    fn node_exists(&self, name: &str) -> Result<(), Error> {
        match self.nodes.contains(name) {
            true => Ok(()),
            false => Err(Error::no_such_device_or_node(name, name)),
        }
    }

    fn add_node(&mut self, name: &str) -> Result<(), Error> {
        if !is_identifier(name) {
            return Err(Error::generic(format!("Invalid node-name: '{name}'")));
        }
        if !self.nodes.insert(name.to_owned()) {
            let message = format!("Duplicate nodes with node-name='{name}'");
            return Err(Error::generic(message));
        }
        Ok(())
    }

    fn object(&mut self, options: &ObjectOptions) -> Result<(), Error> {
        let id = &options.id;
        if !is_identifier(id) {
            return Err(Error::not_an_identifier("id"));
        }
        match &options.branch {
            ObjectBranch::Iothread(_) => drop(self.iothreads.insert(id.clone())),
            ObjectBranch::MonitorQmp(monitor) if !self.chardevs.contains(&monitor.chardev) => {
                return Err(no_such_chardev(&monitor.chardev));
            }
            _ => {}
        }
        match self.objects.insert(id.clone()) {
            true => Ok(()),
            false => Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            ))),
        }
    }

    fn export(&mut self, options: &BlockExportOptions, members: &Value) -> Result<(), Error> {
        let id = &options.id;
        if !is_identifier(id) {
            return Err(Error::generic("Invalid block export id"));
        }
        if self.exports.contains(id) {
            return Err(Error::generic(format!(
                "Block export id '{id}' is already in use"
            )));
        }
        if !self.nodes.contains(&options.node_name) {
            return Err(Error::no_such_device_or_node("", &options.node_name));
        }
        let threads = match &members["iothread"] {
            Value::String(one) => vec![one.as_str()],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        };
        if let Some(missing) = threads.iter().find(|it| !self.iothreads.contains(**it)) {
            return Err(Error::generic(format!("iothread \"{missing}\" not found")));
        }
        if options.export_type() == BlockExportType::Nbd && self.servers.is_empty() {
            return Err(Error::generic("NBD server not running"));
        }
        self.exports.insert(id.clone());
        Ok(())
    }
}

fn no_such_chardev(id: &str) -> Error {
    Error::generic(format!("chardev \"{id}\" not found"))
}
