//! Storage that fills: what an image lies on, how room goes away, and how it comes back.
//!
//! Every mount belongs to the mount namespace that `unshare --mount` made for the test, so the
//! kernel removes it with the last process there. Loop devices are detached when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use outport_tests::{Server, eventually, run, try_run};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Bytes of storage at the beginning; the disk in it is larger.
const ROOM: u64 = 16 << 20;

/// Bytes that each enlargement adds: more than a cluster and the tables for it.
const MORE: u64 = 8 << 20;

/// Bytes of storage that hold the whole disk, its tables and clusters that killed daemons leaked.
const ENOUGH: u64 = 64 << 20;

/// What is below the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A tmpfs with a size.
    Tmpfs,
    /// An ext4 on a loop device.
    Ext4,
    /// A file in a full tmpfs, served over NBD by qemu-storage-daemon.
    NbdChild,
    /// A file in a full tmpfs, exported over FUSE by another daemon of ours.
    FuseChild,
}

/// One place that fills.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) kind: Kind,
    folder: TempDir,
    room: u64,
    device: Option<String>,
    below: Option<Child>,
    ballast: u32,
}

impl Storage {
    pub(crate) fn new(kind: Kind) -> Self {
        let folder = tempfile::Builder::new().prefix("outport-full-").tempdir();
        let folder = folder.expect("a temp folder can be made");
        let mut this = Self {
            kind,
            folder,
            room: ROOM,
            device: None,
            below: None,
            ballast: 0,
        };
        fs::create_dir(this.small()).expect("the folder is ours");
        fs::write(this.path("mounted"), b"").expect("the folder is ours");
        match kind {
            Kind::Ext4 => this.mount_ext4(),
            _ => this.mount_tmpfs("mount", &[]),
        }
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn small(&self) -> PathBuf {
        self.path("small")
    }

    fn mount_tmpfs(&self, program: &str, more: &[&str]) {
        let size = format!("size={}", self.room);
        let small = self.small();
        let mut args = vec!["-t", "tmpfs", "-o", &size];
        args.extend(more);
        args.extend(["tmpfs", text(&small)]);
        run(program, &args);
    }

    fn mount_ext4(&mut self) {
        let image = self.path("ext4");
        let made = fs::File::create(&image).and_then(|file| file.set_len(ENOUGH));
        made.expect("the temp folder has room");
        run("mkfs.ext4", &["-q", "-m", "0", "-b", "4096", text(&image)]);
        let name = run("losetup", &["--find", "--show", text(&image)]);
        let name = name.trim().to_owned();
        run("mount", &["-t", "ext4", &name, text(&self.small())]);
        self.device = Some(name);
        self.press(u64::MAX, self.room);
    }

    /// The file or device that holds the image, for qemu-img.
    pub(crate) fn image(&self) -> PathBuf {
        self.small().join("image")
    }

    /// The protocol node on which outportd opens the image; starts the server below, if any.
    pub(crate) fn open(&mut self, direct: bool, aio: &str) -> Value {
        let image = self.image();
        let file = |driver: &str, path: &Path| {
            json!({"driver": driver, "filename": path, "discard": "unmap", "aio": aio,
                   "cache": {"direct": direct}})
        };
        match self.kind {
            Kind::Tmpfs | Kind::Ext4 => file("file", &image),
            Kind::NbdChild => {
                let socket = self.path("below.sock");
                let _ = fs::remove_file(&socket);
                let server = format!("addr.type=unix,addr.path={}", socket.display());
                self.serve(Server::Qsd, &["--nbd-server", &server], "type=nbd,name=x");
                eventually("the NBD server below listens", || {
                    socket.exists().then_some(())
                });
                json!({"driver": "nbd", "export": "x", "discard": "unmap",
                       "server": {"type": "unix", "path": socket}})
            }
            Kind::FuseChild => {
                let mounted = self.path("mounted");
                let export = format!(
                    "type=fuse,growable=on,allow-other=off,mountpoint={}",
                    text(&mounted)
                );
                // Over QSD 10.0.2 data of one write was found in the place of another.
                self.serve(Server::Outport, &[], &export);
                eventually("the FUSE export below is mounted", || {
                    is_mounted(&mounted).then_some(())
                });
                file("file", &mounted)
            }
        }
    }

    fn serve(&mut self, server: Server, options: &[&str], export: &str) {
        let file = format!(
            "driver=file,node-name=f,discard=unmap,filename={}",
            text(&self.image())
        );
        let export = format!("{export},id=e,node-name=f,writable=on");
        let child = Command::new(server.program())
            .args(options)
            .args(["--blockdev", &file, "--export", &export])
            .stdin(Stdio::null())
            .spawn();
        self.below = Some(child.expect("the server below starts"));
    }

    /// Ends the server below in order: everything it was sent is then in its file.
    pub(crate) fn close(&mut self) {
        let Some(mut child) = self.below.take() else {
            return;
        };
        let pid = child.id().to_string();
        run("kill", &["-TERM", &pid]);
        child.wait().expect("it is our child");
    }

    /// Takes up to `len` bytes of room away, but leaves `spare`.
    pub(crate) fn press(&mut self, len: u64, spare: u64) {
        let about = rustix::fs::statvfs(self.small()).expect("it is mounted");
        let free = about.f_bavail * about.f_frsize;
        let size = len.min(free.saturating_sub(spare)).to_string();
        self.ballast += 1;
        let path = self.small().join(format!("ballast{}", self.ballast));
        // An ext4 needs some of what is free for its own tables, and may refuse the last bytes.
        let _ = try_run("fallocate", &["-l", &size, text(&path)]);
    }

    /// Gives room back: every ballast file goes.
    fn unburden(&mut self) {
        for number in 1..=self.ballast {
            let _ = fs::remove_file(self.small().join(format!("ballast{number}")));
        }
        self.ballast = 0;
    }

    /// Brings room back: the ballast goes, and a tmpfs becomes larger (`mount -o remount,size=`).
    pub(crate) fn recover(&mut self) {
        self.unburden();
        if self.kind == Kind::Ext4 || self.room >= ENOUGH {
            return;
        }
        self.room += MORE;
        let size = format!("remount,size={}", self.room);
        run("mount", &["-o", &size, text(&self.small())]);
    }

    /// A server's export has the length that its file had: long enough for a full disk.
    pub(crate) fn lengthen(&self) {
        if self.kind == Kind::NbdChild {
            let image = fs::OpenOptions::new().write(true).open(self.image());
            let grown = image.and_then(|file| file.set_len(ENOUGH));
            grown.expect("a hole needs no room");
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Some(mut child) = self.below.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let mounted = self.path("mounted");
        if is_mounted(&mounted) {
            let _ = try_run("umount", &["-l", text(&mounted)]);
        }
        let _ = try_run("umount", &["-l", text(&self.small())]);
        if let Some(device) = &self.device {
            let _ = try_run("losetup", &["--detach", device]);
        }
    }
}

/// Whether something is mounted on exactly this path, in this mount namespace.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    places.any(|place| place == text(path))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are UTF-8")
}
