//! What each option of the command line does.

use std::rc::Rc;

use outport_export::nbd::Listener;
use outport_qmp::Error;
use outport_qmp::de;
use outport_qmp::keyval;
use outport_qmp::qemu_opts::QemuOpts;
use outport_qmp::types::block_core::BlockdevOptions;
use outport_qmp::types::block_export::{BlockExportOptions, NbdServerOptions};
use outport_qmp::types::qom::ObjectOptions;
use tokio::sync::mpsc;

use crate::args::{Action, Setting, complaint};
use crate::chardev::{self, Backend, Client, Source};
use crate::commands::block_export;
use crate::daemon::Daemon;
use crate::monitor::{Job, Monitor};
use crate::{addresses, blockdev, objects};

/// Object types, for `--object help`.
const OBJECTS: &str = "List of user creatable objects:\n  iothread\n  wasm-plugin\n";

/// Properties, for `--object TYPE,help`.
const IOTHREAD: &str = "iothread options:
  aio-max-batch=<int>
  poll-grow=<int>
  poll-max-ns=<int>
  poll-shrink=<int>
  poll-weight=<int>
  thread-pool-max=<int>
  thread-pool-min=<int>
";
const WASM_PLUGIN: &str = "wasm-plugin options:
  allow-unpinned=<bool>
  call-time-max-ms=<int>
  filename=<string>
  memory-max=<size>
  sha256=<string>
";

/// Chardev backends, for `--chardev help`.
const CHARDEVS: &str = "Available chardev backend types: \n  stdio\n  socket\n";

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
    jobs: mpsc::UnboundedSender<Job>,
    /// Answered only when all options were carried out.
    monitors: Vec<(Monitor, Source)>,
}

impl Settings {
    pub(super) fn new(
        daemon: Rc<Daemon>,
        daemonize: bool,
        jobs: mpsc::UnboundedSender<Job>,
    ) -> Self {
        Self {
            daemon,
            daemonize,
            jobs,
            monitors: Vec::new(),
        }
    }

    /// From now on monitors are answered.
    pub(super) fn start_monitors(self) {
        for (monitor, source) in self.monitors {
            tokio::task::spawn_local(monitor.run(source));
        }
    }

    /// Carries one option out; an error is the sentence without its place.
    pub(super) async fn apply(&mut self, setting: &Setting) -> Result<Applied, String> {
        let value = setting.value.as_str();
        let asks = value == "help" || value == "?";
        match setting.action {
            Action::Blockdev | Action::Export | Action::NbdServer if asks => {
                return Err("Help is not available for this option".into());
            }
            Action::Object if asks => return Ok(Applied::Print(OBJECTS.into())),
            Action::Chardev if asks => return Ok(Applied::Print(CHARDEVS.into())),
            Action::Trace if asks => return Ok(Applied::Print(String::new())),
            Action::Blockdev => self.blockdev(value).await.map_err(sentence)?,
            Action::Export => self.export(value).map_err(sentence)?,
            Action::NbdServer => self.nbd_server(value).map_err(sentence)?,
            Action::Object => return self.object(value).await.map_err(sentence),
            Action::Chardev => self.chardev(setting).await?,
            Action::Monitor => self.monitor(value).map_err(sentence)?,
            Action::AllowPaths => self.daemon.policy.borrow_mut().allow(value)?,
            Action::Trace => {}
            Action::Positional => return Err("Unexpected argument".into()),
        }
        Ok(Applied::Done)
    }

    async fn blockdev(&self, text: &str) -> Result<(), Error> {
        let (value, mode) = keyval::parse(text, Some("driver"))?;
        let options: BlockdevOptions = de::from_value(&value, mode)?;
        blockdev::add(&self.daemon, options, mode).await
    }

    fn export(&self, text: &str) -> Result<(), Error> {
        let options: BlockExportOptions = keyval::read(text, Some("type"))?;
        block_export::add(&self.daemon, options).map(drop)
    }

    fn nbd_server(&self, text: &str) -> Result<(), Error> {
        let options: NbdServerOptions = keyval::read(text, None)?;
        self.daemon.nbd.start(&self.daemon, options)
    }

    async fn object(&self, text: &str) -> Result<Applied, Error> {
        match text
            .strip_suffix(",help")
            .or_else(|| text.strip_suffix(",?"))
        {
            Some("iothread" | "qom-type=iothread") => return Ok(Applied::Print(IOTHREAD.into())),
            Some("wasm-plugin" | "qom-type=wasm-plugin") => {
                return Ok(Applied::Print(WASM_PLUGIN.into()));
            }
            _ => {}
        }
        let options: ObjectOptions = keyval::read(text, Some("qom-type"))?;
        objects::add(&self.daemon, options).await?;
        Ok(Applied::Done)
    }

    async fn chardev(&self, setting: &Setting) -> Result<(), String> {
        let parsed = chardev::parse(&setting.value).map_err(sentence)?;
        for warning in &parsed.warnings {
            eprintln!(
                "{}",
                complaint(Some(&setting.typed), &format!("warning: {warning}"))
            );
        }
        self.daemon.chardevs.borrow().check_id(&parsed.id)?;
        let source = match parsed.backend {
            Backend::Stdio if self.daemonize => {
                return Err("cannot use stdio with -daemonize".into());
            }
            Backend::Stdio => {
                self.daemon.chardevs.borrow_mut().take_stdio()?;
                Source::Once(Some(Client::stdio()))
            }
            Backend::Client(endpoint) => Source::Once(Some(chardev::connect(&endpoint).await?)),
            Backend::Connected(number) => {
                let fd = self.daemon.take_socket(&number)?;
                Source::Once(Some(chardev::adopt(fd)?))
            }
            Backend::Server { address, wait } => {
                let shown = shown(&address);
                let address = addresses::listen_on(address, &self.daemon)?;
                let listener = Listener::bind(address)?;
                let mut source = Source::Listener {
                    listener,
                    first: None,
                };
                if wait {
                    let message = format!(
                        "info: QEMU waiting for connection on: disconnected:{shown},server=on"
                    );
                    eprintln!("{}", complaint(Some(&setting.typed), &message));
                    source
                        .await_first()
                        .await
                        .map_err(|error| error.to_string())?;
                }
                source
            }
        };
        self.daemon.chardevs.borrow_mut().add(parsed.id, source);
        Ok(())
    }

    fn monitor(&mut self, text: &str) -> Result<(), Error> {
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
        let source = self
            .daemon
            .chardevs
            .borrow_mut()
            .take(&name)
            .map_err(Error::generic)?;
        if mode.as_deref() == Some("readline") {
            return Err(Error::generic("Only QMP is supported"));
        }
        let monitor = Monitor {
            name,
            pretty,
            events: self.daemon.events.clone(),
            jobs: self.jobs.clone(),
        };
        self.monitors.push((monitor, source));
        Ok(())
    }
}

fn sentence(error: Error) -> String {
    error.desc
}

/// An address as QEMU prints it for a character device.
fn shown(address: &outport_qmp::types::sockets::SocketAddress) -> String {
    use outport_qmp::types::sockets::SocketAddressBranch as Branch;
    match &address.branch {
        Branch::Unix(unix) => format!("unix:{}", unix.path),
        Branch::Inet(inet) => format!("tcp:{}:{}", inet.host, inet.port),
        Branch::Fd(fd) => format!("fd:{}", fd.str),
        Branch::Vsock(vsock) => format!("vsock:{}:{}", vsock.cid, vsock.port),
    }
}
