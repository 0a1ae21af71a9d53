//! Completions and manual pages, from the definition of the arguments.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Args;
use crate::output;

/// The daemon's page is written by hand: its options are QEMU's.
const OUTPORTD_8: &str = include_str!("../man/outportd.8");

pub(crate) fn completions(shell: Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "outport", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// One page for `outport`, one for each of its commands, and `outportd(8)`.
pub(crate) fn man(folder: &Path) -> Result<ExitCode> {
    let (man1, man8) = (folder.join("man1"), folder.join("man8"));
    for made in [&man1, &man8] {
        fs::create_dir_all(made).with_context(|| format!("Cannot make {}", made.display()))?;
    }
    clap_mangen::generate_to(Args::command(), &man1)
        .with_context(|| format!("Cannot write to {}", man1.display()))?;
    let file = man8.join("outportd.8");
    fs::write(&file, OUTPORTD_8).with_context(|| format!("Cannot write {}", file.display()))?;
    Ok(ExitCode::SUCCESS)
}
