//! outportd beside qemu-storage-daemon: the same situations to both, the same answers from both.
//!
//! ```text
//! situations/*.qmp --> situation --> peer (QSD)      --> transcript --.
//!                      (steps)   '-> peer (outportd) --> transcript --'--> compare
//!                                                                          |
//!                                           differences.toml: these may differ
//! ```
//! Each daemon runs in a folder of its own and is given relative paths, so that both are told, and
//! say, the same. A difference that `differences.toml` does not list is a failure, and so is an
//! entry there that nothing needs any more. Situations in which QEMU 10.0 dies are not here: they
//! are tests of their own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod compare;
mod differences;
mod mutation;
mod peer;
mod situation;
mod transcript;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use outport_tests::{Server, requires};

use differences::Differences;
use peer::Peer;
use situation::Situation;
use transcript::Transcript;

/// What issue and specification ask of the suite.
const SITUATIONS_MIN: usize = 40;
const COMMANDS_MIN: usize = 600;

/// Situations run side by side; more than the processors, as most of the time is waiting.
const WORKERS: usize = 4;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp_differential")
}

/// All situations, or those whose name holds `OUTPORT_TEST_SITUATION`.
fn situations() -> Vec<Situation> {
    let wanted = std::env::var("OUTPORT_TEST_SITUATION").unwrap_or_default();
    let mut paths: Vec<_> = fs::read_dir(folder().join("situations"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it == "qmp"))
        .collect();
    paths.sort();
    let all = paths.iter().map(|path| Situation::read(path));
    all.filter(|it| it.name.contains(&wanted)).collect()
}

/// What outportd says that it understands.
fn our_schema() -> String {
    let mut ours = Peer::start(&Situation::default(), Server::Outport, |_| {});
    let monitor = ours.monitor("a");
    monitor.send(br#"{"execute": "query-qmp-schema"}"#);
    monitor.answer().to_string()
}

/// Whether a schema has a name: of a command, a member, a value.
fn knows(schema: &str, name: &str) -> bool {
    schema.contains(&format!("\"{name}\""))
}

/// Those for which outportd has all that they need; the others are told.
fn playable(situations: Vec<Situation>, schema: &str) -> Vec<Situation> {
    let ready = |it: &Situation| it.needs.iter().all(|name| knows(schema, name));
    let (play, wait): (Vec<_>, _) = situations.into_iter().partition(ready);
    for situation in wait {
        println!("WAITING: {} needs {:?}", situation.name, situation.needs);
    }
    play
}

#[test]
fn situations_end_alike() {
    if !requires("qemu-storage-daemon") || !requires("qemu-img") {
        return;
    }
    let schema = our_schema();
    let situations = playable(situations(), &schema);
    let all = std::env::var_os("OUTPORT_TEST_SITUATION").is_none();
    let differences = Differences::read(&folder().join("differences.toml"));
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(situation) = situations.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let [theirs, ours] = [Server::Qsd, Server::Outport]
                        .map(|server| Transcript::of(situation, server));
                    let found = compare::transcripts(&theirs, &ours);
                    let new = found.into_iter().filter(|it| !differences.allow(it));
                    wrong.lock().unwrap().extend(new.map(|it| it.to_string()));
                }
            });
        }
    });
    let commands: usize = situations.iter().map(Situation::commands).sum();
    println!("{} situations, {commands} commands", situations.len());
    let mut wrong = wrong.into_inner().unwrap();
    wrong.sort();
    assert!(
        wrong.is_empty(),
        "{} differences:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    if all {
        let idle = differences.unused(&schema);
        assert!(
            idle.is_empty(),
            "differences that no longer are:\n{}",
            idle.join("\n")
        );
        assert!(situations.len() >= SITUATIONS_MIN, "too few situations");
        assert!(commands >= COMMANDS_MIN, "too few commands");
    }
}
