//! Image recipes: a number names an image completely, so that a failure can be cooked again.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use outport_tests::{Rng, pattern, qemu_img, try_run};
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// How many recipes there are.
pub(crate) const RECIPES: u64 = 208;

/// Which data file a layer keeps its clusters in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataFile {
    Inside,
    External,
    ExternalRaw,
}

/// One qcow2 file of a chain.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) compat: &'static str,
    pub(crate) cluster_size: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) extended_l2: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) data_file: DataFile,
    pub(crate) preallocation: &'static str,
    pub(crate) compression: Option<&'static str>,
    pub(crate) size: u64,
}

/// How the top layer's size changes after it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resize {
    No,
    Grow,
    Shrink,
}

/// A whole image: its layers, base first, and what happens to the top one.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) number: u64,
    pub(crate) layers: Vec<Layer>,
    pub(crate) resize: Resize,
    pub(crate) snapshots: u64,
}

/// An image made from a recipe.
pub(crate) struct Cooked {
    /// The top layer.
    pub(crate) path: PathBuf,
    /// Layers below it and their data files: nobody may write them.
    pub(crate) below: Vec<PathBuf>,
    /// What `blockdev-add` takes, without a node name.
    pub(crate) blockdev: Value,
}

// === impl Layer ===

impl Layer {
    /// Two recipes in 13 share a cluster size; everything else is drawn.
    fn draw(rng: &mut Rng, cluster_bits: u64, is_base: bool) -> Self {
        let old = rng.one_in(6);
        let cluster_size = 1 << cluster_bits;
        let extended_l2 = !old && cluster_size >= 16 * KIB && rng.one_in(3);
        let compression = match rng.below(6) {
            0 => Some("zlib"),
            1 if !old => Some("zstd"),
            _ => None,
        };
        let data_file = match rng.below(8) {
            0 if !old && compression.is_none() => DataFile::External,
            1 if !old && compression.is_none() && is_base => DataFile::ExternalRaw,
            _ => DataFile::Inside,
        };
        // QEMU preallocates over a backing file only with extended L2 entries.
        let may_preallocate = (is_base || extended_l2) && compression.is_none();
        let preallocation = match rng.below(6) {
            0 if may_preallocate => "metadata",
            1 if may_preallocate => "falloc",
            2 if may_preallocate => "full",
            _ => "off",
        };
        Self {
            compat: if old { "0.10" } else { "1.1" },
            cluster_size,
            refcount_bits: if old { 16 } else { 1 << rng.below(7) },
            extended_l2,
            lazy_refcounts: !old && rng.one_in(4),
            data_file,
            preallocation,
            compression,
            size: rng.between(4, 12) * 512 * KIB + rng.below(3) * 512 * rng.below(99),
        }
    }

    fn options(&self, data_file: &Path) -> String {
        let mut options = format!(
            "compat={},cluster_size={},refcount_bits={},preallocation={}",
            self.compat, self.cluster_size, self.refcount_bits, self.preallocation
        );
        if self.compat == "1.1" {
            options += ",compression_type=";
            options += self.compression.unwrap_or("zlib");
        }
        for (on, name) in [
            (self.extended_l2, "extended_l2"),
            (self.lazy_refcounts, "lazy_refcounts"),
        ] {
            options += &if on {
                format!(",{name}=on")
            } else {
                String::new()
            };
        }
        if self.data_file != DataFile::Inside {
            options += &format!(",data_file={}", data_file.display());
        }
        if self.data_file == DataFile::ExternalRaw {
            options += ",data_file_raw=on";
        }
        options
    }
}

// === impl Recipe ===

impl Recipe {
    /// The recipe of that number; always the same one.
    pub(crate) fn numbered(number: u64) -> Self {
        let mut rng = Rng::new(0x071c_0002 ^ number << 8);
        let depth = if rng.one_in(3) { rng.between(2, 3) } else { 1 };
        let layers: Vec<Layer> = (0..depth)
            .map(|level| {
                let bits = if level + 1 == depth {
                    9 + number % 13
                } else {
                    rng.between(9, 21)
                };
                Layer::draw(&mut rng, bits, level == 0)
            })
            .collect();
        let top = &layers[layers.len() - 1];
        // A snapshot doubles reference counts, and compressed clusters share host clusters.
        let countable = top.refcount_bits >= if top.compression.is_some() { 16 } else { 4 };
        let snapshots = match rng.below(4) {
            0 if countable && top.data_file == DataFile::Inside => rng.between(1, 2),
            _ => 0,
        };
        // Version 2 cannot say that new clusters over a backing file are zero.
        let growable = top.compat == "1.1" || depth == 1;
        let resize = match rng.below(4) {
            0 if snapshots == 0 && growable => Resize::Grow,
            1 if snapshots == 0 => Resize::Shrink,
            _ => Resize::No,
        };
        Self {
            number,
            layers,
            resize,
            snapshots,
        }
    }

    /// Makes the image in `folder`, with QEMU's tools only.
    pub(crate) fn cook(&self, folder: &Path) -> Cooked {
        let folder = folder.join(self.number.to_string());
        fs::create_dir(&folder).expect("the temp folder is writable");
        let mut rng = Rng::new(!self.number);
        let mut backing: Option<PathBuf> = None;
        let mut below = Vec::new();
        let mut blockdev = Value::Null;
        for (level, layer) in self.layers.iter().enumerate() {
            let path = folder.join(format!("{level}.qcow2"));
            let data = folder.join(format!("{level}.data"));
            self.create(layer, &path, &data, backing.as_deref());
            scribble(layer, &path, &mut rng);
            blockdev = node(layer, &path, &data, blockdev);
            if level + 1 < self.layers.len() {
                below.push(path.clone());
                below.extend((layer.data_file != DataFile::Inside).then_some(data));
            }
            backing = Some(path);
        }
        let path = backing.expect("a recipe has a layer");
        let top = &self.layers[self.layers.len() - 1];
        self.age(top, &path, &mut rng);
        Cooked {
            path,
            below,
            blockdev,
        }
    }

    fn create(&self, layer: &Layer, path: &Path, data: &Path, backing: Option<&Path>) {
        let (name, options) = (text(path), layer.options(data));
        let size = layer.size.to_string();
        if let Some(backing) = backing {
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                "-b",
                text(backing),
                "-F",
                "qcow2",
                name,
                &size,
            ]);
        } else if layer.compression.is_some() {
            let source = path.with_extension("raw");
            fs::write(&source, self.base_content(layer)).expect("the temp folder is writable");
            let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            args.extend([text(&source), name]);
            qemu_img(&args);
            fs::remove_file(&source).expect("it was just written");
        } else {
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, name, &size]);
        }
    }

    /// Sectors that name themselves, compressible ones, and holes.
    fn base_content(&self, layer: &Layer) -> Vec<u8> {
        let mut content = pattern(layer.size as usize, self.number);
        for (piece, bytes) in content.chunks_mut(96 << 10).enumerate() {
            match piece % 4 {
                1 => bytes.fill(0),
                2 => bytes.fill(piece as u8),
                _ => {}
            }
        }
        content
    }

    /// Snapshots and size changes, with more writes after each.
    fn age(&self, top: &Layer, path: &Path, rng: &mut Rng) {
        for snapshot in 0..self.snapshots {
            qemu_img(&["snapshot", "-c", &format!("s{snapshot}"), text(path)]);
            scribble(top, path, rng);
        }
        if self.snapshots == 2 {
            qemu_img(&["snapshot", "-d", "s0", text(path)]);
        }
        let mut sized = top.clone();
        match self.resize {
            Resize::No => return,
            Resize::Grow => sized.size += rng.between(1, 4) * MIB + 512 * rng.below(9),
            Resize::Shrink => sized.size = sized.size / 2 / 512 * 512,
        }
        let size = sized.size.to_string();
        qemu_img(&["resize", "-q", "--shrink", "-f", "qcow2", text(path), &size]);
        scribble(&sized, path, rng);
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "recipe {} (resize {:?}, {} snapshots",
            self.number, self.resize, self.snapshots
        )?;
        for layer in &self.layers {
            write!(
                f,
                "; {} bytes {}",
                layer.size,
                layer.options(Path::new("D"))
            )?;
            if layer.compression.is_some() {
                write!(f, " compressed")?;
            }
        }
        write!(f, ")")
    }
}

/// Writes here and there with qemu-io, in QEMU's own ways.
fn scribble(layer: &Layer, path: &Path, rng: &mut Rng) {
    let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for _ in 0..rng.between(3, 10) {
        let len = (512 * rng.between(1, 400)).min(layer.size);
        let offset = rng.below((layer.size - len) / 512 + 1) * 512;
        let value = rng.between(1, 255);
        let command = match rng.below(8) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            3 if layer.compression.is_some() && layer.size >= layer.cluster_size => {
                let cluster = layer.cluster_size;
                let offset = rng.below(layer.size / cluster) * cluster;
                format!("write -c -P {value} {offset} {cluster}")
            }
            _ => format!("write -P {value} {offset} {len}"),
        };
        args.extend(["-c".into(), command]);
    }
    args.push(text(path).into());
    let said = try_run("qemu-io", &args);
    // A compressed write to a cluster that has data already is refused, and changes nothing.
    let compressed = args.iter().any(|arg| arg.starts_with("write -c"));
    assert!(
        compressed || said.code == Some(0),
        "qemu-io {args:?}: {}{}",
        said.out,
        said.err
    );
}

/// The node of one layer over the node below it. Every file is named by the operator: names
/// found inside images grant nothing.
fn node(layer: &Layer, path: &Path, data: &Path, backing: Value) -> Value {
    let file = |path: &Path| json!({"driver": "file", "filename": text(path), "discard": "unmap"});
    let mut node = json!({"driver": "qcow2", "file": file(path), "discard": "unmap",
                          "backing": backing});
    if layer.data_file != DataFile::Inside {
        node["data-file"] = file(data);
    }
    node
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are UTF-8")
}
