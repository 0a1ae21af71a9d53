//! What `outport serve` asks the daemon for, and what it tells people. Pure. Opening an image is
//! here for all commands that do.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::args::Serve;
use crate::format::{self, Format};
use crate::serve::Job;

/// The only export of the daemon.
pub(crate) const EXPORT_ID: &str = "export0";

const FILE_NODE: &str = "file0";
pub(crate) const IMAGE_NODE: &str = "image0";
const PLUGIN_ID: &str = "plugin0";

/// Where clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Listener {
    Unix(PathBuf),
    Port(u16),
}

/// Everything that follows from the command line.
#[derive(Debug)]
pub(super) struct Plan {
    options: Vec<OsString>,
    monitor: PathBuf,
    image: PathBuf,
    format: Format,
    read_only: bool,
    export: String,
    listener: Listener,
}

impl Plan {
    /// `folder` is for sockets that nobody named.
    pub(super) fn new(args: &Serve, folder: &Path) -> Result<Self> {
        let listener = match (&args.socket, args.port) {
            (_, Some(port)) => Listener::Port(port),
            (Some(path), None) => Listener::Unix(
                // The URI is for programs that run elsewhere.
                std::path::absolute(path)
                    .with_context(|| format!("Cannot use the socket '{}'", path.display()))?,
            ),
            (None, None) => Listener::Unix(folder.join("nbd.sock")),
        };
        let mut plan = Self {
            options: Vec::new(),
            monitor: folder.join("qmp.sock"),
            image: args.image.clone(),
            format: format::choose(&args.image, args.format.as_deref())?,
            read_only: args.read_only,
            export: args.export.clone(),
            listener,
        };
        plan.options = plan.daemon_options(args)?;
        Ok(plan)
    }

    /// QEMU's options, in the order in which they act. JSON needs no escaping of names.
    fn daemon_options(&self, args: &Serve) -> Result<Vec<OsString>> {
        let mut options = image_options(&Image {
            path: &self.image,
            driver: &self.format.driver,
            read_only: self.read_only,
            plugin: args.plugin.as_deref(),
            allow_paths: &args.allow_paths,
        })?;
        let (called, address) = match &self.listener {
            Listener::Unix(path) => {
                let called = format!("--socket {}", path.display());
                (called, json!({"type": "unix", "path": utf8(path)?}))
            }
            Listener::Port(port) => {
                let address =
                    json!({"type": "inet", "host": "localhost", "port": port.to_string()});
                (format!("--port {port}"), address)
            }
        };
        let server = json!({"addr": address}).to_string().into();
        options.extend(option(&called, "--nbd-server", server));
        let export = json!({"type": "nbd", "id": EXPORT_ID, "node-name": IMAGE_NODE,
            "name": self.export, "writable": !self.read_only});
        let called = format!("--export {}", self.export);
        options.extend(option(&called, "--export", export.to_string().into()));
        options.extend(monitor_options(&self.monitor)?);
        Ok(options)
    }

    /// The NBD URI of the export.
    fn uri(&self) -> String {
        let name = escaped(&self.export);
        match &self.listener {
            Listener::Unix(path) => {
                format!(
                    "nbd+unix:///{name}?socket={}",
                    escaped(&path.to_string_lossy())
                )
            }
            Listener::Port(port) => format!("nbd://localhost:{port}/{name}"),
        }
    }
}

impl Job for Plan {
    fn options(&self) -> &[OsString] {
        &self.options
    }

    fn monitor(&self) -> &Path {
        &self.monitor
    }

    fn facts(&self, pid: u32) -> Value {
        let mut facts = json!({
            "uri": self.uri(),
            "pid": pid,
            "image": self.image.to_string_lossy(),
            "format": self.format.driver,
            "read-only": self.read_only,
            "export": self.export,
            "qmp": self.monitor.to_string_lossy(),
        });
        match &self.listener {
            Listener::Unix(path) => facts["socket"] = json!(path.to_string_lossy()),
            Listener::Port(port) => facts["port"] = json!(port),
        }
        facts
    }

    fn greeting(&self) -> String {
        let uri = quoted(&self.uri());
        let access = if self.read_only {
            "read-only"
        } else {
            "for reading and writing"
        };
        let name = match self.export.is_empty() {
            true => String::new(),
            false => format!(" -N {}", quoted(&self.export)),
        };
        let client = match &self.listener {
            Listener::Unix(path) => format!("-unix {}", quoted(&path.to_string_lossy())),
            Listener::Port(port) => format!("localhost {port}"),
        };
        let mut text = format!(
            "Serving {} ({}, {}) {access} at\n\n  {}\n\n",
            self.image.display(),
            self.format.driver,
            self.format.because,
            self.uri()
        );
        let lines = [
            ("look at it", format!("nbdinfo {uri}")),
            ("what is data", format!("nbdinfo --map {uri}")),
            ("copy it", format!("nbdcopy --progress {uri} copy.raw")),
            (
                "convert it",
                format!("qemu-img convert -f raw -O qcow2 {uri} copy.qcow2"),
            ),
            (
                "attach it",
                format!("nbd-client {client} /dev/nbd0{name}    (as root)"),
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
}

/// An image to open.
pub(crate) struct Image<'a> {
    pub(crate) path: &'a Path,
    pub(crate) driver: &'a str,
    pub(crate) read_only: bool,
    pub(crate) plugin: Option<&'a Path>,
    pub(crate) allow_paths: &'a [PathBuf],
}

/// Options that open it, as [`IMAGE_NODE`]. JSON needs no escaping of names.
pub(crate) fn image_options(image: &Image<'_>) -> Result<Vec<OsString>> {
    let mut options = Vec::new();
    for folder in image.allow_paths {
        let called = format!("--allow-paths {}", folder.display());
        options.extend(option(&called, "--allow-paths", folder.into()));
    }
    if let Some(plugin) = image.plugin {
        // The user named the file: that is the permission. Its hash is in query-plugins.
        let object = json!({"qom-type": "wasm-plugin", "id": PLUGIN_ID,
            "filename": utf8(plugin)?, "allow-unpinned": true});
        let called = format!("--plugin {}", plugin.display());
        options.extend(option(&called, "--object", object.to_string().into()));
    }
    let called = image.path.display().to_string();
    let read_only = image.read_only;
    let file = json!({"driver": "file", "node-name": FILE_NODE, "filename": utf8(image.path)?,
        "read-only": read_only, "discard": "unmap"});
    options.extend(option(&called, "--blockdev", file.to_string().into()));
    let node = json!({"driver": image.driver, "node-name": IMAGE_NODE,
        "file": FILE_NODE, "read-only": read_only, "discard": "unmap"});
    options.extend(option(&called, "--blockdev", node.to_string().into()));
    Ok(options)
}

/// An option of the daemon's, and how it is called when the daemon complains: people know our
/// options, not those.
pub(crate) fn option(called: &str, name: &str, value: OsString) -> [OsString; 4] {
    let called = format!("outport: {called}");
    ["--called".into(), called.into(), name.into(), value]
}

/// Options for a monitor at this socket.
pub(crate) fn monitor_options(socket: &Path) -> Result<[OsString; 4]> {
    let path = utf8(socket)?.replace(',', ",,");
    let chardev = format!("socket,id=monitor0,path={path},server=on,wait=off");
    let monitor = "chardev=monitor0";
    Ok([
        "--chardev".into(),
        chardev.into(),
        "--monitor".into(),
        monitor.into(),
    ])
}

pub(crate) fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| {
        format!(
            "The name '{}' is not UTF-8, which QMP needs",
            path.display()
        )
    })
}

/// Percent-encoded for a URI; a path keeps its slashes.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Quoted for a shell, if it has to be.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:%+=@,".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::args::{Args, Command};

    fn plan(line: &str) -> Plan {
        let args = Args::try_parse_from(["outport", "serve"].into_iter().chain(line.split(' ')));
        let Command::Serve(serve) = args.unwrap().command else {
            panic!("it is serve");
        };
        Plan::new(&serve, Path::new("/run/o,1")).unwrap()
    }

    fn value(plan: &Plan, option: &str, nth: usize) -> String {
        let pairs = plan.options.chunks(2).filter(|pair| pair[0] == option);
        pairs
            .map(|pair| pair[1].to_str().unwrap().to_owned())
            .nth(nth)
            .unwrap()
    }

    #[test]
    fn an_image_becomes_two_nodes_and_an_export() {
        let plan = plan("a,b.qcow2 --socket /tmp/s");
        let json = |option, nth| serde_json::from_str::<Value>(&value(&plan, option, nth)).unwrap();
        assert_eq!(json("--blockdev", 0)["filename"], "a,b.qcow2");
        assert_eq!(json("--blockdev", 1)["driver"], "qcow2");
        assert_eq!(json("--export", 0)["writable"], true);
        assert_eq!(json("--nbd-server", 0)["addr"]["path"], "/tmp/s");
        assert!(value(&plan, "--chardev", 0).contains("path=/run/o,,1/qmp.sock,"));
    }

    #[test]
    fn read_only_is_said_everywhere() {
        let plan = plan("a.raw --read-only --port 10809");
        for option in ["--blockdev", "--blockdev", "--export"] {
            let text = value(&plan, option, 0);
            assert!(
                text.contains("\"read-only\":true") || text.contains("\"writable\":false"),
                "{text}"
            );
        }
        assert_eq!(plan.uri(), "nbd://localhost:10809/");
    }

    #[test]
    fn plugins_come_before_the_nodes_that_use_them() {
        let plan = plan("a.x -f x --plugin x.wasm --allow-paths /srv --allow-paths /var");
        let names = plan.options.iter().step_by(2);
        let names: Vec<_> = names.filter(|name| *name != "--called").collect();
        assert_eq!(
            names,
            [
                "--allow-paths",
                "--allow-paths",
                "--object",
                "--blockdev",
                "--blockdev",
                "--nbd-server",
                "--export",
                "--chardev",
                "--monitor"
            ]
        );
    }

    #[test]
    fn uris_escape_what_they_must() {
        let plan = plan("a.raw --socket /tmp/a&b --export d%k");
        assert_eq!(plan.uri(), "nbd+unix:///d%25k?socket=/tmp/a%26b");
        assert!(
            plan.greeting()
                .contains("nbdinfo 'nbd+unix:///d%25k?socket=/tmp/a%26b'")
        );
    }

    #[test]
    fn programs_get_one_line() {
        let facts = plan("a.img --port 10809").facts(7);
        assert_eq!(facts["pid"], 7);
        assert_eq!(facts["format"], "raw");
        assert_eq!(facts["port"], 10809);
        assert!(!facts.to_string().contains('\n'));
    }
}
