//! `outportd`: serves block nodes. See the library for everything else.

use std::process::ExitCode;

fn main() -> ExitCode {
    outport_daemon::run(std::env::args_os().skip(1))
}
