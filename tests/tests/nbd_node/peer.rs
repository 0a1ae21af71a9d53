//! Servers of other people, one process each, gone with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use outport_tests::{Daemon, Server, TempImage, eventually};
use serde_json::{Value, json};
use tempfile::TempDir;

enum Process {
    Child(Child),
    Daemon(Box<Daemon>),
}

/// A server and its one export.
pub(crate) struct Peer {
    pub(crate) what: String,
    pub(crate) export: &'static str,
    pub(crate) socket: PathBuf,
    process: Process,
    command: Option<Command>,
    _folder: TempDir,
}

fn folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("outport-peer-")
        .tempdir()
        .unwrap()
}

impl Peer {
    /// qemu-nbd with the file's bytes as export `x`.
    pub(crate) fn qemu_nbd(path: &Path, options: &[&str]) -> Self {
        let folder = folder();
        let socket = folder.path().join("s");
        let mut command = Command::new("qemu-nbd");
        command
            .args(["-t", "-e", "8", "-f", "raw", "-x", "x", "-k"])
            .arg(&socket)
            .args(options)
            .arg(path);
        Self::spawn(
            format!("qemu-nbd {options:?}"),
            "x",
            command,
            socket,
            folder,
        )
    }

    /// nbdkit; any export name reaches its only export.
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        let folder = folder();
        let socket = folder.path().join("s");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(arguments);
        // Its oldstyle has the default export only.
        let what = format!("nbdkit {arguments:?}");
        Self::spawn(what, "", command, socket, folder)
    }

    /// A storage daemon with the image as export `disk`.
    pub(crate) fn qsd(server: Server, image: &TempImage) -> Self {
        let mut daemon = Daemon::builder(server).nbd().start();
        daemon.serve("disk", image);
        Self {
            what: format!("{server:?}"),
            export: "disk",
            socket: daemon.path("nbd.sock"),
            process: Process::Daemon(Box::new(daemon)),
            command: None,
            _folder: folder(),
        }
    }

    fn spawn(
        what: String,
        export: &'static str,
        mut command: Command,
        socket: PathBuf,
        folder: TempDir,
    ) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = start(&mut command, &socket);
        Self {
            what,
            export,
            socket,
            process: Process::Child(child),
            command: Some(command),
            _folder: folder,
        }
    }

    pub(crate) fn address(&self) -> Value {
        json!({"type": "unix", "path": self.socket})
    }

    pub(crate) fn uri(&self) -> String {
        let slash = if self.export.is_empty() { "" } else { "/" };
        let socket = self.socket.display();
        format!("nbd+unix://{slash}{}?socket={socket}", self.export)
    }

    /// Ends the process as a crash does.
    pub(crate) fn kill(&mut self) {
        if let Process::Child(child) = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    /// It says nothing any more, and its connections stay open.
    pub(crate) fn mute(&self) {
        let Process::Child(child) = &self.process else {
            panic!("only a child can be stopped");
        };
        let stopped = Command::new("kill")
            .args(["-STOP", &child.id().to_string()])
            .status();
        assert!(stopped.unwrap().success());
    }

    /// Starts it again.
    pub(crate) fn restart(&mut self) {
        let command = self.command.as_mut().unwrap();
        self.process = Process::Child(start(command, &self.socket));
    }

    /// Whether the process has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        match &mut self.process {
            Process::Child(child) => child.try_wait().unwrap().is_some(),
            Process::Daemon(daemon) => !daemon.runs(),
        }
    }
}

fn start(command: &mut Command, socket: &Path) -> Child {
    let mut child = command.spawn().unwrap();
    eventually("the peer listens", || {
        assert_eq!(child.try_wait().unwrap(), None, "{command:?} ended");
        socket.exists().then_some(())
    });
    child
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Process::Child(child) = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
