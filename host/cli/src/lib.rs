//! The tool for people: serves one image, talks to monitors, prints tables.
//!
//! ```text
//! args ──► serve      starts outportd with QEMU's options, says how to connect, stops it cleanly
//!     ├──► monitor    one QMP command, or lines of them ──► client ──► a monitor's unix socket
//!     │      └► editor   the same at a terminal: history, and completion from the schema
//!     ├──► config     what a daemon has, as a file for another one
//!     ├──► lists      exports, nodes, plugins as tables
//!     ├──► follow     events and jobs as they go on
//!     └──► generate   completions and manual pages, from the same definition of the arguments
//! ```
//! It holds no knowledge of images: whatever a command does, the daemon does. Errors name the
//! thing and the next step, on standard error, with exit code 1; 2 is a wrong command line.

#![forbid(unsafe_code)]

mod args;
mod client;
mod completion;
mod config;
mod daemon;
mod editor;
mod follow;
mod format;
mod generate;
mod keyval;
mod lists;
mod monitor;
mod mount;
mod output;
mod plugin;
mod serve;
mod words;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command, ConfigCommand, PluginCommand};

/// Runs the command line, program's name first; its exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are such errors too; a closed terminal is no reason to panic.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let outcome = match args.command {
        Command::Serve(serve) => serve::run(&serve),
        Command::Mount(mount) => mount::run(&mount),
        Command::Qmp(qmp) => monitor::run(&qmp),
        Command::Exports(list) => lists::exports(&list),
        Command::Nodes(list) => lists::nodes(&list),
        Command::Jobs(jobs) => follow::jobs(&jobs),
        Command::Events(events) => follow::events(&events),
        Command::Plugins(list) => lists::plugins(&list),
        Command::Config(ConfigCommand::Dump { socket }) => config::dump(&socket),
        Command::Plugin(PluginCommand::Check { file }) => plugin::check(&file),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { folder } => generate::man(&folder),
    };
    match outcome {
        Ok(code) => code,
        Err(error) if output::reader_has_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outport: {error:#}");
            ExitCode::FAILURE
        }
    }
}
