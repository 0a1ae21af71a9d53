//! The image under test, opened as the daemon opens it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use outport_block::file::{FileOptions, HostFile};
use outport_block::format::{Child, FormatFactory};
use outport_block::image::{ChildSource, Image, ImageEvent};
use outport_block::node::Kind;
use outport_block::trace::Trace;
use outport_block::{Buf, Errno, Error, Node};
use outport_tests::{qemu_img, try_run};
use tempfile::TempDir;

use crate::history::{SECTOR, backing_stamp, content};

/// What is made, and what happens to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    /// Of `qemu-img create -o`.
    pub(crate) options: &'static str,
    pub(crate) cluster: u64,
    pub(crate) clusters: u64,
    /// Has a backing file, two thirds as long.
    pub(crate) backing: bool,
    /// Has an internal snapshot that shares all clusters with it.
    pub(crate) snapshot: bool,
    /// Its length changes.
    pub(crate) resizes: bool,
    /// Written to by a QEMU that was killed: its first half, with reference counts that lag.
    pub(crate) killed: bool,
    /// Has a persistent bitmap of sectors, and gets and loses others.
    pub(crate) bitmaps: bool,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            options: "",
            cluster: 512,
            clusters: 40,
            backing: false,
            snapshot: false,
            resizes: false,
            killed: false,
            bitmaps: false,
        }
    }
}

impl Case {
    pub(crate) const fn size(&self) -> u64 {
        self.cluster * self.clusters
    }

    /// As long as it ever gets.
    pub(crate) const fn size_max(&self) -> u64 {
        if self.resizes {
            2 * self.size()
        } else {
            self.size()
        }
    }

    /// Sectors at its front that qemu-io has filled with 0xa5.
    pub(crate) const fn filled_sectors(&self) -> u64 {
        match (self.snapshot, self.killed) {
            (true, _) => self.size() / SECTOR,
            (false, true) => self.size() / SECTOR / 2,
            (false, false) => 0,
        }
    }

    /// Sectors of the backing file.
    pub(crate) const fn backing_sectors(&self) -> u64 {
        if self.backing {
            self.size() / SECTOR * 2 / 3
        } else {
            0
        }
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The bitmap that an image is made with.
pub(crate) const BITMAP: &str = "made";

/// An image in a folder of its own.
pub(crate) struct Disk {
    pub(crate) case: Case,
    folder: TempDir,
    backing: Option<Arc<Node>>,
    /// Damage that the plugin reported.
    pub(crate) damage: Arc<Mutex<Vec<String>>>,
    node: Option<Arc<Node>>,
}

impl Disk {
    pub(crate) fn create(case: Case) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (image, below) = (at("image.qcow2"), at("below.raw"));
        let mut backing = None;
        let size = case.size().to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", case.options];
        if case.backing {
            let stamps = (0..case.backing_sectors()).map(backing_stamp);
            std::fs::write(&below, content(stamps)).unwrap();
            args.extend(["-F", "raw", "-b", &below]);
            backing = Some(file_node(Path::new(&below), true, None));
        }
        args.extend([image.as_str(), &size]);
        qemu_img(&args);
        if case.filled_sectors() > 0 {
            let write = format!("write -P 0xa5 0 {}", case.filled_sectors() * SECTOR);
            let mut args = vec!["-f", "qcow2", "-c", &write, "-c", "flush"];
            if case.killed {
                args.extend(["-c", "abort"]);
            }
            args.push(&image);
            try_run("qemu-io", &args);
        }
        if case.snapshot {
            qemu_img(&["snapshot", "-c", "one", &image]);
        }
        if case.bitmaps {
            qemu_img(&["bitmap", "--add", "-g", "512", &image, BITMAP]);
        }
        Self {
            case,
            folder,
            backing,
            damage: Arc::default(),
            node: None,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("image.qcow2")
    }

    /// A place beside it.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Open it; whatever reaches its file from now on is recorded.
    pub(crate) async fn open_traced(&mut self, factory: Arc<dyn FormatFactory>) -> Arc<Trace> {
        let trace = Arc::new(Trace::default());
        let file = file_node(&self.path(), false, Some(trace.clone()));
        self.node = Some(self.open(factory, file, true).await.unwrap());
        trace
    }

    /// The open image.
    pub(crate) fn node(&self) -> &Arc<Node> {
        self.node.as_ref().unwrap()
    }

    /// Open an image of this disk's kind.
    pub(crate) async fn open(
        &self,
        factory: Arc<dyn FormatFactory>,
        file: Arc<Node>,
        writable: bool,
    ) -> Result<Arc<Node>, Error> {
        let damage = self.damage.clone();
        let sink = Arc::new(move |event| {
            damage.lock().unwrap().push(match event {
                ImageEvent::Corrupted { message, .. } => message,
                ImageEvent::State { state, .. } => format!("{state:?}"),
            });
        });
        let mut children = Grants(self.backing.clone());
        let options = "{}".to_owned();
        let image = Image::open(
            "disk0",
            factory,
            options,
            writable,
            file,
            &mut children,
            sink,
        );
        let kind = Kind::Image(Arc::new(image.await?));
        Ok(Node::new("disk0", "qcow2", !writable, kind))
    }
}

/// A host file as a node.
pub(crate) fn file_node(path: &Path, read_only: bool, trace: Option<Arc<Trace>>) -> Arc<Node> {
    let mut options = FileOptions::new(path);
    options.read_only = read_only;
    options.unmap = true;
    let mut file = HostFile::open(options).unwrap();
    if let Some(trace) = trace {
        file = file.with_trace(trace);
    }
    Node::new("file0", "file", read_only, Kind::File(file))
}

/// All that the guest sees.
pub(crate) async fn read_all(node: &Node) -> Result<Vec<u8>, Errno> {
    let buf = Buf::zeroed(node.len_bytes() as usize);
    Ok(node.read(0, buf).await?.as_slice().to_vec())
}

/// Grants the backing node, if there is one.
struct Grants(Option<Arc<Node>>);

impl ChildSource for Grants {
    fn child(&mut self, child: &Child) -> Result<Option<Arc<Node>>, Error> {
        assert_eq!(child.id, "backing");
        Ok(self.0.clone())
    }
}
