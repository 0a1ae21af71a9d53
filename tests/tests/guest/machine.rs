//! One machine: QEMU without acceleration, a disk that is ours, a console that is a file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outport_tests::{Qmp, eventually};
use tempfile::TempDir;

use crate::initramfs;

/// Longer than a machine takes on a loaded computer with two processors.
const PATIENCE: Duration = Duration::from_secs(240);

/// Sockets in its folder.
const MONITOR: &str = "qmp.sock";
const DOOR: &str = "door.sock";

/// A running machine; gone with the test.
pub(crate) struct Machine {
    qemu: Child,
    folder: TempDir,
}

impl Machine {
    /// Boots on the export behind the socket and runs the script.
    pub(crate) fn start(socket: &Path, script: &str) -> Self {
        Self::launch(socket, script, "", |_| Vec::new())
    }

    /// The same; when the export goes away it waits for the next one on the socket.
    pub(crate) fn start_faithful(socket: &Path, script: &str) -> Self {
        Self::launch(socket, script, ",reconnect-ms=100", |_| Vec::new())
    }

    /// Stands still until another machine with this script moves in, and then until it is told to
    /// go on.
    pub(crate) fn incoming(socket: &Path, script: &str) -> Self {
        Self::launch(socket, script, "", |folder| {
            let door = format!("unix:{}", folder.join(DOOR).display());
            ["-S", "-incoming", &door].map(str::to_owned).to_vec()
        })
    }

    fn launch(
        socket: &Path,
        script: &str,
        chardev: &str,
        more: impl Fn(&Path) -> Vec<String>,
    ) -> Self {
        let kernel = initramfs::kernel();
        let folder = tempfile::Builder::new().prefix("outport-guest-").tempdir();
        let folder = folder.unwrap();
        let archive = folder.path().join("initramfs");
        fs::write(&archive, initramfs::archive(&kernel, script)).unwrap();
        let console = folder.path().join("console");
        let file = |name: &str| fs::File::create(folder.path().join(name)).unwrap();
        let qemu = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "q35,memory-backend=ram",
                "-accel",
                "tcg,thread=multi",
            ])
            .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
            .args(["-m", "256M", "-cpu", "max", "-smp", "4", "-nodefaults"])
            .args(["-display", "none", "-kernel"])
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&archive)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-chardev")
            .arg(format!("socket,id=blk,path={}{chardev}", socket.display()))
            .args(["-device", "vhost-user-blk-pci,chardev=blk,num-queues=4"])
            .arg("-qmp")
            .arg(format!(
                "unix:{},server=on,wait=off",
                folder.path().join(MONITOR).display()
            ))
            .args(more(folder.path()))
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("QEMU starts");
        Self { qemu, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Its monitor; there is one connection.
    pub(crate) fn qmp(&self) -> Qmp {
        let path = self.path(MONITOR);
        eventually("QEMU greets", || Qmp::connect(&path).ok())
    }

    /// Where another machine moves in.
    pub(crate) fn door(&self) -> String {
        format!("unix:{}", self.path(DOOR).display())
    }

    /// What it said on its console, and QEMU on its standard error.
    pub(crate) fn console(&self) -> String {
        let read = |name| fs::read(self.path(name)).unwrap_or_default();
        let bytes = [read("console"), read("stderr")].concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until these words are on the console.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, words: &str) {
        let begun = Instant::now();
        while !self.console().contains(words) {
            let ended = matches!(self.qemu.try_wait(), Ok(Some(_)));
            let late = begun.elapsed() > PATIENCE;
            assert!(!ended && !late, "never said {words:?}: {}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for its end; the exit status of its script.
    #[track_caller]
    pub(crate) fn verdict(&mut self) -> i32 {
        self.wait_for(" is the verdict");
        let console = self.console();
        let said = console.split(" is the verdict").next().unwrap_or_default();
        let number = said.split_whitespace().next_back().unwrap_or_default();
        number.parse().expect("a verdict is a number")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killing fails only for a process that has ended.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
