//! A qcow2 image inside a file of something else.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use outport_block::file::{FileOptions, HostFile};
use outport_block::format::Child;
use outport_block::image::{ChildSource, Image};
use outport_block::node::Kind;
use outport_block::{Error, Node};
use outport_tests::{qemu_img, try_run};
use tempfile::TempDir;

use crate::support::bundled;

pub(crate) const MIB: u64 = 1 << 20;

/// What is around the image.
const AROUND: u8 = 0xaa;

/// A file of [`AROUND`], and the image in it.
pub(crate) struct Place {
    folder: TempDir,
    offset: u64,
    pub(crate) size: u64,
}

impl Place {
    /// `len` bytes, of which `size` from `offset` on are for an image of `guest` bytes.
    pub(crate) fn create(len: u64, offset: u64, size: u64, options: &[&str], guest: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("made.qcow2");
        let (path, guest) = (made.to_str().unwrap(), guest.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(options);
        args.extend([path, &guest]);
        qemu_img(&args);
        let place = Self {
            folder,
            offset,
            size,
        };
        std::fs::write(place.path(), vec![AROUND; len as usize]).unwrap();
        let file = std::fs::File::options().write(true).open(place.path());
        let image = std::fs::read(&made).unwrap();
        file.unwrap().write_all_at(&image, offset).unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("container")
    }

    pub(crate) fn container(&self) -> Arc<Node> {
        let file = HostFile::open(FileOptions::new(self.path())).unwrap();
        Node::new("file0", "file", false, Kind::File(file))
    }

    /// The image, through a window as long as it may be.
    pub(crate) async fn open(&self) -> Arc<Node> {
        self.open_short(self.size).await.1
    }

    /// The image, through a window of `size` bytes.
    pub(crate) async fn open_short(&self, size: u64) -> (Arc<Node>, Arc<Node>) {
        let window = Kind::raw(self.container(), self.offset, Some(size));
        let window = Node::new("window0", "raw", false, window);
        (window.clone(), open(window).await)
    }

    pub(crate) fn assert_surroundings_untouched(&self) {
        let content = std::fs::read(self.path()).unwrap();
        let end = (self.offset + self.size) as usize;
        let around = content[..self.offset as usize]
            .iter()
            .chain(&content[end..]);
        assert!(around.copied().all(|byte| byte == AROUND));
    }

    /// qemu-img finds leaks at worst.
    pub(crate) fn check(&self) {
        let (path, offset, size) = (self.path(), self.offset, self.size);
        let file = format!(
            "driver=qcow2,file.driver=raw,file.offset={offset},file.size={size},\
             file.file.driver=file,file.file.filename={}",
            path.display()
        );
        let said = try_run("qemu-img", &["check", "--image-opts", &file]);
        assert!(matches!(said.code, Some(0 | 3)), "{said:?}");
    }
}

/// The image in `file`.
pub(crate) async fn open(file: Arc<Node>) -> Arc<Node> {
    try_open(file).await.unwrap()
}

/// The image in `file`, unless that fails.
pub(crate) async fn try_open(file: Arc<Node>) -> Result<Arc<Node>, Error> {
    let (factory, options) = (bundled(), "{}".to_owned());
    let sink = Arc::new(|_| {});
    let mut children = Nothing;
    let image = Image::open("disk0", factory, options, true, file, &mut children, sink);
    let kind = Kind::Image(Arc::new(image.await?));
    Ok(Node::new("disk0", "qcow2", false, kind))
}

struct Nothing;

impl ChildSource for Nothing {
    fn child(&mut self, _: &Child) -> Result<Option<Arc<Node>>, Error> {
        Ok(None)
    }
}
