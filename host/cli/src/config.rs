//! `outport config`: a daemon's state as a file.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::Map;

use crate::client::Client;
use crate::output::json_pretty;

/// Prints the commands that make what the daemon has now.
pub(crate) fn dump(socket: &Path) -> Result<ExitCode> {
    let mut client = Client::connect(socket)?;
    let commands = client.call("x-outport-config", &Map::new())?;
    for secret in commands.as_array().into_iter().flatten() {
        let arguments = &secret["arguments"];
        let is_bare = arguments.get("data").is_none() && arguments.get("file").is_none();
        if arguments["qom-type"] == "secret" && is_bare {
            eprintln!(
                "outport: the data of secret {} is not printed: add it, or use a file",
                arguments["id"]
            );
        }
    }
    json_pretty(&commands)?;
    Ok(ExitCode::SUCCESS)
}
