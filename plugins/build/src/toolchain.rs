//! Which compiler makes Wasm, chosen automatically.
//!
//! 1. The toolchain that runs this build, or any other that rustup installed,
//!    if it has the target's standard library.
//! 2. Debian's `rustc-web`, `cargo-web` and `rust-web-src`: the compiler in
//!    /usr/bin builds the standard library from source.

use anyhow::{Result, bail};
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The one target that plugins are built for.
pub(crate) const TARGET: &str = "wasm32-unknown-unknown";

/// A compiler for [`TARGET`].
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// `rustc`.
    pub(crate) rustc: PathBuf,
    /// `cargo` of the same version.
    pub(crate) cargo: PathBuf,
    /// Its root: the standard library's sources lie under it.
    pub(crate) sysroot: PathBuf,
    /// Build the standard library from source.
    pub(crate) build_std: bool,
    /// Folder of `rust-lld`, if the compiler would not find it.
    pub(crate) linker_dir: Option<PathBuf>,
}

impl Toolchain {
    /// The first that fits.
    pub(crate) fn find() -> Result<Self> {
        let sysroots = rustup_sysroots();
        if let Some(sysroot) = sysroots.iter().find(|s| has_target(s)) {
            return Ok(Self::at(sysroot, sysroot.clone(), false, None));
        }
        let usr = Path::new("/usr");
        if !usr.join("bin/rustc").exists() || !usr.join("bin/cargo").exists() {
            bail!("{NOTHING_FITS}");
        }
        if !has_target(usr) && !usr.join("lib/rustlib/src/rust/library/std").exists() {
            bail!("{NOTHING_FITS}");
        }
        let mut roots = sysroots.iter().map(PathBuf::as_path).chain([usr]);
        let linker = roots.find_map(linker_dir);
        if linker.is_none() && !on_path("rust-lld") {
            bail!(
                "Building plugins with /usr/bin/rustc needs rust-lld: install a rustup toolchain, \
                 which has it, or put it on PATH"
            );
        }
        Ok(Self::at(usr, usr.to_owned(), !has_target(usr), linker))
    }

    fn at(root: &Path, sysroot: PathBuf, build_std: bool, linker_dir: Option<PathBuf>) -> Self {
        let tool = |name| root.join("bin").join(name);
        Self {
            rustc: tool("rustc"),
            cargo: tool("cargo"),
            sysroot,
            build_std,
            linker_dir,
        }
    }

    /// PATH of the build: the linker's folder before the present ones.
    pub(crate) fn path(&self) -> OsString {
        let present = env::var_os("PATH").unwrap_or_default();
        let dirs = self
            .linker_dir
            .iter()
            .cloned()
            .chain(env::split_paths(&present));
        env::join_paths(dirs).unwrap_or(present)
    }
}

const NOTHING_FITS: &str = "No compiler for wasm32-unknown-unknown: run 'rustup target add \
    wasm32-unknown-unknown', or install Debian's rustc-web, cargo-web and rust-web-src";

fn has_target(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib")
        .exists()
}

fn on_path(tool: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(tool).exists())
}

fn linker_dir(sysroot: &Path) -> Option<PathBuf> {
    let hosts = sysroot.join("lib/rustlib").read_dir().ok()?;
    let mut bins = hosts.flatten().map(|host| host.path().join("bin"));
    bins.find(|bin| bin.join("rust-lld").exists())
}

/// The running toolchain, then the others of rustup, by name.
fn rustup_sysroots() -> Vec<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let running = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok();
    let mut found: Vec<PathBuf> = running
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map(|sysroot| PathBuf::from(sysroot.trim()))
        .into_iter()
        .collect();
    let home = env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(env::home_dir()?.join(".rustup")));
    let toolchains = home.and_then(|home| home.join("toolchains").read_dir().ok());
    let mut others: Vec<PathBuf> = toolchains
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    others.sort();
    found.extend(others);
    // A toolchain without cargo (a linked compiler build) cannot be driven.
    found.retain(|sysroot| sysroot.join("bin/cargo").exists());
    found
}
