//! Authorization objects: QEMU's lists, and policies that an operator brings.
//!
//! Control plane. All of them are decided by components: QEMU's by the bundled `authz-list`. Made
//! here, asked through `outport_export::access`. Whatever is wrong with an object, nobody gets in
//! (spec 5.3).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::rc::Rc;
use std::sync::Arc;

use outport_block::Errno;
use outport_block::authz::ConfigFiles;
use outport_plugin::{WasmPolicy, limits};
use outport_qmp::Error;
use outport_qmp::types::qom::{
    AuthZListFileProperties, AuthZListProperties, AuthZSimpleProperties, AuthZWasmProperties,
    QAuthZListPolicy, QAuthZListRule,
};

use super::authz_file::FileList;
use crate::daemon::Daemon;

/// The bundled plugin that decides by rules.
const LIST_PLUGIN: &str = "authz-list";

/// One object.
#[derive(Debug, Clone)]
pub(super) struct Authz {
    pub(super) policy: Arc<WasmPolicy>,
    /// Its denials count.
    pub(super) enforced: bool,
    /// Keeps it up to date.
    _file: Option<Rc<FileList>>,
}

impl Authz {
    fn of(policy: WasmPolicy) -> Self {
        Self {
            policy: Arc::new(policy),
            enforced: true,
            _file: None,
        }
    }

    /// A list of one.
    ///
    /// # Errors
    /// The plugin engine does not start.
    pub(super) async fn simple(
        daemon: &Daemon,
        id: &str,
        properties: &AuthZSimpleProperties,
    ) -> Result<Self, Error> {
        let rule = QAuthZListRule {
            r#match: properties.identity.clone(),
            policy: QAuthZListPolicy::Allow,
            format: None,
        };
        let list = AuthZListProperties {
            policy: None,
            rules: Some(vec![rule]),
        };
        Self::list(daemon, id, &list).await
    }

    /// Rules.
    ///
    /// # Errors
    /// The plugin engine does not start.
    pub(super) async fn list(
        daemon: &Daemon,
        id: &str,
        list: &AuthZListProperties,
    ) -> Result<Self, Error> {
        let nothing = Arc::new(GrantedFiles::default());
        let policy = open(daemon, id, LIST_PLUGIN, &rules(list), nothing).await?;
        Ok(Self::of(policy))
    }

    /// Rules in a file, watched if asked for.
    ///
    /// # Errors
    /// The file does not hold rules, or cannot be watched.
    pub(super) async fn file(
        daemon: &Daemon,
        id: &str,
        properties: &AuthZListFileProperties,
    ) -> Result<Self, Error> {
        let watched = FileList::open(properties).await?;
        let mut authz = Self::list(daemon, id, &watched.first).await?;
        authz._file = Some(watched.keep(authz.policy.clone()));
        Ok(authz)
    }

    /// A policy of an operator's plugin.
    ///
    /// # Errors
    /// There is no such plugin, or the sentence of the plugin about its configuration.
    pub(super) async fn wasm(
        daemon: &Daemon,
        id: &str,
        properties: &AuthZWasmProperties,
    ) -> Result<Self, Error> {
        let config = properties.config.clone().unwrap_or_default();
        let config = serde_json::Value::Object(config).to_string();
        let files = properties.files.clone().unwrap_or_default();
        let files = Arc::new(GrantedFiles::of(&files)?);
        let policy = open(daemon, id, &properties.plugin, &config, files).await?;
        Ok(Self {
            enforced: properties.enforce.unwrap_or(true),
            ..Self::of(policy)
        })
    }
}

/// A list as the options of the plugin.
pub(super) fn rules(list: &AuthZListProperties) -> String {
    // Its members are those of QEMU's list.
    serde_json::to_string(list).unwrap_or_default()
}

async fn open(
    daemon: &Daemon,
    id: &str,
    plugin: &str,
    options: &str,
    files: Arc<dyn ConfigFiles>,
) -> Result<WasmPolicy, Error> {
    let factory = daemon.plugins.registry()?.policy(plugin);
    let factory = factory.map_err(|error| Error::generic(error.to_string()))?;
    let opened = factory.open(id, options, files).await;
    opened.map_err(|error| Error::generic(error.to_string()))
}

/// The files that the operator granted one policy: names to paths.
#[derive(Debug, Default)]
struct GrantedFiles(BTreeMap<String, String>);

impl GrantedFiles {
    fn of(files: &serde_json::Map<String, serde_json::Value>) -> Result<Self, Error> {
        let granted = files.iter().map(|(name, path)| match path.as_str() {
            Some(path) => Ok((name.clone(), path.to_owned())),
            None => Err(Error::invalid_type(&format!("files.{name}"), "string")),
        });
        granted.collect::<Result<_, _>>().map(Self)
    }

    fn open(&self, name: &str) -> Result<File, Errno> {
        let path = self.0.get(name).ok_or(Errno::Access)?;
        File::open(path).map_err(Errno::from)
    }
}

/// Read on the control thread: small files of the operator's own choice, and a decision must see
/// what the file says now.
impl ConfigFiles for GrantedFiles {
    fn read(&self, name: &str) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let more = limits::CONFIG_FILE_BYTES_MAX as u64 + 1;
        let read = self.open(name)?.take(more).read_to_end(&mut bytes);
        read.map_err(Errno::from)?;
        Ok(bytes)
    }

    /// Where it is, how long, and when it was written: a rewrite in place within one tick of the
    /// file system's clock that leaves the length as it was goes unseen until the next one.
    fn generation(&self, name: &str) -> Result<u64, Errno> {
        let path = self.0.get(name).ok_or(Errno::Access)?;
        let meta = std::fs::metadata(path).map_err(Errno::from)?;
        let parts = [
            meta.ino(),
            meta.size(),
            meta.mtime().cast_unsigned(),
            meta.mtime_nsec().cast_unsigned(),
            meta.ctime().cast_unsigned(),
            meta.ctime_nsec().cast_unsigned(),
        ];
        // FNV-1a over whole numbers: equal files give equal numbers.
        let mix = |hash: u64, part: u64| (hash ^ part).wrapping_mul(0x0000_0100_0000_01b3);
        Ok(parts.into_iter().fold(0xcbf2_9ce4_8422_2325, mix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_changes_with_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rules");
        std::fs::write(&path, "one").unwrap();
        let path = path.to_str().unwrap();
        let files = GrantedFiles(BTreeMap::from([("rules".to_owned(), path.to_owned())]));
        let first = files.generation("rules").unwrap();
        assert_eq!(files.generation("rules").unwrap(), first);
        assert_eq!(files.read("rules").unwrap(), b"one");
        std::fs::write(path, "three").unwrap();
        assert_ne!(files.generation("rules").unwrap(), first);
        std::fs::remove_file(path).unwrap();
        assert_eq!(files.read("rules").unwrap_err(), Errno::NoEnt);
        assert_eq!(files.read("../rules").unwrap_err(), Errno::Access);
    }
}
