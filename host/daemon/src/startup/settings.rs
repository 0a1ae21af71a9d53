//! What each option of the command line does.

use std::rc::Rc;

use outport_qmp::Error;
use outport_qmp::de;
use outport_qmp::keyval;
use outport_qmp::qemu_opts::QemuOpts;
use outport_qmp::types::block_core::BlockdevOptions;
use outport_qmp::types::block_export::{BlockExportOptions, NbdServerOptions};
use outport_qmp::types::qom::{MonitorQmpProperties, ObjectBranch, ObjectOptions};

use super::{config_file, drivers};
use crate::args::{Action, Args, Setting};
use crate::blockdev;
use crate::chardev::{self, Backend};
use crate::commands::{Control, block_export};
use crate::daemon::Daemon;
use crate::objects::{self, Property};

/// Chardev backends, for `--chardev help`.
const CHARDEVS: &str = "Available chardev backend types: \n  null\n  socket\n  stdio\n";

/// How an option ended.
pub(super) enum Applied {
    Done,
    /// It was a question: print the answer and exit.
    Print(String),
}

/// Carries options out, one after another.
pub(super) struct Settings {
    daemon: Rc<Daemon>,
    daemonize: bool,
    end_with_stdin: bool,
    /// Monitors made so far.
    monitors: usize,
}

impl Settings {
    pub(super) fn new(daemon: Rc<Daemon>, args: &Args) -> Self {
        Self {
            daemon,
            daemonize: args.daemonize,
            end_with_stdin: args.end_with_stdin,
            monitors: 0,
        }
    }

    /// Carries one option out; an error is the sentence without its place.
    pub(super) async fn apply(&mut self, setting: &Setting) -> Result<Applied, String> {
        let value = setting.value.as_str();
        let asks = value == "help" || value == "?";
        match setting.action {
            Action::Export | Action::NbdServer if asks => {
                return Err("Help is not available for this option".into());
            }
            Action::Object if asks => return Ok(Applied::Print(object_types())),
            Action::Chardev if asks => return Ok(Applied::Print(CHARDEVS.into())),
            Action::Trace if asks => return Ok(Applied::Print(String::new())),
            Action::Blockdev => {
                if let Some(driver) = drivers::asked(value) {
                    return self.drivers(driver).map(Applied::Print);
                }
                let added = self.blockdev(value).await.map_err(sentence);
                added.map_err(|message| self.with_drivers(message))?;
            }
            Action::Export => self.export(value).await.map_err(sentence)?,
            Action::NbdServer => self.nbd_server(value).await.map_err(sentence)?,
            Action::Object => return self.object(value).await.map_err(sentence),
            Action::Chardev => self.chardev(setting).await?,
            Action::Monitor => self.monitor(value).await.map_err(sentence)?,
            Action::AllowPaths => self.daemon.policy.borrow_mut().allow(value)?,
            Action::Config => self.config(value).await?,
            Action::Trace => {}
            Action::Positional => return Err("Unexpected argument".into()),
        }
        Ok(Applied::Done)
    }

    /// Nothing of a file is carried out that has a mistake in its form.
    async fn config(&self, path: &str) -> Result<(), String> {
        let control = Control::new(self.daemon.clone());
        for (at, command) in config_file::read(path)?.into_iter().enumerate() {
            self.daemon.goes_on()?;
            let name = command.name();
            let done = command.run(&control).await;
            done.map_err(|error| config_file::complaint(at, name, &error))?;
        }
        Ok(())
    }

    /// The options of a driver, or which drivers there are.
    fn drivers(&self, driver: &str) -> Result<String, String> {
        let list = drivers::list(&self.daemon);
        if driver.is_empty() {
            return Ok(format!("{list}\nDRIVER,help tells the options of one.\n"));
        }
        let options = drivers::options(driver);
        options.ok_or_else(|| format!("{} '{driver}'\n{list}", drivers::UNKNOWN))
    }

    /// What was accepted stands below a sentence about a driver that nobody has. QMP clients have
    /// `query-qmp-schema` for that.
    fn with_drivers(&self, message: String) -> String {
        match message.starts_with(drivers::UNKNOWN) {
            true => format!("{message}\n{}", drivers::list(&self.daemon)),
            false => message,
        }
    }

    async fn blockdev(&self, text: &str) -> Result<(), Error> {
        let (value, mode) = keyval::parse(text, Some("driver"))?;
        let options: BlockdevOptions = de::from_value(&value, mode)?;
        blockdev::add(&self.daemon, options, mode).await
    }

    async fn export(&self, text: &str) -> Result<(), Error> {
        let options: BlockExportOptions = keyval::read(text, Some("type"))?;
        block_export::add(&self.daemon, options).await.map(drop)
    }

    async fn nbd_server(&self, text: &str) -> Result<(), Error> {
        let options: NbdServerOptions = keyval::read(text, None)?;
        self.daemon.nbd.start(&self.daemon, options).await
    }

    async fn object(&self, text: &str) -> Result<Applied, Error> {
        if let Some(help) = object_help(text) {
            return Ok(Applied::Print(help));
        }
        let options: ObjectOptions = keyval::read(text, Some("qom-type"))?;
        objects::add(&self.daemon, options).await?;
        Ok(Applied::Done)
    }

    async fn chardev(&self, setting: &Setting) -> Result<(), String> {
        let parsed = chardev::parse(&setting.value).map_err(sentence)?;
        for warning in &parsed.warnings {
            let warning = format!("warning: {warning}");
            super::say(&setting.complaint(&warning));
        }
        if self.daemon.chardevs.borrow().has(&parsed.id) {
            return Err(format!("Duplicate ID '{}' for chardev", parsed.id));
        }
        if self.end_with_stdin && matches!(parsed.backend, Backend::Stdio) {
            return Err("cannot use stdio with --end-with-stdin".into());
        }
        if self.daemonize && matches!(parsed.backend, Backend::Stdio) {
            return Err("cannot use stdio with -daemonize".into());
        }
        let announce = |message: String| super::say(&setting.complaint(&message));
        chardev::open(&self.daemon, parsed.id, parsed.backend, announce).await
    }

    async fn monitor(&mut self, text: &str) -> Result<(), Error> {
        let mut opts = QemuOpts::parse(text, Some("chardev"))?;
        let chardev = opts.take("chardev");
        let pretty = opts.take_bool("pretty")?.unwrap_or(false);
        let mode = opts.take("mode");
        let _only_a_name = opts.take("id");
        opts.finish()?;
        let name = chardev.ok_or_else(|| Error::missing("chardev"))?;
        match mode.as_deref() {
            None | Some("control" | "readline") => {}
            Some(other) => return Err(Error::bad_enum("mode", other)),
        }
        let device = self.daemon.chardevs.borrow().find(&name)?;
        if mode.as_deref() == Some("readline") {
            return Err(Error::generic("Only QMP is supported"));
        }
        let properties = MonitorQmpProperties {
            chardev: device.id().to_owned(),
            pretty: Some(pretty),
            close_action: None,
        };
        let options = ObjectOptions {
            id: format!("compat_monitor{}", self.monitors),
            branch: ObjectBranch::MonitorQmp(properties),
        };
        objects::add(&self.daemon, options).await?;
        self.monitors += 1;
        Ok(())
    }
}

/// Object types, for `--object help`.
fn object_types() -> String {
    let types = Property::types().map(|name| format!("  {name}\n"));
    format!(
        "List of user creatable objects:\n{}",
        types.collect::<String>()
    )
}

/// Properties, for `--object TYPE,help`.
fn object_help(text: &str) -> Option<String> {
    let name = text
        .strip_suffix(",help")
        .or_else(|| text.strip_suffix(",?"))?;
    let name = name.strip_prefix("qom-type=").unwrap_or(name);
    let properties = Property::of_type(name)?.iter();
    let lines = properties.map(|it| format!("  {}=<{}>\n", it.name, it.r#type));
    Some(format!("{name} options:\n{}", lines.collect::<String>()))
}

fn sentence(error: Error) -> String {
    error.desc
}
