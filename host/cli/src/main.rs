//! `outport`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    outport_cli::run(std::env::args_os())
}
