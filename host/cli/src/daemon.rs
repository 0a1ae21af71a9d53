//! Where the daemon's program is.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

/// The daemon's name, beside this program or in PATH.
const PROGRAM: &str = "outportd";

/// Names another program.
const VARIABLE: &str = "OUTPORTD";

/// The program to start.
pub(crate) fn find() -> Result<PathBuf> {
    if let Some(told) = env::var_os(VARIABLE).filter(|told| !told.is_empty()) {
        return Ok(told.into());
    }
    let here = env::current_exe().ok();
    let beside = here.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    let found = beside.into_iter().chain(env::split_paths(&path));
    found
        .map(|folder| folder.join(PROGRAM))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            anyhow!(
                "Cannot find {PROGRAM}: it is neither beside this program nor in PATH. Install it, \
             or name it with {VARIABLE}=/path/to/{PROGRAM}"
            )
        })
}
