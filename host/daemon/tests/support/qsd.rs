//! The installed qemu-storage-daemon, as an oracle.

use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{Daemon, QSD, Qmp, eventually, has};

/// A running QSD; killed with the test.
pub(crate) struct Qsd {
    child: Child,
    folder: TempDir,
}

impl Qsd {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let chardev = format!("socket,id=m,path={path}/qmp,server=on,wait=off");
        let child = Command::new(QSD)
            .args(["--chardev", &chardev, "--monitor", "m"])
            .args(["--pidfile", &format!("{path}/pid")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Who connects before its monitor is up may not be greeted, or twice.
        eventually("QSD is up", || folder.path().join("pid").exists());
        Self { child, folder }
    }

    #[track_caller]
    pub(crate) fn qmp(&self) -> Qmp {
        Qmp::negotiated(&self.folder.path().join("qmp"))
    }

    pub(crate) fn folder(&self) -> String {
        self.folder.path().to_str().unwrap().to_owned()
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Sends the same to both and compares errors and successes.
#[track_caller]
pub(crate) fn same(requests: &[(&str, Value)]) {
    if !has(QSD) {
        return;
    }
    let theirs: Vec<_> = {
        let qsd = Qsd::start();
        let mut qmp = qsd.qmp();
        let answers = requests.iter();
        answers
            .map(|(command, arguments)| qmp.execute(command, arguments.clone()))
            .collect()
    };
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    for ((command, arguments), theirs) in requests.iter().zip(theirs) {
        let ours = qmp.execute(command, arguments.clone());
        assert_eq!(
            ours.get("error"),
            theirs.get("error"),
            "{command} {arguments}"
        );
    }
}
