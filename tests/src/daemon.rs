//! A daemon under test: started with QEMU's command line in a folder of its own, driven over QMP,
//! and killed with the test.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::image::TempImage;
use crate::nbd::{Address, Client, Haggle};
use crate::process::{ProcStats, proc_stats};
use crate::qmp::Qmp;
use crate::wait::eventually;

/// Which program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// outportd.
    Outport,
    /// qemu-storage-daemon: the oracle.
    Qsd,
}

impl Server {
    /// outportd, or QSD when `OUTPORT_TEST_SERVER=qsd`.
    pub fn under_test() -> Self {
        match std::env::var("OUTPORT_TEST_SERVER").as_deref() {
            Ok("qsd") => Self::Qsd,
            Ok("outport") | Err(_) => Self::Outport,
            Ok(other) => panic!("OUTPORT_TEST_SERVER={other}: say qsd or outport"),
        }
    }

    /// True for the oracle: tests use it only where QSD is known to be wrong or to lack something.
    pub fn is_qsd(self) -> bool {
        self == Self::Qsd
    }

    /// The program's file.
    pub fn program(self) -> PathBuf {
        if self.is_qsd() {
            return "qemu-storage-daemon".into();
        }
        if let Some(path) = std::env::var_os("OUTPORTD") {
            return path.into();
        }
        // target/PROFILE/deps/test-HASH
        let test = std::env::current_exe().expect("a test knows where it is");
        let target = test
            .ancestors()
            .nth(3)
            .expect("a test lies in target/PROFILE/deps");
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let found = [target, &workspace].map(|folder| folder.join("release/outportd"));
        found
            .into_iter()
            .find(|path| path.is_file())
            .unwrap_or_else(|| {
                panic!(
                    "outportd is not built: run cargo build --release -p outport-daemon, \
                 or set OUTPORTD, or OUTPORT_TEST_SERVER=qsd"
                )
            })
    }
}

/// A command line in the making.
#[derive(Debug)]
pub struct Builder {
    server: Server,
    args: Vec<OsString>,
    inherited: Vec<OwnedFd>,
    folder: TempDir,
    nbd: Option<Address>,
}

impl Builder {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds an option and its value.
    #[must_use]
    pub fn option(self, option: &str, value: impl Into<OsString>) -> Self {
        self.arg(option).arg(value)
    }

    /// A path in the daemon's folder, which is not made.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Listens on a unix socket in the daemon's folder.
    #[must_use]
    pub fn nbd(self) -> Self {
        self.nbd_with("")
    }

    /// Listens on a unix socket, with further options of `--nbd-server`.
    #[must_use]
    pub fn nbd_with(self, options: &str) -> Self {
        let path = self.path("nbd.sock");
        self.nbd_at(Address::Unix(path), options)
    }

    /// Listens at an address, with further options of `--nbd-server`.
    #[must_use]
    pub fn nbd_at(mut self, address: Address, options: &str) -> Self {
        let mut value = match &address {
            Address::Unix(path) => format!("addr.type=unix,addr.path={}", path.display()),
            Address::Abstract(name) => format!("addr.type=unix,addr.path={name},addr.abstract=on"),
            Address::Tcp(at) => {
                format!(
                    "addr.type=inet,addr.host={},addr.port={}",
                    at.ip(),
                    at.port()
                )
            }
        };
        if !options.is_empty() {
            value = format!("{value},{options}");
        }
        self.nbd = Some(address);
        self.option("--nbd-server", value)
    }

    /// Serves NBD on a socket that the test made: the daemon inherits it under its number.
    #[must_use]
    pub fn nbd_on_fd(mut self, socket: impl Into<OwnedFd>, address: Address) -> Self {
        let socket = socket.into();
        rustix::io::fcntl_setfd(socket.as_fd(), rustix::io::FdFlags::empty())
            .expect("an open descriptor takes flags");
        let value = format!("addr.type=fd,addr.str={}", socket.as_raw_fd());
        self.inherited.push(socket);
        self.nbd = Some(address);
        self.option("--nbd-server", value)
    }

    /// Starts it and negotiates QMP; everything on the command line is then in effect.
    #[track_caller]
    pub fn start(self) -> Daemon {
        let (socket, errors) = (self.path("qmp.sock"), self.path("stderr"));
        let stderr = File::create(&errors).expect("the temp folder is writable");
        let mut command = Command::new(self.server.program());
        command
            .arg("--chardev")
            .arg(format!(
                "socket,id=qmp,path={},server=on,wait=off",
                socket.display()
            ))
            .args(["--monitor", "chardev=qmp"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut child = Reaped(child);
        let qmp = eventually("the daemon greets on its QMP socket", || {
            if let Ok(Some(status)) = child.0.try_wait() {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                panic!("{command:?} ended at once, {status}: {said}");
            }
            Qmp::connect(&socket).ok()
        });
        let Self {
            server,
            folder,
            nbd,
            ..
        } = self;
        Daemon {
            server,
            qmp,
            child,
            folder,
            nbd,
        }
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    /// Which program it is.
    pub server: Server,
    /// Its monitor.
    pub qmp: Qmp,
    child: Reaped,
    folder: TempDir,
    nbd: Option<Address>,
}

impl Daemon {
    /// Begins a command line.
    pub fn builder(server: Server) -> Builder {
        let folder = tempfile::Builder::new().prefix("outport-").tempdir();
        let folder = folder.expect("a temp folder can be made");
        Builder {
            server,
            args: Vec::new(),
            inherited: Vec::new(),
            folder,
            nbd: None,
        }
    }

    /// The server under test with an NBD listener on a unix socket.
    #[track_caller]
    pub fn start() -> Self {
        Self::builder(Server::under_test()).nbd().start()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// What the process costs now.
    pub fn stats(&self) -> ProcStats {
        proc_stats(self.pid())
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where it serves NBD.
    #[track_caller]
    pub fn nbd(&self) -> &Address {
        self.nbd
            .as_ref()
            .expect("the builder was told to listen for NBD")
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        self.nbd().uri(export)
    }

    /// Another monitor connection is not possible on one chardev; this is the QMP socket's path.
    pub fn qmp_path(&self) -> PathBuf {
        self.path("qmp.sock")
    }

    /// Adds a node for the image, `file` below a format driver unless raw; discards are passed on.
    #[track_caller]
    pub fn add_node(&mut self, node: &str, image: &TempImage) {
        let file = json!({"driver": "file", "filename": image.str(), "discard": "unmap"});
        self.qmp.ok(
            "blockdev-add",
            json!({"driver": image.format(), "node-name": node, "file": file, "discard": "unmap"}),
        );
    }

    /// Exports a node over NBD under the same name.
    #[track_caller]
    pub fn add_export(&mut self, node: &str, writable: bool) {
        self.add_export_with(node, json!({"writable": writable}));
    }

    /// Exports a node over NBD under the same name, with further members.
    #[track_caller]
    pub fn add_export_with(&mut self, node: &str, members: Value) {
        let mut export = json!({"type": "nbd", "id": node, "node-name": node, "name": node});
        let more = members.as_object().expect("members are a JSON object");
        export
            .as_object_mut()
            .expect("it is one")
            .extend(more.clone());
        self.qmp.ok("block-export-add", export);
    }

    /// Serves an image, writable, as export `name`.
    #[track_caller]
    pub fn serve(&mut self, name: &str, image: &TempImage) {
        self.add_node(name, image);
        self.add_export(name, true);
    }

    /// A client in transmission, with structured replies.
    #[track_caller]
    pub fn client(&self, export: &str) -> Client {
        let mut haggle = self.haggle();
        haggle
            .structured_replies()
            .expect("structured replies are offered");
        haggle
            .go(export)
            .unwrap_or_else(|error| panic!("export {export}: {error}"))
    }

    /// A client in transmission, with simple replies.
    #[track_caller]
    pub fn simple_client(&self, export: &str) -> Client {
        self.haggle()
            .go(export)
            .unwrap_or_else(|error| panic!("export {export}: {error}"))
    }

    /// A client in option haggling.
    #[track_caller]
    pub fn haggle(&self) -> Haggle {
        Haggle::connect(self.nbd()).unwrap_or_else(|error| panic!("{}: {error}", self.nbd()))
    }

    /// Quits over QMP, waits for the end, and asserts that it was a clean one.
    #[track_caller]
    pub fn stop(mut self) {
        self.qmp.ok("quit", json!({}));
        let status = self.wait();
        assert!(
            status.success(),
            "the daemon ended with {status}: {}",
            self.stderr()
        );
    }

    /// Waits for the process to end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the daemon ends", || self.child.0.try_wait().ok().flatten())
    }

    /// True while the process runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.0.try_wait(), Ok(None))
    }

    /// What it said on standard error so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- stderr of the daemon ---\n{}---", self.stderr());
        }
    }
}

/// A child process that does not outlive the test, also when starting it fails half-way.
#[derive(Debug)]
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Killing fails only for a process that has ended; one that was waited for stays so.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
