//! `outportd --plugin-check FILE`: says whether this host can run a plugin.
//!
//! Runs instead of the daemon, for `outport plugin check`. The plugin is granted
//! nothing: it is compiled, inspected and asked who it is.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use outport_plugin::inspect;

/// The option, which must be the first argument and takes a file.
const OPTION: &str = "--plugin-check";

/// Judges the file if that is what was asked for.
pub(crate) fn asked(arguments: &[OsString]) -> Option<ExitCode> {
    let [option, file] = arguments else {
        return None;
    };
    (option == OsStr::new(OPTION)).then(|| match judge(file) {
        Ok(code) => code,
        Err(sentence) => {
            eprintln!("{}: {sentence}", crate::PROGRAM);
            ExitCode::FAILURE
        }
    })
}

fn judge(file: &OsStr) -> Result<ExitCode, String> {
    let wasm = std::fs::read(file)
        .map_err(|error| format!("Could not read '{}': {error}", file.display()))?;
    let report = inspect::check(&wasm).map_err(|error| error.to_string())?;
    println!("{report}");
    Ok(if report.is_fit() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
