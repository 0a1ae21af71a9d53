//! One image, what is done to it, and what is seen of it.

use std::path::{Path, PathBuf};

use outport_tests::nbd::Client;
use outport_tests::nbd::wire::{cmd, cmd_flag};
use outport_tests::{Daemon, Rng, qemu_img, run};
use serde_json::{Value, json};

const KIB: u64 = 1024;

/// What was seen: a name and a text each.
#[derive(Debug)]
pub(crate) struct Seen(pub(crate) Vec<(String, String)>);

impl Seen {
    /// Some bitmap says dirty.
    pub(crate) fn has_dirt(&self) -> bool {
        let mut maps = self.0.iter().filter(|(name, _)| name.starts_with("map"));
        maps.any(|(_, text)| text.contains("dirty"))
    }

    /// Something lies in a backing image.
    pub(crate) fn is_deep(&self) -> bool {
        self.0
            .iter()
            .any(|(_, text)| text.contains("backing depth"))
    }
}

enum Step {
    Write(u64, u64),
    Zero(u64, u64, u16),
    Trim(u64, u64),
    Command(&'static str, Value),
    Resize(u64),
}

/// A history; what it does follows from its seed alone.
pub(crate) struct History {
    node: String,
    format: &'static str,
    folder: tempfile::TempDir,
    /// How many images lie below.
    depth: u64,
    steps: Vec<Step>,
    bitmaps: Vec<String>,
}

impl History {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let mut size = rng.between(2, 6 * KIB * 2) * 512;
        let format = if rng.one_in(4) { "raw" } else { "qcow2" };
        let depth = if format == "qcow2" { rng.below(3) } else { 0 };
        make_layers(&mut rng, folder.path(), format, size, depth);
        let mut history = Self {
            node: format!("n{seed}"),
            format,
            folder,
            depth,
            steps: Vec::new(),
            bitmaps: Vec::new(),
        };
        for _ in 0..rng.between(4, 24) {
            history.extend(&mut rng, &mut size);
        }
        if history.bitmaps.is_empty() {
            history.add_bitmap(&mut rng);
        }
        history
    }

    fn extend(&mut self, rng: &mut Rng, size: &mut u64) {
        let offset = rng.below(*size);
        let len = rng.between(1, (*size - offset).min(300 * KIB) + 1);
        let step = match rng.below(16) {
            0..5 => Step::Write(offset, len),
            5 => Step::Zero(offset, len, 0),
            6 => Step::Zero(offset, len, cmd_flag::NO_HOLE),
            7 => Step::Trim(offset, len),
            8..11 => return self.add_bitmap(rng),
            11 if rng.one_in(2) => {
                *size = if rng.one_in(2) && self.format == "raw" {
                    (*size / 2).next_multiple_of(512)
                } else {
                    *size + rng.below(KIB) * 512
                };
                Step::Resize(*size)
            }
            _ => return self.command(rng),
        };
        self.steps.push(step);
    }

    fn add_bitmap(&mut self, rng: &mut Rng) {
        let name = format!("b{}", self.bitmaps.len());
        let mut arguments = json!({"node": self.node, "name": name});
        if !rng.one_in(4) {
            arguments["granularity"] = json!(512_u64 << rng.below(9));
        }
        arguments["disabled"] = json!(rng.one_in(6));
        self.bitmaps.push(name);
        self.steps
            .push(Step::Command("block-dirty-bitmap-add", arguments));
    }

    /// A command about bitmaps there are, alone or in a transaction that may be aborted.
    fn command(&mut self, rng: &mut Rng) {
        if self.bitmaps.is_empty() {
            return;
        }
        let mut one = || {
            let one = json!({"node": self.node, "name": rng.pick(&self.bitmaps)});
            match rng.below(6) {
                0 => ("block-dirty-bitmap-clear", one),
                1 => ("block-dirty-bitmap-disable", one),
                2 | 3 => ("block-dirty-bitmap-enable", one),
                _ => {
                    let from = [rng.pick(&self.bitmaps), rng.pick(&self.bitmaps)];
                    let target = rng.pick(&self.bitmaps);
                    let merge = json!({"node": self.node, "target": target, "bitmaps": from});
                    ("block-dirty-bitmap-merge", merge)
                }
            }
        };
        let single = one();
        let mut actions: Vec<Value> = [single.clone(), one(), one()]
            .into_iter()
            .map(|(name, data)| json!({"type": name, "data": data}))
            .collect();
        let step = match rng.below(4) {
            0 => {
                actions.push(json!({"type": "abort", "data": {}}));
                Step::Command("transaction", json!({"actions": actions}))
            }
            1 | 2 => Step::Command("transaction", json!({"actions": actions})),
            _ => Step::Command(single.0, single.1),
        };
        self.steps.push(step);
    }

    // === playing ===

    /// Everything, on a copy of the image; what is seen at the end.
    pub(crate) fn play(&self, daemon: &mut Daemon) -> Seen {
        let node = &self.node;
        let image = daemon.path(&format!("{node}.img"));
        std::fs::copy(self.folder.path().join("top"), &image).unwrap();
        let file = json!({"driver": "file", "filename": image, "discard": "unmap"});
        let mut options =
            json!({"driver": self.format, "node-name": node, "file": file, "discard": "unmap"});
        if self.format == "qcow2" {
            options["backing"] = self.backing();
        }
        daemon.qmp.ok("blockdev-add", options);
        let mut client = None;
        let mut said = Vec::new();
        for step in &self.steps {
            self.step(daemon, step, &mut client, &mut said);
        }
        hang_up(daemon, node, client.take());
        let contexts = json!({
            "writable": true, "allocation-depth": true, "bitmaps": self.bitmaps,
        });
        said.extend(self.states(daemon));
        daemon.add_export_with(node, contexts);
        said.extend(self.maps(daemon));
        hang_up(daemon, node, Some(daemon.simple_client(node)));
        daemon.qmp.ok("blockdev-del", json!({"node-name": node}));
        std::fs::remove_file(image).unwrap();
        Seen(said)
    }

    /// The chain below, in full: outportd opens no file because an image names it.
    fn backing(&self) -> Value {
        (0..self.depth).fold(Value::Null, |below, layer| {
            let path = self.folder.path().join(format!("l{layer}"));
            let file = json!({"driver": "file", "filename": path});
            json!({"driver": "qcow2", "read-only": true, "file": file, "backing": below})
        })
    }

    fn step(
        &self,
        daemon: &mut Daemon,
        step: &Step,
        client: &mut Option<Client>,
        said: &mut Vec<(String, String)>,
    ) {
        let (kind, flags, offset, len) = match step {
            Step::Command(name, arguments) => {
                let answer = daemon.qmp.execute(name, arguments.clone());
                said.push((format!("{name} {arguments}"), format!("{answer:?}")));
                return;
            }
            Step::Resize(size) => {
                hang_up(daemon, &self.node, client.take());
                let arguments = json!({"node-name": self.node, "size": size});
                let answer = daemon.qmp.execute("block_resize", arguments);
                said.push((format!("resize {size}"), format!("{answer:?}")));
                return;
            }
            Step::Write(offset, len) => (cmd::WRITE, 0, *offset, *len),
            Step::Zero(offset, len, flags) => (cmd::WRITE_ZEROES, *flags, *offset, *len),
            Step::Trim(offset, len) => (cmd::TRIM, 0, *offset, *len),
        };
        let client = client.get_or_insert_with(|| {
            daemon.add_export(&self.node, true);
            daemon.client(&self.node)
        });
        let payload = if kind == cmd::WRITE {
            vec![7; len as usize]
        } else {
            Vec::new()
        };
        let done = client.command(flags, kind, offset, len as u32, &payload);
        assert_eq!(done.unwrap(), Ok(()));
    }

    /// Digests and descriptions of the bitmaps.
    fn states(&self, daemon: &mut Daemon) -> Vec<(String, String)> {
        let mut seen = Vec::new();
        for name in &self.bitmaps {
            let which = json!({"node": self.node, "name": name});
            let digest = daemon.qmp.ok("x-debug-block-dirty-bitmap-sha256", which);
            seen.push((format!("sha256 {name}"), digest.to_string()));
        }
        let nodes = daemon
            .qmp
            .ok("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap();
        let node = nodes
            .iter()
            .find(|it| it["node-name"] == self.node.as_str());
        let bitmaps = node.unwrap()["dirty-bitmaps"].to_string();
        seen.push(("dirty-bitmaps".to_owned(), bitmaps));
        seen
    }

    /// What clients see of the contexts.
    fn maps(&self, daemon: &Daemon) -> Vec<(String, String)> {
        let uri = daemon.uri(&self.node);
        let bitmaps = self.bitmaps.iter().take(2);
        let mut contexts: Vec<_> = bitmaps
            .map(|name| format!("qemu:dirty-bitmap:{name}"))
            .collect();
        let mut seen = Vec::new();
        let depth = "qemu:allocation-depth".to_owned();
        for context in [&contexts[0], &depth] {
            let options = format!(
                "driver=nbd,server.type=unix,server.path={},export={},x-dirty-bitmap={context}",
                daemon.nbd().path().display(),
                self.node,
            );
            let map = qemu_img(&["map", "--output=json", "--image-opts", &options]);
            seen.push((format!("qemu-img map {context}"), map));
        }
        contexts.push(depth);
        for context in &contexts {
            let map = run("nbdinfo", &[&format!("--map={context}"), &uri]);
            seen.push((format!("map {context}"), map));
        }
        seen
    }
}

/// The client leaves, and the export goes with it.
fn hang_up(daemon: &mut Daemon, node: &str, client: Option<Client>) {
    let Some(client) = client else { return };
    client.disconnect().unwrap();
    daemon
        .qmp
        .ok("block-export-del", json!({"id": node, "mode": "hard"}));
    loop {
        let gone = daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
        if gone["data"]["id"] == node {
            return;
        }
    }
}

/// `top` in the folder, over so many backing images.
fn make_layers(rng: &mut Rng, folder: &Path, format: &str, size: u64, depth: u64) {
    let mut below: Option<PathBuf> = None;
    for layer in 0..=depth {
        let path = folder.join(match layer {
            layer if layer == depth => "top".to_owned(),
            layer => format!("l{layer}"),
        });
        let name = path.to_str().unwrap();
        let mut args = vec!["create", "-q", "-f", format];
        if format == "qcow2" {
            args.extend(*rng.pick(&[
                &[][..],
                &["-o", "cluster_size=4k"],
                &["-o", "extended_l2=on,cluster_size=32k"],
            ]));
        }
        if let Some(below) = &below {
            args.extend(["-F", "qcow2", "-b", below.to_str().unwrap()]);
        }
        // A shorter backing image is zeroes further on.
        let part = size / 512 - rng.below(size / 1024);
        let len = if layer == depth { size } else { part * 512 };
        let len_text = len.to_string();
        args.extend([name, &len_text]);
        qemu_img(&args);
        let mut io = vec!["-f".to_owned(), format.to_owned()];
        for _ in 0..rng.below(5) {
            let offset = rng.below(len);
            let count = rng.between(1, (len - offset).min(400 * KIB) + 1);
            let zero = if rng.one_in(4) { "-z " } else { "" };
            io.extend(["-c".to_owned(), format!("write {zero}{offset} {count}")]);
        }
        io.push(name.to_owned());
        if io.len() > 3 {
            run("qemu-io", &io);
        }
        below = Some(path);
    }
}
