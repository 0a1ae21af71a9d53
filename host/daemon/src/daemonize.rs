//! `--daemonize`: the daemon starts itself again in the background and waits until that one is
//! ready.
//!
//! ```text
//! parent: spawn self (stdout = pipe) -- wait --> byte: exit 0 | end of pipe: exit 1
//! child:  setsid, umask 027, startup ... write one byte, chdir /, std streams to /dev/null
//! ```
//!
//! Spawning instead of forking needs no unsafe code and keeps threads out of the question;
//! descriptors that were passed by number survive it. Messages of a failed startup reach the
//! terminal because standard error is given up last.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::Mode;

use crate::PROGRAM;

/// Set in the child; holds the parent's process id.
const MARK: &str = "OUTPORTD_IN_BACKGROUND_OF";

/// Which side of the spawn this process is on.
#[derive(Debug)]
pub(crate) enum Side {
    /// The child's startup succeeded or failed: exit with this.
    Parent(ExitCode),
    Child,
}

/// Splits into parent and child.
///
/// # Errors
/// The system cannot start a process.
pub(crate) fn split() -> std::io::Result<Side> {
    if std::env::var_os(MARK).is_some() {
        rustix::process::setsid()?;
        rustix::process::umask(Mode::WGRP | Mode::RWXO);
        return Ok(Side::Child);
    }
    let mut child = Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_else(|| PROGRAM.into()))
        .args(std::env::args_os().skip(1))
        .env(MARK, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = [0];
    let ready = match child.stdout.take() {
        Some(mut pipe) => pipe.read(&mut ready)? == 1,
        None => false,
    };
    // Not waited for: it becomes init's child when we exit.
    Ok(Side::Parent(if ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }))
}

/// The child's startup succeeded: tells the parent and lets go of the terminal.
///
/// # Errors
/// The system's.
pub(crate) fn ready() -> std::io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::io::write(rustix::stdio::stdout(), b"\n")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
