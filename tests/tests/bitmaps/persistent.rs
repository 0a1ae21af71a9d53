//! Bitmaps that live in images: written by either daemon, read by the other, in any order, also
//! by one that is killed in the middle.
//!
//! ```text
//! seed --> image (qemu-img create, bitmap --add) --> rounds: one daemon each, some steps, an end
//!          played twice: by qemu-storage-daemon alone, and by both in turns
//!          --> the same answers, lists and digests on the way, and the same image information
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use outport_tests::nbd::wire::cmd;
use outport_tests::{Daemon, Rng, Server, qemu_img, requires, run, try_run};
use serde_json::{Value, json};

/// Histories, and daemons that they take in turns.
const SEEDS: u64 = 32;
const ROUNDS: u64 = 5;

const WORKERS: u64 = 4;

#[test]
fn either_reads_what_the_other_wrote() {
    if !["qemu-storage-daemon", "qemu-img", "qemu-io"]
        .into_iter()
        .all(requires)
    {
        return;
    }
    let seeds = std::env::var("OUTPORT_TEST_SEEDS").ok();
    let seeds = seeds.and_then(|it| it.parse().ok()).unwrap_or(SEEDS);
    let (next, dirty, lost) = (AtomicU64::new(1), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > seeds {
                        break;
                    }
                    let life = Life::new(seed);
                    let theirs = life.play("theirs", |_| Server::Qsd);
                    let ours = life.play("ours", |round| round.server);
                    for (theirs, ours) in theirs.iter().zip(&ours) {
                        assert_eq!(theirs, ours, "seed {seed}");
                    }
                    assert_eq!(theirs.len(), ours.len(), "seed {seed}");
                    let has = |what: &str| ours.iter().any(|it| it.contains(what));
                    dirty.fetch_add(u64::from(has("count\":65536")), Ordering::Relaxed);
                    lost.fetch_add(u64::from(has("inconsistent\":true")), Ordering::Relaxed);
                }
            });
        }
    });
    // The histories are of use: many have dirty bitmaps, and some that nobody stored.
    assert!(dirty.into_inner() > seeds / 4);
    assert!(lost.into_inner() > seeds / 8);
}

enum Step {
    Command(&'static str, Value),
    /// Writes or discards through an export.
    Write(Vec<(u16, u64, u64)>),
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Delete,
    Quit,
    Kill,
}

struct Round {
    server: Server,
    steps: Vec<Step>,
    end: End,
}

struct Life {
    folder: tempfile::TempDir,
    backing: bool,
    rounds: Vec<Round>,
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let mut size = rng.between(1, 8 << 10) * 512;
        let backing = rng.one_in(3);
        make_image(&mut rng, folder.path(), size, backing);
        let mut rounds = Vec::new();
        for number in 0..ROUNDS {
            let server = *rng.pick(&[Server::Outport, Server::Qsd]);
            let count = rng.between(2, 9);
            let steps = (0..count).map(|_| step(&mut rng, &mut size));
            rounds.push(Round {
                server,
                steps: steps.collect(),
                end: match rng.below(5) {
                    0 if number + 1 < ROUNDS => End::Kill,
                    1 | 2 => End::Quit,
                    _ => End::Delete,
                },
            });
        }
        Self {
            folder,
            backing,
            rounds,
        }
    }

    fn image(&self, copy: &str) -> PathBuf {
        self.folder.path().join(copy)
    }

    fn options(&self, image: &Path, read_only: bool) -> Value {
        let file = json!({"driver": "file", "filename": image});
        let mut options = json!({"driver": "qcow2", "node-name": "n", "file": file,
                                 "read-only": read_only});
        if self.backing {
            let base = json!({"driver": "file", "filename": self.folder.path().join("base")});
            options["backing"] = json!({"driver": "raw", "read-only": true, "file": base});
        }
        options
    }

    /// All rounds on a copy of the image; what was seen.
    fn play(&self, copy: &str, server: impl Fn(&Round) -> Server) -> Vec<String> {
        let image = self.image(copy);
        std::fs::copy(self.image("top"), &image).unwrap();
        let mut seen = Vec::new();
        for round in &self.rounds {
            let leaks = leaks(&image);
            let mut daemon = Daemon::builder(server(round)).nbd().start();
            let opened = daemon
                .qmp
                .execute("blockdev-add", self.options(&image, false));
            seen.push(format!("{opened:?}"));
            seen.extend(states(&mut daemon));
            for step in &round.steps {
                self.step(&mut daemon, &image, step, &mut seen);
                seen.extend(states(&mut daemon));
            }
            match round.end {
                End::Kill => drop(daemon),
                End::Quit => daemon.stop(),
                End::Delete => {
                    daemon.qmp.ok("blockdev-del", json!({"node-name": "n"}));
                }
            }
            seen.push(stored(&image));
            if server(round) == Server::Outport && round.end != End::Kill {
                assert!(self::leaks(&image) <= leaks, "new leaks");
            }
        }
        seen
    }

    fn step(&self, daemon: &mut Daemon, image: &Path, step: &Step, seen: &mut Vec<String>) {
        match step {
            Step::Command("blockdev-reopen", read_only) => {
                let read_only = read_only.as_bool().unwrap();
                let options = json!({"options": [self.options(image, read_only)]});
                let answer = daemon.qmp.execute("blockdev-reopen", options);
                seen.push(format!("reopen {read_only} {answer:?}"));
            }
            Step::Command(name, arguments) => {
                let answer = daemon.qmp.execute(name, arguments.clone());
                seen.push(format!("{name} {arguments} {answer:?}"));
            }
            Step::Write(writes) => {
                let export = json!({"type": "nbd", "id": "n", "node-name": "n", "name": "n",
                                    "writable": true});
                if daemon.qmp.execute("block-export-add", export).is_err() {
                    return; // It is read-only now.
                }
                let mut client = daemon.client("n");
                for &(kind, offset, len) in writes {
                    let payload = match kind {
                        cmd::WRITE => vec![3; len as usize],
                        _ => Vec::new(),
                    };
                    // Past the end, after a resize: both refuse.
                    let done = client.command(0, kind, offset, len as u32, &payload);
                    seen.push(format!("{:?}", done.unwrap().is_ok()));
                }
                client.disconnect().unwrap();
                daemon
                    .qmp
                    .ok("block-export-del", json!({"id": "n", "mode": "hard"}));
                daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
            }
        }
    }
}

fn make_image(rng: &mut Rng, folder: &Path, size: u64, backing: bool) {
    let (top, base) = (folder.join("top"), folder.join("base"));
    let (top, base) = (top.to_str().unwrap(), base.to_str().unwrap());
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(*rng.pick(&[
        &[][..],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k"],
        &["-o", "extended_l2=on,cluster_size=32k"],
    ]));
    if backing {
        std::fs::write(base, vec![1; 64 << 10]).unwrap();
        args.extend(["-F", "raw", "-b", base]);
    }
    args.extend([top, &size]);
    qemu_img(&args);
    for name in ["b0", "b1"] {
        let granularity = (512_u64 << rng.below(9)).to_string();
        match rng.below(3) {
            0 => {}
            1 => drop(qemu_img(&[
                "bitmap",
                "--add",
                "-g",
                &granularity,
                top,
                name,
            ])),
            _ => drop(qemu_img(&["bitmap", "--add", "--disable", top, name])),
        }
    }
    if rng.one_in(2) {
        run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", top]);
    }
}

fn step(rng: &mut Rng, size: &mut u64) -> Step {
    let name = format!("b{}", rng.below(5));
    let one = json!({"node": "n", "name": name});
    match rng.below(18) {
        0..6 => {
            let count = rng.between(1, 5);
            let mut write = || {
                let kind = *rng.pick(&[cmd::WRITE, cmd::WRITE, cmd::WRITE_ZEROES]);
                let offset = rng.below(*size);
                (
                    kind,
                    offset,
                    rng.between(1, (*size - offset).min(200 << 10) + 1),
                )
            };
            Step::Write((0..count).map(|_| write()).collect())
        }
        6..10 => {
            let mut arguments = one;
            arguments["persistent"] = json!(!rng.one_in(5));
            arguments["disabled"] = json!(rng.one_in(5));
            if rng.one_in(2) {
                arguments["granularity"] = json!(512_u64 << rng.below(9));
            }
            Step::Command("block-dirty-bitmap-add", arguments)
        }
        10 => Step::Command("block-dirty-bitmap-clear", one),
        11 => Step::Command("block-dirty-bitmap-enable", one),
        12 => Step::Command("block-dirty-bitmap-disable", one),
        13 => {
            let merge = json!({"node": "n", "target": name, "bitmaps": ["b0"]});
            Step::Command("block-dirty-bitmap-merge", merge)
        }
        14 => Step::Command("block-dirty-bitmap-remove", one),
        15 => Step::Command("blockdev-reopen", json!(rng.one_in(2))),
        16 => {
            let active = json!({"node-name": "n", "active": !rng.one_in(3)});
            Step::Command("blockdev-set-active", active)
        }
        _ => {
            *size = rng.between(1, 8 << 10) * 512;
            Step::Command("block_resize", json!({"node-name": "n", "size": *size}))
        }
    }
}

/// Lists and digests, in memory and in the image.
fn states(daemon: &mut Daemon) -> Vec<String> {
    let mut seen = Vec::new();
    let nodes = daemon
        .qmp
        .ok("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    let Some(node) = nodes.iter().find(|it| it["node-name"] == "n") else {
        return seen;
    };
    let bitmaps = &node["dirty-bitmaps"];
    seen.push(bitmaps.to_string());
    seen.push(node["image"]["format-specific"]["data"]["bitmaps"].to_string());
    for bitmap in bitmaps.as_array().into_iter().flatten() {
        let which = json!({"node": "n", "name": bitmap["name"]});
        let digest = daemon.qmp.ok("x-debug-block-dirty-bitmap-sha256", which);
        seen.push(format!("{} {digest}", bitmap["name"]));
    }
    seen
}

/// What the image says of its bitmaps.
fn stored(image: &Path) -> String {
    let info = qemu_img(&["info", "--output=json", image.to_str().unwrap()]);
    let info: Value = serde_json::from_str(&info).unwrap();
    info["format-specific"]["data"]["bitmaps"].to_string()
}

/// Clusters that leak. Nothing else is wrong with the image.
fn leaks(image: &Path) -> u64 {
    let args = [
        "check",
        "--output=json",
        "-f",
        "qcow2",
        image.to_str().unwrap(),
    ];
    let checked = try_run("qemu-img", &args);
    let report: Value = serde_json::from_str(&checked.out).unwrap();
    assert!(matches!(checked.code, Some(0 | 3)), "{report}");
    report["leaks"].as_u64().unwrap_or(0)
}
