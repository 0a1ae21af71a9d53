//! Kernel and initramfs: Debian's kernel package, unpacked once below `target`, and what a shell
//! needs, as a cpio archive in the kernel's own format ("newc").

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use outport_tests::run;

/// Modules of the kernel package, in the order in which they are loaded.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
];

/// Where the kernel lies.
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    modules: PathBuf,
}

/// Fetches and unpacks the kernel package unless that was done before.
pub(crate) fn kernel() -> Kernel {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let whole = folder.join("kernel");
    if !whole.is_dir() {
        let part = folder.join("part");
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).unwrap();
        // The name of the package has the version in it.
        let meta = run("apt-cache", &["depends", "linux-image-cloud-amd64"]);
        let named = meta.lines().find_map(|it| it.split_once("Depends: "));
        let package = named.expect("apt knows a cloud kernel").1.trim();
        let part = part.to_str().unwrap();
        let fetch = format!("cd '{part}' && apt-get download -q {package} && dpkg-deb -x *.deb .");
        run("sh", &["-c", &fetch]);
        fs::rename(part, &whole).unwrap();
    }
    let find = |folder: &str, prefix: &str| {
        let entries = fs::read_dir(whole.join(folder)).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        let starts = |path: &PathBuf| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(prefix)
        };
        paths.find(starts).expect("it is in the package")
    };
    Kernel {
        image: find("boot", "vmlinuz"),
        modules: find("lib/modules", "").join("kernel"),
    }
}

/// The archive of a machine that runs `script`.
pub(crate) fn archive(kernel: &Kernel, script: &str) -> Vec<u8> {
    let mut cpio = Cpio::default();
    let mut load = String::new();
    for name in MODULES {
        if let Some(path) = find_file(&kernel.modules, &format!("{name}.ko")) {
            cpio.file(
                &format!("modules/{name}.ko"),
                &fs::read(path).unwrap(),
                false,
            );
            load.push_str(&format!("insmod /modules/{name}.ko\n"));
        }
    }
    cpio.program("/bin/busybox", "bin/busybox");
    cpio.program("/sbin/mkfs.ext4", "sbin/mkfs.ext4");
    let programs = ["/bin/busybox", "/sbin/mkfs.ext4"];
    let libraries: BTreeSet<_> = programs.into_iter().flat_map(libraries).collect();
    for library in libraries {
        cpio.program(&library, library.trim_start_matches('/'));
    }
    for folder in ["proc", "sys", "dev", "etc"] {
        cpio.folder(folder);
    }
    let init = format!(
        "#!/bin/busybox sh\n\
         export PATH=/bin:/sbin\n\
         /bin/busybox --install -s /bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         {load}\
         sh /script; echo \"$? is the verdict\"\n\
         poweroff -f\n"
    );
    cpio.file("init", init.as_bytes(), true);
    cpio.file("script", script.as_bytes(), true);
    cpio.end()
}

fn find_file(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|it| it == name) {
                return Some(path);
            }
        }
    }
    None
}

/// What the dynamic linker loads for a program.
fn libraries(program: &str) -> Vec<String> {
    // Of a static one it says so, and fails.
    let list = run("sh", &["-c", &format!("ldd {program} || true")]);
    let words = list.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(str::to_owned).collect()
}

#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let inode = self.folders.len() + self.bytes.len();
        let fields = [
            inode as u32,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn folder(&mut self, name: &str) {
        if self.folders.insert(name.to_owned()) {
            self.entry(name, 0o040_755, &[]);
        }
    }

    fn file(&mut self, name: &str, content: &[u8], executable: bool) {
        for (at, _) in name.match_indices('/') {
            self.folder(&name[..at]);
        }
        let mode = if executable { 0o100_755 } else { 0o100_644 };
        self.entry(name, mode, content);
    }

    fn program(&mut self, path: &str, name: &str) {
        let content = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        self.file(name, &content, true);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
