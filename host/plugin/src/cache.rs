//! Compiled code: the only file of this crate with unsafe code.
//!
//! Native code is loaded from two places only: what this very build embedded
//! ([`load_embedded`]), and the private directory of [`CompileCache`], whose
//! files only this user can have written. A vendor's `.cwasm` has no way in.
//!
//! ```text
//! <dir>/<sha256 of wasm>-<engine>.code  =  sha256(code) | code     0600 in 0700
//! ```
//!
//! Invariant: an entry is written to a temporary name, synced and renamed, so a
//! reader sees all of it or nothing; the checksum catches a decayed disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::compile::hex;

const CHECKSUM_BYTES: usize = 32;

/// Machine code that is part of this program, for a plugin.
///
/// It is run as it is, outside of any sandbox, so safe code cannot make one of just any bytes:
///
/// ```compile_fail
/// outport_plugin::MachineCode::new(b"any bytes");
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineCode(&'static [u8]);

impl MachineCode {
    /// No code: the plugin is compiled when it is loaded.
    pub const NONE: Self = Self(&[]);

    /// These bytes.
    ///
    /// # Safety
    /// They are what [`precompile`](crate::precompile) made, in this build or another one, and
    /// nobody changed them since; or there are none.
    #[must_use]
    pub const unsafe fn new(code: &'static [u8]) -> Self {
        Self(code)
    }
}

/// Load code that was embedded at build time. `None`: it was compiled for
/// another processor or by another build; compile the `.wasm` instead.
pub(crate) fn load_embedded(engine: &Engine, code: MachineCode) -> Option<Component> {
    let MachineCode(code) = code;
    if code.is_empty() {
        return None;
    }
    // SAFETY: whoever made the `MachineCode` promised that it is the output of
    // `precompile`. wasmtime compares version, settings and CPU features before
    // it accepts it.
    unsafe { Component::deserialize(engine, code) }.ok()
}

/// A private directory of compiled code.
#[derive(Clone, Debug)]
pub struct CompileCache {
    dir: PathBuf,
}

impl CompileCache {
    /// The directory that belongs to this user: `/var/cache/outport` for root,
    /// else `$XDG_CACHE_HOME/outport` or `~/.cache/outport`. `None` when the
    /// environment names neither.
    #[must_use]
    pub fn default_dir() -> Option<PathBuf> {
        if rustix::process::geteuid().is_root() {
            return Some("/var/cache/outport".into());
        }
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
        Some(base.join("outport"))
    }

    /// Open (or make) the cache in `dir`.
    ///
    /// # Errors
    /// It cannot be made, or others may write to it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let meta = fs::symlink_metadata(dir)?;
        let ours = meta.uid() == rustix::process::geteuid().as_raw();
        if !meta.is_dir() || !ours || meta.mode() & 0o077 != 0 {
            let what = format!(
                "Compile cache '{}': it must be a directory of this user with mode 0700",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    fn path(&self, engine: &Engine, sha256: &str) -> PathBuf {
        let mut hasher = Sha(Sha256::new());
        engine.precompile_compatibility_hash().hash(&mut hasher);
        let engine = hex(&hasher.0.finalize()[..8]);
        self.dir.join(format!("{sha256}-{engine}.code"))
    }

    /// The code of the plugin with this hash, if it is there, ours and whole.
    pub(crate) fn load(&self, engine: &Engine, sha256: &str) -> Option<Component> {
        let path = self.path(engine, sha256);
        let code = match read_private(&path) {
            Ok(code) => code,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            Err(e) => {
                tracing::warn!(path = %path.display(), error = %e, "compile cache entry ignored");
                return None;
            }
        };
        // SAFETY: the file lies in a 0700 directory of this user, is a plain
        // file of this user that nobody else may write, and holds what `store`
        // wrote, by its checksum: the output of this engine's compiler. Whoever
        // can forge that can already replace this program.
        match unsafe { Component::deserialize(engine, &code[CHECKSUM_BYTES..]) } {
            Ok(component) => Some(component),
            Err(e) => {
                tracing::warn!(path = %path.display(), error = %e, "compile cache entry ignored");
                None
            }
        }
    }

    /// Keep compiled code. Failing is no error: it is compiled again next time.
    pub(crate) fn store(&self, engine: &Engine, sha256: &str, component: &Component) {
        let path = self.path(engine, sha256);
        if let Err(e) = self.try_store(&path, component) {
            tracing::warn!(path = %path.display(), error = %e, "compiled code not cached");
        }
    }

    fn try_store(&self, path: &Path, component: &Component) -> io::Result<()> {
        let code = component
            .serialize()
            .map_err(|e| io::Error::other(e.to_string()))?;
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        // One of a crashed process with our number is in the way.
        let _ = fs::remove_file(&temporary);
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&Sha256::digest(&code))?;
            file.write_all(&code)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }
}

/// Checksum and code of a file that only this user can have written.
fn read_private(path: &Path) -> io::Result<Vec<u8>> {
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut file: File = OpenOptions::new()
        .read(true)
        .custom_flags(no_follow)
        .open(path)?;
    let meta = file.metadata()?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_file() || !ours || meta.mode() & 0o022 != 0 || meta.nlink() != 1 {
        let what = "it is not a plain file that only this user can write";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
    file.read_to_end(&mut bytes)?;
    let whole = bytes
        .split_at_checked(CHECKSUM_BYTES)
        .is_some_and(|(sum, code)| Sha256::digest(code).as_slice() == sum);
    if !whole {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its checksum is wrong",
        ));
    }
    Ok(bytes)
}

/// SHA-256 as a `Hasher`: the default one may change with the compiler.
struct Sha(Sha256);

impl Hasher for Sha {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{compile, sha256_hex};
    use crate::engine::PluginEngine;
    use std::os::unix::fs::PermissionsExt as _;

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    #[test]
    fn code_is_kept_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = CompileCache::open(&dir.path().join("a/b")).unwrap();
        let engine = PluginEngine::new().unwrap();
        let sha = sha256_hex(EMPTY);
        assert!(cache.load(&engine.engine, &sha).is_none());
        cache.store(&engine.engine, &sha, &compile(&engine, EMPTY).unwrap());
        assert!(cache.load(&engine.engine, &sha).is_some());

        let path = cache.path(&engine.engine, &sha);
        let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o666);
        assert!(
            cache.load(&engine.engine, &sha).is_none(),
            "others may write it"
        );
        set_mode(0o600);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(cache.load(&engine.engine, &sha).is_none(), "a bit flipped");
        fs::remove_file(&path).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        bytes[last] ^= 1;
        fs::write(&elsewhere, &bytes).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(
            cache.load(&engine.engine, &sha).is_none(),
            "a symbolic link"
        );
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(CompileCache::open(dir.path()).is_err());
    }
}
