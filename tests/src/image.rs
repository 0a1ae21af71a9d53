//! Disk images for tests: made by qemu-img, filled deterministically, gone with the test.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::Rng;
use crate::tools::qemu_img;

/// An image file in a folder of its own.
#[derive(Debug)]
pub struct TempImage {
    _folder: TempDir,
    path: PathBuf,
    format: &'static str,
}

impl TempImage {
    /// A raw image with exactly these bytes.
    pub fn raw(content: &[u8]) -> Self {
        let image = Self::empty("disk.raw", "raw");
        fs::write(&image.path, content).expect("the temp folder is writable");
        image
    }

    /// A raw image of random bytes.
    pub fn random(len: usize, seed: u64) -> Self {
        Self::raw(&Rng::new(seed).bytes(len))
    }

    /// A sparse raw image that reads as zeroes.
    pub fn zeroes(len: u64) -> Self {
        let image = Self::raw(&[]);
        let file = fs::OpenOptions::new().write(true).open(&image.path);
        file.and_then(|file| file.set_len(len))
            .expect("the temp folder is writable");
        image
    }

    /// An empty qcow2 image; `options` as after `qemu-img create -o`, or empty.
    pub fn qcow2(len: u64, options: &str) -> Self {
        let image = Self::empty("disk.qcow2", "qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let len = len.to_string();
        args.extend([image.str(), &len]);
        qemu_img(&args);
        image
    }

    /// This image's content in another format.
    pub fn converted(&self, format: &'static str, arguments: &[&str]) -> Self {
        let image = Self::empty(&format!("disk.{format}"), format);
        let mut args = vec!["convert", "-f", self.format, "-O", format];
        args.extend(arguments);
        args.extend([self.str(), image.str()]);
        qemu_img(&args);
        image
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path as text.
    pub fn str(&self) -> &str {
        self.path.to_str().expect("temp paths are UTF-8")
    }

    /// `raw` or `qcow2`.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// What the guest reads from it, by qemu-img.
    pub fn content(&self) -> Vec<u8> {
        let raw = self.converted("raw", &[]);
        fs::read(raw.path()).expect("qemu-img has just written it")
    }

    fn empty(name: &str, format: &'static str) -> Self {
        let folder = tempfile::Builder::new().prefix("outport-image-").tempdir();
        let folder = folder.expect("a temp folder can be made");
        let path = folder.path().join(name);
        Self {
            _folder: folder,
            path,
            format,
        }
    }
}

/// Bytes in which every 512-byte sector names itself and the seed: a misplaced sector shows.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0; len];
    for (sector, bytes) in content.chunks_mut(512).enumerate() {
        Rng::new(seed ^ (sector as u64) << 20).fill(bytes);
        let label = format!("sector {sector} seed {seed} ");
        let shown = label.len().min(bytes.len());
        bytes[..shown].copy_from_slice(&label.as_bytes()[..shown]);
    }
    content
}

/// SHA-256, in hex.
pub fn checksum(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// SHA-256 of a file, in hex.
pub fn checksum_file(path: &Path) -> String {
    checksum(&fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// Asserts equal content; says where the first difference is instead of printing both.
#[track_caller]
pub fn assert_same(got: &[u8], wanted: &[u8], what: &str) {
    if got == wanted {
        return;
    }
    let at = got.iter().zip(wanted).position(|(a, b)| a != b);
    let at = at.unwrap_or(got.len().min(wanted.len()));
    let wrong = got.iter().zip(wanted).filter(|(a, b)| a != b).count();
    let show = |bytes: &[u8]| format!("{:02x?}", &bytes[at..bytes.len().min(at + 16)]);
    panic!(
        "{what}: {} bytes read, {} wanted, {wrong} differ, first at {at} ({at:#x}): {} for {}",
        got.len(),
        wanted.len(),
        show(got),
        show(wanted)
    );
}
