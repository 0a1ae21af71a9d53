//! `outport plugin check`: the daemon looks at the file, because it knows the sandbox.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::daemon;
use crate::output;

/// What an older daemon says to an option that it does not know.
const UNKNOWN_OPTION: &str = "unrecognized option";

/// Says what is wrong with a plugin file; exit code 1 if anything is.
pub(crate) fn check(file: &Path) -> Result<ExitCode> {
    if !file.is_file() {
        bail!("There is no file '{}'", file.display());
    }
    let program = daemon::find()?;
    let done = Command::new(&program)
        .arg("--plugin-check")
        .arg(file)
        .output()
        .with_context(|| format!("Cannot run {}", program.display()))?;
    let complaint = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() && complaint.contains(UNKNOWN_OPTION) {
        bail!(
            "{} cannot check plugins: it lacks --plugin-check. Install the daemon of version {}",
            program.display(),
            env!("CARGO_PKG_VERSION")
        );
    }
    eprint!("{complaint}");
    output::print(&String::from_utf8_lossy(&done.stdout))?;
    Ok(if done.status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
