//! Files of `--config`: a JSON list of QMP commands.

use outport_qmp::envelope::Request;
use outport_qmp::{Command, Error, wire};
use serde_json::Value;

/// Reads a file. Its commands are right as far as their form goes.
///
/// # Errors
/// What is wrong, with the number of the command.
pub(super) fn read(path: &str) -> Result<Vec<Command>, String> {
    let content = std::fs::read(path).map_err(|error| {
        let reason = outport_block::strerror(error.raw_os_error().unwrap_or_default());
        format!("Could not open '{path}': {reason}")
    })?;
    let value = wire::parse_one(&content).map_err(|error| error.desc)?;
    let Value::Array(list) = value else {
        return Err("The file must contain a JSON list of commands".into());
    };
    let command = |(at, message)| {
        let request = Request::from_value(message, false);
        let request = request.map_err(|rejection| complaint(at, "", &rejection.error))?;
        Command::from_request(&request.name, &request.arguments)
            .map_err(|error| complaint(at, &request.name, &error))
    };
    list.into_iter().enumerate().map(command).collect()
}

/// What is wrong with the command at index `at`.
pub(super) fn complaint(at: usize, name: &str, error: &Error) -> String {
    let number = at + 1;
    match name {
        "" => format!("Command {number}: {error}"),
        name => format!("Command {number}, {name}: {error}"),
    }
}
