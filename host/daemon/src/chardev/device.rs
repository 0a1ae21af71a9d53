//! The devices: made, used, told and removed.
//!
//! Invariant: a device that a monitor uses is not removed. Removing one closes its listener, and
//! its socket file goes.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::rc::Rc;

use outport_export::nbd::Listener;
use outport_qmp::Error;
use outport_qmp::types::char::ChardevInfo;
use outport_qmp::types::sockets::SocketAddressBranch;
use tokio::sync::Mutex;

use super::{Backend, Client, Source, adopt, connect};
use crate::addresses;
use crate::daemon::Daemon;

/// One device.
pub(crate) struct Device {
    id: String,
    backend: Backend,
    /// What it is connected to, as QEMU prints it.
    filename: String,
    /// Held by the monitor that waits for a client.
    source: Mutex<Source>,
    connected: Cell<bool>,
    used: Cell<bool>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chardev {} ({})", self.id, self.filename)
    }
}

impl Device {
    /// Id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What it was made from.
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Whether a client is there now.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.get()
    }

    /// The next client; `None` if there will be no more.
    pub(crate) async fn next(&self) -> io::Result<Option<Client>> {
        self.source.lock().await.next().await
    }

    /// A client came or left.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.set(connected);
    }

    /// Lets a monitor have the device.
    ///
    /// # Errors
    /// Another one has it.
    pub(crate) fn attach(device: &Rc<Self>) -> Result<Frontend, Error> {
        if device.used.replace(true) {
            return Err(Error::generic(format!(
                "chardev '{}' is already in use",
                device.id
            )));
        }
        Ok(Frontend(device.clone()))
    }

    /// An element of `query-chardev`.
    fn info(&self) -> ChardevInfo {
        let is_server = matches!(self.backend, Backend::Server { .. });
        let state = match is_server && !self.connected.get() {
            true => "disconnected:",
            false => "",
        };
        ChardevInfo {
            label: self.id.clone(),
            filename: format!("{state}{}", self.filename),
            frontend_open: self.used.get(),
        }
    }
}

/// A monitor's use of a device; ends on drop.
#[derive(Debug)]
pub(crate) struct Frontend(Rc<Device>);

impl Drop for Frontend {
    fn drop(&mut self) {
        self.0.used.set(false);
        self.0.connected.set(false);
    }
}

/// All character devices, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Chardevs {
    devices: Vec<Rc<Device>>,
    /// Ids of devices that are being made.
    coming: Vec<String>,
}

impl Chardevs {
    /// Whether an id is taken.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.devices.iter().any(|device| device.id == id)
            || self.coming.iter().any(|coming| coming == id)
    }

    /// The device that a monitor names.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn find(&self, id: &str) -> Result<Rc<Device>, Error> {
        let device = self.devices.iter().find(|device| device.id == id);
        let device = device.cloned();
        device.ok_or_else(|| Error::generic(format!("chardev \"{id}\" not found")))
    }

    /// All devices.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Rc<Device>> {
        self.devices.iter()
    }

    /// `chardev-remove`.
    ///
    /// # Errors
    /// There is none, or a monitor uses it.
    pub(crate) fn remove(&mut self, id: &str) -> Result<(), Error> {
        let at = self.devices.iter().position(|device| device.id == id);
        let at = at.ok_or_else(|| Error::generic(format!("Chardev '{id}' not found")))?;
        if self.devices[at].used.get() {
            return Err(Error::generic(format!("Chardev '{id}' is busy")));
        }
        self.devices.remove(at);
        Ok(())
    }

    /// `query-chardev`.
    pub(crate) fn query(&self) -> Vec<ChardevInfo> {
        self.devices.iter().map(|device| device.info()).collect()
    }

    /// Standard input and output can belong to one device only.
    fn check_stdio(&self) -> Result<(), String> {
        let mut backends = self.devices.iter().map(|device| &device.backend);
        match backends.any(|backend| matches!(backend, Backend::Stdio)) {
            true => Err("cannot use stdio by multiple character devices".into()),
            false => Ok(()),
        }
    }
}

/// Makes a device whose id was checked; `announce` is told what is waited for.
///
/// # Errors
/// QEMU's sentences.
pub(crate) async fn open(
    daemon: &Daemon,
    id: String,
    backend: Backend,
    announce: impl FnOnce(String),
) -> Result<(), String> {
    daemon.chardevs.borrow_mut().coming.push(id.clone());
    let made = source(daemon, &backend, announce).await;
    let mut chardevs = daemon.chardevs.borrow_mut();
    chardevs.coming.retain(|coming| *coming != id);
    let (source, filename) = made?;
    chardevs.devices.push(Rc::new(Device {
        id,
        backend,
        filename,
        source: Mutex::new(source),
        connected: Cell::new(false),
        used: Cell::new(false),
    }));
    Ok(())
}

async fn source(
    daemon: &Daemon,
    backend: &Backend,
    announce: impl FnOnce(String),
) -> Result<(Source, String), String> {
    Ok(match backend {
        Backend::Null => (Source::Never, "null".into()),
        Backend::Stdio => {
            daemon.chardevs.borrow().check_stdio()?;
            (Source::Once(Some(Client::stdio())), "stdio".into())
        }
        Backend::Client(endpoint) => {
            let client = connect(endpoint).await?;
            let kind = match endpoint {
                super::Endpoint::Unix { .. } => "unix",
                super::Endpoint::Inet { .. } => "tcp",
            };
            (Source::Once(Some(client)), format!("{kind}:{endpoint}"))
        }
        Backend::Connected(number) => {
            let fd = daemon.take_socket(number)?;
            (Source::Once(Some(adopt(fd)?)), format!("fd:{number}"))
        }
        Backend::Server { address, wait } => {
            let listen_on = addresses::listen_on(address.clone(), daemon)?;
            let listener = Listener::bind(listen_on).await?;
            let port = listener.port();
            let shown = match &address.branch {
                SocketAddressBranch::Unix(unix) => format!("unix:{}", unix.path),
                SocketAddressBranch::Inet(inet) => {
                    let port = port.map_or(inet.port.clone(), |port| port.to_string());
                    format!("tcp:{}:{port}", inet.host)
                }
                SocketAddressBranch::Fd(fd) => format!("fd:{}", fd.str),
                SocketAddressBranch::Vsock(vsock) => {
                    format!("vsock:{}:{}", vsock.cid, vsock.port)
                }
            };
            let filename = format!("{shown},server=on");
            let mut source = Source::Listener {
                listener,
                first: None,
            };
            if *wait {
                announce(format!(
                    "info: QEMU waiting for connection on: disconnected:{filename}"
                ));
                let first = source.await_first().await;
                first.map_err(|error| error.to_string())?;
            }
            (source, filename)
        }
    })
}
