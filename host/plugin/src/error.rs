//! Why a plugin cannot be added, found or removed, in sentences for QMP.

use std::path::PathBuf;

use crate::limits::{MEMORY_MAX_CEILING, MEMORY_MAX_FLOOR, PLUGINS_MAX, WASM_BYTES_MAX};

/// A failed operation on the registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// The engine of this process cannot run plugins at all.
    #[error("The plugin engine cannot start: {0}")]
    Engine(String),
    /// The file cannot be read.
    #[error("Plugin '{id}': cannot read '{}': {source}", path.display())]
    Read {
        /// Object id.
        id: String,
        /// What was to be read.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is no regular file, or too large.
    #[error(
        "Plugin '{id}': '{}' is no regular file of at most {WASM_BYTES_MAX} bytes",
        path.display()
    )]
    Size {
        /// Object id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// No hash was given.
    #[error(
        "Plugin '{id}': parameter 'sha256' is missing. The file has {actual}; pin it with \
         sha256, or set allow-unpinned"
    )]
    Unpinned {
        /// Object id.
        id: String,
        /// The file's hash.
        actual: String,
    },
    /// The file is another one than was meant.
    #[error("Plugin '{id}': '{}' has SHA-256 {actual}, but {wanted} was asked for", path.display())]
    Hash {
        /// Object id.
        id: String,
        /// The file.
        path: PathBuf,
        /// What it has.
        actual: String,
        /// What was asked for.
        wanted: String,
    },
    /// It is no component, does not fit the contract, or faulted when asked.
    #[error("Plugin '{id}': {problem}")]
    Unfit {
        /// Object id.
        id: String,
        /// The first thing that is wrong.
        problem: String,
    },
    /// A limit is out of bounds.
    #[error(
        "Parameter 'memory-max' expects a value from {MEMORY_MAX_FLOOR} to {MEMORY_MAX_CEILING}"
    )]
    MemoryMax,
    /// The id is in use.
    #[error("Plugin '{0}' already exists")]
    Exists(String),
    /// The driver name is in use.
    #[error("Plugin '{id}': driver '{name}' is already provided by {by}")]
    NameTaken {
        /// Object id.
        id: String,
        /// Driver name.
        name: String,
        /// Who has it.
        by: String,
    },
    /// Only pinned plugins may take a bundled plugin's place.
    #[error(
        "Plugin '{id}': driver '{name}' is a bundled one; only a plugin pinned with sha256 may \
         replace it"
    )]
    OverrideUnpinned {
        /// Object id.
        id: String,
        /// Driver name.
        name: String,
    },
    /// Too many.
    #[error("No more than {PLUGINS_MAX} plugins can be added")]
    TooMany,
    /// Nobody has that id.
    #[error("Plugin '{0}' not found")]
    NotFound(String),
    /// Nodes still use it.
    #[error("Plugin '{0}' is in use")]
    InUse(String),
    /// Nobody provides that driver.
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    /// Nobody provides that policy.
    #[error("There is no authorization plugin '{0}'")]
    UnknownPolicy(String),
    /// Nobody provides those contexts.
    #[error("No metadata context plugin with id '{0}'")]
    UnknownProvider(String),
}
