//! `outport mount`: one image as a plain file, until Ctrl-C or until somebody unmounts it.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::args::Mount;
use crate::daemon;
use crate::format::{self, Format};
use crate::serve::plan::{
    EXPORT_ID, IMAGE_NODE, Image, image_options, monitor_options, option, quoted, utf8,
};
use crate::serve::{Job, check_access, run_job};

pub(crate) fn run(args: &Mount) -> Result<ExitCode> {
    check_access(&args.image, args.rw, "To look at it only, leave out --rw")?;
    let program = daemon::find()?;
    // Decides before anything is made.
    let format = format::choose(&args.image, args.format.as_deref())?;
    let folder = tempfile::Builder::new()
        .prefix("outport-")
        .tempdir()
        .context("Cannot make a folder for the monitor's socket")?;
    let target = Target::new(&args.file)?;
    let plan = Plan::new(args, format, &target, folder.path())?;
    run_job(&plan, args.json, &program)
}

/// The file to mount over; removed again if it was made for that.
struct Target {
    path: PathBuf,
    made: bool,
    /// The file system that it is on.
    device: u64,
}

impl Target {
    fn new(file: &Path) -> Result<Self> {
        let shown = file.display();
        let made = !file.exists();
        if made {
            fs::File::create_new(file).with_context(|| format!("Cannot make '{shown}'"))?;
        }
        let path = fs::canonicalize(file).with_context(|| format!("Cannot use '{shown}'"))?;
        let metadata = fs::metadata(&path)?;
        let target = Self {
            path,
            made,
            device: metadata.dev(),
        };
        if metadata.is_dir() {
            bail!("'{shown}' is a directory: give a file, such as '{shown}/disk.raw'");
        }
        if !metadata.is_file() {
            bail!("'{shown}' is not a regular file");
        }
        Ok(target)
    }

    /// A daemon that was killed leaves a mount that answers nothing.
    fn uncover(&self) {
        for (program, option) in [("umount", "-l"), ("fusermount3", "-uz")] {
            if !self.is_covered() {
                return;
            }
            let mut command = Command::new(program);
            command.arg(option).arg(&self.path).stderr(Stdio::null());
            // The next one may do it; if none can, the mount is there to be seen.
            let _ = command.status();
        }
    }

    fn is_covered(&self) -> bool {
        // A mount that died is still one.
        fs::metadata(&self.path).map_or(true, |metadata| metadata.dev() != self.device)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let empty = fs::metadata(&self.path).is_ok_and(|metadata| metadata.len() == 0);
        if self.made && empty && !self.is_covered() {
            // An empty file too many is no failure.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Everything that follows from the command line.
struct Plan<'a> {
    args: &'a Mount,
    format: Format,
    target: &'a Target,
    monitor: PathBuf,
    options: Vec<OsString>,
}

impl<'a> Plan<'a> {
    fn new(args: &'a Mount, format: Format, target: &'a Target, folder: &Path) -> Result<Self> {
        let monitor = folder.join("qmp.sock");
        let mut options = image_options(&Image {
            path: &args.image,
            driver: &format.driver,
            read_only: !args.rw,
            plugin: args.plugin.as_deref(),
            allow_paths: &args.allow_paths,
        })?;
        let export = json!({"type": "fuse", "id": EXPORT_ID, "node-name": IMAGE_NODE,
            "mountpoint": utf8(&target.path)?, "writable": args.rw});
        let called = args.file.display().to_string();
        options.extend(option(&called, "--export", export.to_string().into()));
        options.extend(monitor_options(&monitor)?);
        Ok(Self {
            args,
            format,
            target,
            monitor,
            options,
        })
    }
}

impl Job for Plan<'_> {
    fn options(&self) -> &[OsString] {
        &self.options
    }

    fn monitor(&self) -> &Path {
        &self.monitor
    }

    fn facts(&self, pid: u32) -> Value {
        json!({
            "file": self.target.path.to_string_lossy(),
            "pid": pid,
            "image": self.args.image.to_string_lossy(),
            "format": self.format.driver,
            "read-only": !self.args.rw,
            "qmp": self.monitor.to_string_lossy(),
        })
    }

    fn greeting(&self) -> String {
        let file = quoted(&self.target.path.to_string_lossy());
        let access = if self.args.rw {
            "for reading and writing"
        } else {
            "read-only"
        };
        let mut text = format!(
            "{} ({}, {}) is, {access}, the file\n\n  {}\n\n",
            self.args.image.display(),
            self.format.driver,
            self.format.because,
            self.target.path.display(),
        );
        let read_only = if self.args.rw { "" } else { " --read-only" };
        let lines = [
            ("its partitions", format!("fdisk -l {file}")),
            (
                "as a device",
                format!("losetup --find --show --partscan{read_only} {file}    (as root)"),
            ),
            ("copy it", format!("cp --sparse=always {file} copy.raw")),
            (
                "unmount it",
                format!("umount {file}    (or fusermount3 -u)"),
            ),
            (
                "ask the daemon",
                format!("outport exports {}", self.monitor.display()),
            ),
        ];
        for (what, line) in lines {
            // Writing to a String does not fail.
            let _ = writeln!(text, "  {what:<15} {line}");
        }
        text.push_str("\nCtrl-C stops.\n");
        text
    }

    fn is_over(&self) -> bool {
        !self.target.is_covered()
    }

    fn clean_up(&self) {
        self.target.uncover();
    }
}
