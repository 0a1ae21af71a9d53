//! The command line: also the source of the completions and of the manual pages.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, Subcommand};
use clap_complete::Shell;

/// Serve disk images over NBD, and look after the daemon that does.
#[derive(Debug, Parser)]
#[command(name = "outport", version, max_term_width = 100, after_help = EXAMPLES)]
#[command(
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  outport serve disk.qcow2                        serve an image until Ctrl-C
  outport serve disk.img --read-only --port 10809
  outport mount disk.qcow2 disk.raw               the image's content as a plain file
  outport exports /run/outportd/qmp.sock          what a running daemon serves
  outport qmp /run/outportd/qmp.sock block-export-del id=exp0

The daemon, outportd, takes the command line of qemu-storage-daemon; see outportd(8).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Serve),
    Mount(Mount),
    Qmp(Qmp),
    /// List what a daemon exports
    Exports(List),
    /// List a daemon's block nodes
    Nodes(List),
    Jobs(Jobs),
    Events(Events),
    /// List a daemon's plugins: hash, limits, calls, faults
    Plugins(List),
    /// Work with a daemon's configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Work with plugin files
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  outport completions bash > \
        ~/.local/share/bash-completion/completions/outport")]
    Completions {
        /// Whose completion
        shell: Shell,
    },
    /// Write the manual pages
    #[command(after_help = "Example:\n  outport man ~/.local/share/man")]
    Man {
        /// A folder of manuals; man1 and man8 are made in it
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// Serve one image over NBD until Ctrl-C
///
/// Starts outportd as a child, prints the NBD URI and how to use it, and on Ctrl-C or SIGTERM
/// ends it cleanly: requests finish, the image is flushed and closed.
///
/// The format is never guessed from the content. Whoever can write a raw disk can make it look
/// like another format that names files of this machine. Without --format the file's extension
/// decides, and only for .qcow2, .raw and .img (raw).
#[derive(Debug, clap::Args)]
#[command(after_help = SERVE_EXAMPLES, group(ArgGroup::new("listener").args(["socket", "port"])))]
pub(crate) struct Serve {
    /// The image
    pub(crate) image: PathBuf,
    /// Its format: raw, qcow2, or a driver that a plugin brings
    #[arg(long, short)]
    pub(crate) format: Option<String>,
    /// Refuse to write
    #[arg(long, short)]
    pub(crate) read_only: bool,
    /// Listen on this unix socket [default: one in a folder of its own]
    #[arg(long, short, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on this TCP port of localhost, unencrypted
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// Name of the export [default: the empty name, which clients ask for by default]
    #[arg(
        long,
        short,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) export: String,
    /// Load this plugin; --format then names one of its drivers
    #[arg(long, value_name = "FILE.wasm", requires = "format")]
    pub(crate) plugin: Option<PathBuf>,
    /// Let the image name files below this directory (backing files); may be repeated
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_paths: Vec<PathBuf>,
    /// Print one line of JSON when ready, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  outport serve disk.qcow2
  outport serve disk.qcow2 --socket /tmp/disk.sock --read-only
  outport serve overlay.qcow2 --allow-paths /srv/base-images
  outport serve disk.simg --format android-sparse --plugin android-sparse.wasm
  outport serve disk.raw --json | jq -r .uri

Environment:
  OUTPORTD  the daemon's program [default: outportd beside this program, then in PATH]";

/// Show an image's content as a plain file until Ctrl-C
///
/// Mounts FILE: a regular file whose bytes are those of the disk in IMAGE, for every program that
/// knows only raw disks: losetup, fdisk, dd, cp --sparse, a hypervisor. Nothing is converted or
/// copied; what is not allocated in IMAGE is a hole in FILE. A FILE that does not exist is made,
/// and removed at the end; one that exists is covered meanwhile.
///
/// Nobody can write unless --rw is given: a file system that is mounted from a disk changes it
/// even if nothing is written to it.
///
/// The format is never guessed from the content, see outport-serve(1). Needs root, or fusermount3
/// (Debian: fuse3).
#[derive(Debug, clap::Args)]
#[command(after_help = MOUNT_EXAMPLES)]
pub(crate) struct Mount {
    /// The image
    pub(crate) image: PathBuf,
    /// The file to mount over
    pub(crate) file: PathBuf,
    /// Let programs write: FILE's changes are IMAGE's
    #[arg(long)]
    pub(crate) rw: bool,
    /// The image's format: raw, qcow2, or a driver that a plugin brings
    #[arg(long, short)]
    pub(crate) format: Option<String>,
    /// Load this plugin; --format then names one of its drivers
    #[arg(long, value_name = "FILE.wasm", requires = "format")]
    pub(crate) plugin: Option<PathBuf>,
    /// Let the image name files below this directory (backing files); may be repeated
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_paths: Vec<PathBuf>,
    /// Print one line of JSON when ready, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

const MOUNT_EXAMPLES: &str = "\
Examples:
  outport mount disk.qcow2 disk.raw               then, elsewhere:
      fdisk -l disk.raw                               its partitions
      cp --sparse=always disk.raw copy.raw            a copy with its holes
  outport mount disk.qcow2 disk.raw --rw          then, elsewhere:
      losetup --find --show --partscan disk.raw       a block device for each partition
      mount /dev/loop0p1 /mnt

It ends with Ctrl-C, or when FILE is unmounted (umount FILE, fusermount3 -u FILE). Programs that
still have FILE open then get errors, so detach loop devices first.

Environment:
  OUTPORTD  the daemon's program [default: outportd beside this program, then in PATH]";

/// Run a QMP command, or read commands from standard input
///
/// With COMMAND: sends it, prints what it returns, and exits with 1 if it was refused. Arguments
/// are a JSON object or key=value pairs; what type a value has, the daemon's own schema tells.
///
/// Without COMMAND: reads one command per line, in the same form or as raw QMP, and prints
/// events as they come. At a terminal lines are edited: Tab completes commands, arguments and
/// values from the daemon's schema, the arrows and Ctrl-R go through earlier lines, Ctrl-D ends.
/// Lines with secrets or passwords, and lines that begin with a space, are not remembered.
#[derive(Debug, clap::Args)]
#[command(after_help = QMP_EXAMPLES)]
pub(crate) struct Qmp {
    /// The monitor's unix socket
    pub(crate) socket: PathBuf,
    /// A QMP command, e.g. query-block-exports
    pub(crate) command: Option<String>,
    /// Its arguments: a JSON object, or key=value...
    #[arg(value_name = "ARGS")]
    pub(crate) arguments: Vec<String>,
    /// Print the daemon's answer as it came, one object per line
    #[arg(long)]
    pub(crate) json: bool,
}

const QMP_EXAMPLES: &str = "\
Examples:
  outport qmp qmp.sock query-block-exports
  outport qmp qmp.sock blockdev-add driver=qcow2 node-name=d file.driver=file \\
      file.filename=disk.qcow2
  outport qmp qmp.sock block-export-add type=nbd id=e node-name=d writable=on
  outport qmp qmp.sock object-add '{\"qom-type\": \"iothread\", \"id\": \"io0\"}'
  echo query-version | outport qmp qmp.sock --json
  outport qmp qmp.sock                            a prompt with history and completion

A monitor serves one client at a time; give each tool its own:
  outportd --chardev socket,id=ops,path=ops.sock,server=on,wait=off --monitor ops ...

Environment:
  XDG_STATE_HOME  earlier lines are in outport/qmp-history below it [default: ~/.local/state]";

/// List jobs, or follow them to their ends
///
/// With --follow: shows how far the jobs are until none of them is at work, as bars at a terminal
/// and as lines elsewhere, and exits with 1 if one of them failed. A job that concluded stays
/// listed until job-dismiss.
#[derive(Debug, clap::Args)]
#[command(after_help = JOBS_EXAMPLES)]
pub(crate) struct Jobs {
    /// The monitor's unix socket
    pub(crate) socket: PathBuf,
    /// Go on until no job is at work
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Print the daemon's answer as JSON; with --follow a line for each change of a job
    #[arg(long)]
    pub(crate) json: bool,
}

const JOBS_EXAMPLES: &str = "\
Examples:
  outport jobs qmp.sock
  outport jobs qmp.sock --follow && outport qmp qmp.sock job-dismiss id=create0";

/// Print events as they come
///
/// Goes on until the daemon ends. Events from before are not seen. A monitor serves one client at
/// a time, so this one needs a monitor of its own while others send commands.
#[derive(Debug, clap::Args)]
#[command(after_help = EVENTS_EXAMPLES)]
pub(crate) struct Events {
    /// The monitor's unix socket
    pub(crate) socket: PathBuf,
    /// Print the daemon's messages as they came, one object per line
    #[arg(long)]
    pub(crate) json: bool,
    /// End after so many events
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) count: Option<u64>,
}

const EVENTS_EXAMPLES: &str = "\
Examples:
  outport events events.sock
  outport events events.sock --json | jq -r 'select(.event == \"BLOCK_EXPORT_DELETED\").data.id'";

/// A table of something.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// The monitor's unix socket
    pub(crate) socket: PathBuf,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the commands that make what a daemon has now, for outportd --config
    ///
    /// The data of secrets is not printed: keep secrets in files.
    #[command(
        after_help = "Example:\n  outport config dump /run/outportd/qmp.sock > \
        outportd.json\n  outportd --check-config --config outportd.json"
    )]
    Dump {
        /// The monitor's unix socket
        socket: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Say in words what a plugin file is, what it needs and what is wrong with it
    Check {
        /// The component
        #[arg(value_name = "FILE.wasm")]
        file: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_socket_and_a_port_exclude_each_other() {
        assert!(parse("outport serve a.raw --socket s").is_ok());
        assert!(parse("outport serve a.raw --port 10809").is_ok());
        assert!(parse("outport serve a.raw --socket s --port 10809").is_err());
        assert!(parse("outport serve a.raw --port 0").is_err());
    }

    #[test]
    fn a_plugin_needs_a_format() {
        assert!(parse("outport serve a.x --plugin x.wasm").is_err());
        assert!(parse("outport serve a.x --plugin x.wasm --format x").is_ok());
    }
}
